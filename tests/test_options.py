"""The command line, and the names of models and SAEs: real tables, and nothing imported that takes long."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from experiment import UserError, catalogue, options
from experiment.demo import bundled
from experiment.intervention.rankings import RANKINGS
from experiment.masks import EFFECT
from experiment.options import Options

DEFAULTS = {
    "demo": False,
    "model": "gemma-2-9b-it",
    "sae_release": "gemma-scope-9b-it-res-canonical",
    "sae_id": "layer_9/width_131k/canonical",
    "dataset": "rajpurkar/squad",
    "split": "validation",
    "dataset_config": None,
    "limit": None,
    "sample": None,
    "seed": 42,
    "prompt_template": "auto",
    "exclude_special_tokens": False,
    "error_term": "drop",
    "ablation": "zero",
    "ranking": ("baseline",),
    "draws": 1,
    "effects": 256,
    "activations": None,
    "k": ("50%",),
    "control": "none",
    "keep_only": False,
    "output_dir": Path("runs/gemma-2-9b-it/gemma-scope-9b-it-res-canonical/layer_9_width_131k_canonical"),
    "device": "cuda",
    "device_map": None,
    "dtype": "float16",
    "sae_dtype": "float32",
    "batch_tokens": None,
    "pool_tokens": None,
    "max_new_tokens": 50,
    "overwrite": False,
    "token_file": None,
}
ID = DEFAULTS["sae_id"]
DEMO = {
    "demo": True,
    "model": "demo/model",
    "sae_release": "demo/sae",
    "sae_id": "",
    "dataset": "demo/questions.jsonl",
    "split": "",
    "output_dir": Path("runs/demo"),
    "device": "cpu",
    "dtype": "float32",
    "batch_tokens": 16384,
    "pool_tokens": 32768,
}


def parse(*arguments, masks="topk"):
    return options.parse([*map(str, arguments)], "", masks)


def show_help(capsys, monkeypatch, *arguments, masks="topk"):
    """What --help prints."""
    monkeypatch.setenv("COLUMNS", "1000")  # nothing wraps
    with pytest.raises(SystemExit) as end:
        options.parse([*arguments, "--help"], "What the script says of itself.", masks)
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.fixture
def no_token(tmp_path, monkeypatch):
    """No token.txt at the top of the project, whatever this checkout has there."""
    monkeypatch.setattr(options, "ROOT", tmp_path)
    return tmp_path / "token.txt"


# --- options ----------------------------------------------------------------------------------------------------------


def test_defaults(no_token):
    assert dataclasses.asdict(parse()) == DEFAULTS
    assert dataclasses.asdict(parse("--demo")) == DEFAULTS | DEMO
    assert dataclasses.asdict(parse("--demo", masks=None)) == DEFAULTS | DEMO


def test_default_options_resolve():
    chosen = parse()
    assert catalogue.official_name(chosen.model) == "google/gemma-2-9b-it"
    assert chosen.sae_id in [sae["id"] for sae in catalogue.sae_table()[chosen.sae_release]["saes"]]
    assert catalogue.sae_table()[chosen.sae_release]["model"] == chosen.model


@pytest.mark.parametrize("demo", [[], ["--demo"]])
def test_what_is_given_counts(demo, tmp_path):
    given = {
        "dataset": "a/b", "split": "test", "limit": 3, "seed": 7, "prompt_template": "chatml", "error_term": "keep",
        "device": "cuda", "device_map": "auto", "dtype": "bfloat16", "sae_dtype": "tf32", "batch_tokens": 9,
        "pool_tokens": 11, "max_new_tokens": 8, "activations": tmp_path / "a.json", "output_dir": tmp_path,
        "ranking": "baseline", "token_file": ROOT / "requirements.txt",
    }  # fmt: skip
    arguments = [part for name, value in given.items() for part in ("--" + name.replace("_", "-"), value)]
    chosen = dataclasses.asdict(parse(*demo, *arguments, "--overwrite", "--exclude-special-tokens"))
    given |= {"ranking": ("baseline",), "overwrite": True, "exclude_special_tokens": True}
    assert {name: chosen[name] for name in given} == given
    assert parse(*demo, "--sample", 5).sample == 5


def test_the_command_line_is_read_where_nothing_is_given(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["baseline.py", "--demo", "--limit", "4"])
    chosen = options.parse(None, "", masks=None)
    assert (chosen.demo, chosen.model, chosen.limit) == (True, "demo/model", 4)


@pytest.mark.parametrize("masks", [None, "topk", "bottomk"])
def test_help_shows_every_option_and_its_default(masks, capsys, monkeypatch):
    shown = show_help(capsys, monkeypatch, masks=masks)
    assert "What the script says of itself." in shown
    lines = {entry.split()[0]: entry for entry in re.split(r"\n  (?=--)", shown)[1:]}
    left_out = {
        None: ("k", "control", "keep_only"),
        "topk": ("effects",),
        "bottomk": ("effects", "keep_only"),
    }
    fields = {field.name: field for field in dataclasses.fields(Options) if field.name not in left_out[masks]}
    assert lines.keys() == {"--" + name.replace("_", "-") for name in fields} | {"--list-saes"}
    for name, field in fields.items():
        line = lines["--" + name.replace("_", "-")]
        assert len(field.metadata["help"]) > 10
        assert field.default is False or "(default: " in line, line
    assert "(default: gemma-2-9b-it)" in lines["--model"] and "(default: all)" in lines["--limit"]
    assert "(default: baseline)" in lines["--ranking"] and "{context} and {question}" in lines["--prompt-template"]
    assert not masks or "(default: 50%)" in lines["--k"]


def test_help_of_the_demo_shows_its_defaults(capsys, monkeypatch):
    shown = show_help(capsys, monkeypatch, "--demo")
    for default in ("demo/model", "demo/sae", "demo/questions.jsonl", "none", "cpu", "16384", "32768"):
        assert f"(default: {default})" in shown
    assert "gemma-2-9b-it" not in shown
    assert not re.search(r"\(default: [^)]*\) \(default: ", shown)  # nor what they are without --demo


def test_nothing_slow_is_imported():
    """For help, for a mistake, for names, for options that are good and for a local file of questions."""
    runs = [
        ["--help"],
        ["--demo", "--help"],
        ["--no-such-option"],
        ["--list-saes"],
        ["--model", "gemma-9b"],
        ["--sae-release", "gemma-scope-9b-it-res-canonicle"],
        ["--sae-release", "llama-3-8b-it-res-jh"],
        ["--ranking", "examples/own_ranking.py:by_answer"],
        ["--ranking", "examples/own_ranking.py:by_size"],
        [],
        ["--demo"],
    ]
    code = """
import contextlib, io, json, sys
from experiment import UserError, options, questions
from experiment.demo import bundled
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit, UserError):
        chosen = options.parse(arguments, "", "topk")
questions.load(bundled(chosen.dataset), "")
print(*({"torch", "transformers", "datasets", "sae_lens", "transformer_lens", "pandas", "common"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", code, json.dumps(runs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


def test_a_reader_who_has_enough():
    """As `python -m experiment.report ... | head`: no traceback."""
    script = "import sys, experiment; sys.exit(experiment.guard(lambda: [print('line') for _ in range(100_000)]))"
    done = subprocess.run(
        ["bash", "-c", '"$@" | head -n 1', "bash", sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("line\n", "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--no-such-option"], "--no-such-option"),
        (["--mod", "gemma-2-9b-it"], "--mod"),
        (["extra"], "extra"),
        (["--model"], "--model"),
        (["--model", ""], "--model: is empty"),
        (["--dataset", ""], "--dataset: is empty"),
        (["--output-dir", ""], "--output-dir: is empty"),
        (["--limit", "0"], "--limit: '0' is not a whole number of at least 1"),
        (["--sample", "-1"], "--sample: '-1'"),
        (["--batch-tokens", "1.5"], "--batch-tokens: '1.5'"),
        (["--pool-tokens", "0"], "--pool-tokens: '0' is not a whole number of at least 1"),
        (["--max-new-tokens", "many"], "--max-new-tokens: 'many'"),
        (["--max-new-tokens", "9" * 5000], "--max-new-tokens: '999"),
        (["--seed", "x"], "--seed"),
        (["--limit", "3", "--sample", "3"], "cannot be combined"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--dtype", "tf32"], "--dtype: invalid choice: 'tf32'"),
        (["--sae-dtype", "int8"], "--sae-dtype: invalid choice"),
        (["--sae-dtype", "tf32", "--device", "cpu"], "--sae-dtype tf32: only a CUDA device has it, not cpu"),
        (["--demo", "--sae-dtype", "tf32"], "--sae-dtype tf32: only a CUDA device has it, not cpu"),
        (["--error-term", "half"], "--error-term: invalid choice"),
        (["--device-map", "balanced"], "--device-map: invalid choice"),
        (["--device-map", "auto", "--device", "cuda:1"], "spreads the model over all GPUs: leave --device cuda:1 out"),
        (["--token-file", "missing.txt"], "missing.txt: there is no such file"),
        (["--ranking", "baseline", "--ranking"], "--ranking"),
        (["--k"], "--k"),
        (["--control", "matched"], "--control: invalid choice: 'matched'"),
        (["--keep-only", "--k", "0", "10"], "--keep-only: K = 0 keeps nothing, which is run for comparison as it is"),
        (["--keep-only", "--control", "direction"], "--keep-only: has no control: leave --control direction out"),
        (["--draws", "0"], "--draws: '0' is not a whole number of at least 1"),
        (["--draws", "5"], "--draws 5: nothing is drawn here: give matched, random or --control direction too"),
        (["--draws", "5", "--ranking", "baseline", "other-context"], "--draws 5: nothing is drawn here"),
        (["--effects", "9"], "unrecognized arguments: --effects 9"),
        (["--ranking", "others"], "invalid choice: 'others' (give baseline, "),
    ],
)  # fmt: skip
def test_mistakes_get_one_line(arguments, says, capsys):
    with pytest.raises(UserError) as error:
        parse(*arguments)
    assert says in str(error.value) and "\n" not in str(error.value) and "usage" not in str(error.value)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["model", "sae-release", "sae-id", "dataset", "split"])
def test_names_that_no_file_can_hold(name):
    """Bytes of a path that are no characters: refused at once, for names stand in the files of a round. What only
    leads to a file may be any path there is."""
    shown = f"--{name} caf\\\\udce9: holds bytes that are no characters in this locale"
    with pytest.raises(UserError, match=shown):
        parse("--demo", "--sae-release", "demo/sae", f"--{name}", "caf\udce9")
    assert parse("--demo", "--output-dir", "caf\udce9").output_dir == Path("caf\udce9")
    assert parse("--demo", "--dataset", "café.jsonl").dataset == "café.jsonl"


def test_what_is_only_of_some_rounds():
    for masks, given, says in (
        ("bottomk", ["--keep-only"], "unrecognized arguments: --keep-only"),
        (None, ["--control", "direction"], "unrecognized arguments: --control direction"),
        (None, ["--draws", "2"], "--draws 2: nothing is drawn here: give matched or random too, or leave it out"),
        (None, ["--ranking", "other"], "--ranking other: masks by the baseline's lists, in rounds 2 and 3"),
        (None, ["--ranking", "other", "other-context"], "--ranking other other-context: masks by the baseline's"),
    ):
        with pytest.raises(UserError, match=re.escape(says)):
            parse(*given, masks=masks)
    assert parse("--draws", "2", "--control", "direction").draws == 2
    assert parse("--draws", "2", "--ranking", "matched", masks=None).draws == 2
    assert parse("--effects", "9", masks=None).effects == 9


def test_round_1_leaves_out_what_it_does_not_rank(capsys):
    given = parse("--ranking", "other", "gradsae", "other-context", masks=None)
    assert options.leave_out_others(given).ranking == ("gradsae",)
    assert capsys.readouterr().err == (
        "--ranking other other-context: masks by the baseline's lists, in rounds 2 and 3: nothing to rank here.\n"
    )
    assert options.leave_out_others(parse("--ranking", "gradsae", masks=None)).ranking == ("gradsae",)
    assert capsys.readouterr().err == ""
    # Where what it makes is missing, the command is one that makes it.
    asked = parse("--demo", "--ranking", "other", "random", "--draws", "3", "--control", "direction", "--k", "3")
    assert options.write_command(asked) == "python baseline.py --demo --ranking baseline random --draws 3"
    asked = parse("--demo", "--ranking", "other", "--draws", "3", "--control", "direction")
    assert options.write_command(asked) == "python baseline.py --demo"


def test_k():
    assert parse("--k", "007", "7", "0", "30", "1%", "050%", "50%", "00").k == ("7", "0", "30", "1%", "50%")
    for k in ("0%", "51%", "-1", "1.5", "ten", "", "50 %", "%", "1%%", "٣", "9" * 5000):
        with pytest.raises(UserError, match="--k"):
            parse(f"--k={k}")
    with pytest.raises(UserError, match="--k"):
        parse("--k", "-1")
    with pytest.raises(UserError, match="--k"):
        parse("--k", "10", masks=None)


def test_rankings_are_those_there_are(capsys, monkeypatch):
    """The names that the command line knows, before PyTorch is there, are those of the functions."""
    assert set(options.RANKINGS) == {*RANKINGS, EFFECT}
    assert parse("--ranking", "random", "baseline", "random").ranking == ("random", "baseline")
    assert re.search(
        "by: baseline, .*, random, other, other-context, or FILE.py:FUNCTION .default: baseline",
        show_help(capsys, monkeypatch),
    )
    with pytest.raises(UserError, match="--ranking: invalid choice: 'yours'.*baseline.*random"):
        parse("--ranking", "random", "yours")
    with pytest.raises(UserError, match="--activations: such a file holds one ranking"):
        parse("--ranking", "random", "baseline", "--activations", "a.json")
    assert parse("--ranking", "random", "random", "--activations", "a.json").activations == Path("a.json")


def test_sizes_of_the_demo_go_together():
    """Whoever gives batches another size gets groups of one batch; the other way round the demo's batches stay."""
    chosen = parse("--demo", "--batch-tokens", "500")
    assert (chosen.batch_tokens, chosen.pool_tokens) == (500, None)
    chosen = parse("--demo", "--batch-tokens", "500", "--pool-tokens", "4000")
    assert (chosen.batch_tokens, chosen.pool_tokens) == (500, 4000)
    chosen = parse("--demo", "--pool-tokens", "4000")
    assert (chosen.batch_tokens, chosen.pool_tokens) == (16384, 4000)


def test_token_file(no_token, tmp_path):
    assert parse("--demo").token_file is None
    no_token.write_text("hf_abcdefghijkl")
    assert parse("--demo").token_file == no_token
    (tmp_path / "other.txt").touch()
    assert parse("--demo", "--token-file", tmp_path / "other.txt").token_file == tmp_path / "other.txt"


def test_device_map_and_a_launcher(monkeypatch):
    assert parse("--device-map", "auto").device_map == "auto"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without a launcher"):
        parse("--device-map", "auto")


def test_bundled_files_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("demo/model", "demo/sae", "demo/questions.jsonl"):
        assert Path(bundled(name)).exists()
    for name in ("gemma-2-9b-it", "", "cpu", "demo/other"):
        assert bundled(name) == name


def test_output_folder_is_named_after_what_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("saes/mine/layer_1", "models/small", "model", "data/my.questions"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "mine.jsonl").touch()
    sae = ["--sae-release", "gemma-scope-2-4b-it-res", "--sae-id", "layer_17_width_16k_l0_medium"]
    expected = {
        (): "gemma-2-9b-it/gemma-scope-9b-it-res-canonical/layer_9_width_131k_canonical",
        ("--error-term", "keep"):
            "gemma-2-9b-it/gemma-scope-9b-it-res-canonical/layer_9_width_131k_canonical_error_term_keep",
        ("--sae-id", "layer_20/width_16k/canonical"):
            "gemma-2-9b-it/gemma-scope-9b-it-res-canonical/layer_20_width_16k_canonical",
        ("--model", "google/gemma-2-9b-it"):
            "google_gemma-2-9b-it/gemma-scope-9b-it-res-canonical/layer_9_width_131k_canonical",
        tuple(sae): "google_gemma-3-4b-it/gemma-scope-2-4b-it-res/layer_17_width_16k_l0_medium",
        ("--model", "models/small", "--sae-release", "./saes/mine/"): "small/mine",
        ("--model", "models/small", "--sae-release", "saes/mine", "--sae-id", "layer_1"): "small/mine/layer_1",
        ("--model", "a/b", "--sae-release", "someone/saes", "--sae-id", "../x/"): "a_b/someone_saes/x",
        ("--demo",): "demo",
        ("--demo", "--limit", "3", "--dtype", "float16"): "demo",
        ("--demo", "--error-term", "keep"): "model/sae_error_term_keep",
        ("--demo", "--sae-release", "saes/mine"): "model/mine",
        ("--demo", "--sae-release", "saes/mine", "--error-term", "keep"): "model/mine_error_term_keep",
        ("--demo", "--model", "models/small"): "small/sae",
        ("--model", "demo/model", "--sae-release", "demo/sae"): "model/sae",
        ("--demo", "--dataset", "demo/questions.jsonl"): "demo",
        ("--demo", "--dataset", "mine.jsonl"): "demo_mine",
        ("--demo", "--dataset", tmp_path / "mine.jsonl"): "demo_mine",
        ("--demo", "--dataset", "data/my.questions/"): "demo_my.questions",
        ("--demo", "--dataset", "mine.jsonl", "--error-term", "keep"): "model/sae_error_term_keep_mine",
        ("--dataset", "rajpurkar/squad_v2"):
            "gemma-2-9b-it/gemma-scope-9b-it-res-canonical/layer_9_width_131k_canonical_rajpurkar_squad_v2",
        ("--dataset", "rajpurkar/squad"):
            "gemma-2-9b-it/gemma-scope-9b-it-res-canonical/layer_9_width_131k_canonical",
        ("--model", "models/small", "--sae-release", "saes/mine", "--dataset", "mine.jsonl"): "small/mine_mine",
    }  # fmt: skip
    for arguments, folder in expected.items():
        assert parse(*arguments).output_dir == Path("runs", folder), arguments
    for arguments in expected:
        assert parse(*arguments, "--output-dir", "out").output_dir == Path("out")


def test_saes_of_a_release_get_folders_of_their_own():
    for release, entry in catalogue.sae_table().items():
        ids = {sae["id"] for sae in entry["saes"]}
        names = [Options(model="m", sae_release=release, sae_id=sae_id) for sae_id in ids]
        assert len({options._name_output_dir(chosen) for chosen in names}) == len(ids)


# --- names of models and SAEs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sae-release", "gemma-scope-9b-it-res-canonicle"], "nearest: gemma-scope-9b-it-res-canonical"),
        (["--sae-id", "layer_9/width_131k/canon"], "nearest: layer_9/width_131k/canonical"),
        (
            ["--sae-release", "gemma-scope-2b-pt-transcoders", "--sae-id", "layer_0/width_16k/average_l0_76"],
            "transcoder",
        ),
        (["--sae-release", "gemma-scope-2-4b-it-res"], "holds 52 SAEs: give --sae-id"),
        (["--model", "gemma-9b"], "not a model TransformerLens knows"),
        (
            ["--model", "google/gemma-3-4b-it", "--sae-release", "gemma-scope-9b-it-res-canonical", "--sae-id", ID],
            "belongs to gemma-2-9b-it, not to google/gemma-3-4b-it",
        ),
        (["--sae-release", "llama-3-8b-it-res-jh", "--model", "gemma-2-9b-it"], "belongs to meta-llama"),
        (["--demo", "--sae-release", "gemma-2b-it-res-jb"], "belongs to gemma-2b-it, not to demo/model"),
        (["--model", "demo/model"], "give --sae-release too, for the default SAE is for gemma-2-9b-it: demo/sae is"),
        (
            ["--sae-release", "google/gemma-scope-9b-it-res"],
            "give the name that SAELens' table has for it: gemma-scope-9b",
        ),
        (
            ["--demo", "--sae-release", "canrager/temporalSAEs"],
            "has for it: temporal-sae-gemma-2-2b, temporal-sae-llama",
        ),
        (["--demo", "--sae-release", "gemma-scope-9b-it-res-canonicle", "--sae-id", "x"], "nearest"),
        (["--demo", "--sae-release", "gemma-scope-9b-it-res-canonical", "--sae-id", "layer_9/x"], "not in release"),
    ],
)
def test_names_that_do_not_belong_together(arguments, says):
    with pytest.raises(UserError, match=says):
        parse(*arguments)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("google/gemma-3-4b-it", "SAELens' table has gemma-scope-2-4b-it-res-all, gemma-scope-2-4b-it-res, "),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "SAELens' table has llama-3-8b-it-res-jh$"),
        (
            "google/gemma-2-2b-it",
            "SAELens' table has none for it: give a local SAE folder, or a repository on the Hub$",
        ),
        ("nobody/a-model", "SAELens' table has none for it"),
        ("models/gemma-2b-it", "SAELens' table has gemma-2b-it-res-jb$"),
        ("models/mine", "SAELens' table has none for it"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--sae-id", ID]])
def test_a_model_alone_asks_for_its_sae(model, says, more, tmp_path, monkeypatch):
    """The default SAE, of another model, would be downloaded only to be refused. A folder is what its name says."""
    monkeypatch.chdir(tmp_path)
    for name in ("gemma-2b-it", "mine", "gemma-2-9b-it"):
        (tmp_path / "models" / name).mkdir(parents=True)
    with pytest.raises(UserError, match=f"--model {model}: give --sae-release too, .*for gemma-2-9b-it: {says}"):
        parse("--model", model, *more)
    for same in ("models/gemma-2-9b-it", "gemma-2-9b-it", "google/gemma-2-9b-it"):
        assert parse("--model", same, *more).sae_release == DEFAULTS["sae_release"]
    assert parse("--demo", "--model", model).sae_release == "demo/sae"


def test_a_repository_of_the_table_is_asked_for_by_its_release():
    """Its files are SAELens' to convert; a folder of that name is a folder."""
    for release, entry in catalogue.sae_table().items():
        if entry["repo_id"] in catalogue.sae_table() or catalogue.is_transcoder(release):
            continue
        with pytest.raises(UserError, match="give the name that SAELens' table has for it") as error:
            parse("--demo", "--sae-release", entry["repo_id"], "--sae-id", entry["saes"][0]["path"])
        named = catalogue.releases_of_repository(entry["repo_id"])
        assert release in named and all(name in str(error.value) for name in named[:4])


def test_the_table_is_saelens_own():
    """Read from its file, without SAELens, it says what SAELens says, but for one release that it has wrong."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    theirs = get_pretrained_saes_directory()
    assert set(catalogue.sae_table()) == set(theirs)
    for release, entry in catalogue.sae_table().items():
        assert entry["model"] == theirs[release].model or release == "gemma-scope-9b-it-res"
        assert [sae["id"] for sae in entry["saes"]] == list(theirs[release].saes_map)


def test_the_release_says_the_model():
    chosen = parse("--sae-release", "llama-3-8b-it-res-jh")
    assert (chosen.model, chosen.sae_id) == ("meta-llama/Meta-Llama-3-8B-Instruct", "blocks.25.hook_resid_post")
    page = catalogue.neuronpedia_page(chosen.sae_release, chosen.sae_id, 7)
    assert page == "https://www.neuronpedia.org/llama3-8b-it/25-res-jh/7"
    chosen = parse("--sae-release", "gemma-scope-2-4b-it-res", "--sae-id", "layer_17_width_16k_l0_medium")
    assert chosen.model == "google/gemma-3-4b-it"
    for model in ("google/gemma-2-9b-it", "gemma-2-9b-it"):
        chosen = parse("--model", model)
        assert chosen.model == model
        assert (chosen.sae_release, chosen.sae_id) == (DEFAULTS["sae_release"], DEFAULTS["sae_id"])
    assert parse("--demo", "--model", "gemma-2b-it", "--sae-release", "gemma-2b-it-res-jb").model == "gemma-2b-it"


def test_pages_are_those_of_the_table(tmp_path):
    assert catalogue.neuronpedia_page(str(tmp_path), "", 7) is None
    assert catalogue.neuronpedia_page("someone/saes", "", 7) is None
    assert catalogue.neuronpedia_page(DEFAULTS["sae_release"], "no such id", 7) is None


def test_an_sae_outside_the_table(tmp_path):
    """A folder, or a repository on the Hub: it belongs to whatever model it fits, and may do without an id."""
    for release in ("someone/saes", str(tmp_path), "demo/sae"):
        chosen = parse("--sae-release", release)
        assert (chosen.model, chosen.sae_release, chosen.sae_id) == (DEFAULTS["model"], release, "")
        assert parse("--sae-release", release, "--sae-id", "layer_3", "--model", "a/b").sae_id == "layer_3"


def test_every_release_that_is_listed_can_be_picked():
    """By --sae-release and --sae-id alone: the model is the release's, and a tuned one."""
    listed = [line.split()[0] for line in catalogue.list_saes("").splitlines()[1:-2]]
    assert len(listed) > 30
    for release in listed:
        for sae_id in catalogue.list_saes(release).splitlines()[::20]:
            chosen = parse("--sae-release", release, "--sae-id", sae_id)
            assert catalogue.same_model(chosen.model, catalogue.sae_table()[release]["model"])
            assert chosen.sae_id == sae_id
            assert "/" in catalogue.official_name(chosen.model) and catalogue.INSTRUCTION_TUNED.search(chosen.model)


def test_list_saes(capsys):
    """A listing is an end in itself: exit code 0, whatever else was given."""
    with pytest.raises(SystemExit) as end:
        parse("--list-saes", "9b", "--limit", "3")
    assert end.value.code == 0
    line = ["gemma-scope-9b-it-res-canonical", "gemma-2-9b-it", "6", "layer_9/width_16k/canonical"]
    assert capsys.readouterr().out.splitlines()[2].split() == line
    with pytest.raises(SystemExit):
        parse("--list-saes")
    every = capsys.readouterr().out
    for family in ("gemma-scope-9b-it-res ", "gemma-3-27b-it", "Qwen2.5-7B-Instruct", "Llama-3.3-70B-Instruct"):
        assert family in every
    assert "transcoder" not in every and "gemma-2-2b " not in every
    assert "layer_9/width_131k/canonical" in catalogue.list_saes("gemma-scope-9b-it-res-canonical").splitlines()
    assert catalogue.list_saes("zzz") == "No instruction-tuned release in SAELens' table has 'zzz' in its name."


def test_instruction_tuned_models_are_known_by_their_names():
    tuned = ("gemma-2-9b-it", "meta-llama/Meta-Llama-3-8B-Instruct", "Qwen/Qwen2.5-7B-Instruct", "nobody/a-chat-model")
    for model in tuned:
        assert catalogue.INSTRUCTION_TUNED.search(model)
    for model in ("google/gemma-2-9b", "meta-llama/Meta-Llama-3-8B", "Qwen/Qwen2.5-7B", "nobody/bits"):
        assert not catalogue.INSTRUCTION_TUNED.search(model)


def test_names_of_models(tmp_path):
    with pytest.raises(UserError, match="nearest: .*gemma-2-9b-it"):
        catalogue.official_name("gemma-2-9b-its")
    assert catalogue.official_name("nobody/gemma-2-9b-its") == "nobody/gemma-2-9b-its"
    assert catalogue.official_name(str(tmp_path)) == str(tmp_path)
    assert catalogue.same_model(str(tmp_path), "gemma-2-9b-it")
    assert catalogue.same_model("google/gemma-2-9b-it", "gemma-2-9b-it")
    assert catalogue.same_model("meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama-3-8b-instruct")
    assert not catalogue.same_model("google/gemma-2-9b", "gemma-2-9b-it")
