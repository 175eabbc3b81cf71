"""Bad inputs to the scripts: each is refused with exit code 2 and one line that names it, and no file is changed.

What a reader of files refuses, and that no file makes it raise anything else, is in test_files.py; mistakes on the
command line are in test_options.py, and in loading in test_loading.py.
"""

import json
import re
import shutil

import pytest
from conftest import ROOT, run_script

ROW = {"id": "1", "context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [0]}}
DATA = {  # name: (file name, content, what the line says)
    "empty jsonl": ("d.jsonl", "", "no question"),
    "no json": ("d.jsonl", "{", "line 1: is not JSON"),
    "second line no json": ("d.jsonl", json.dumps(ROW) + "\nnonsense\n", "line 2: is not JSON"),
    "a number a line": ("d.jsonl", "1\n", "line 1: lacks one"),
    "no id": ("d.jsonl", json.dumps({k: v for k, v in ROW.items() if k != "id"}), "'id'"),
    "id a fraction": ("d.jsonl", json.dumps(ROW | {"id": 1.5}), "the id a string or a whole number"),
    "id a truth value": ("d.jsonl", json.dumps(ROW | {"id": True}), "the id a string or a whole number"),
    "no context": ("d.jsonl", json.dumps({k: v for k, v in ROW.items() if k != "context"}), "'context'"),
    "no answers": ("d.jsonl", json.dumps({k: v for k, v in ROW.items() if k != "answers"}), "'answers'"),
    "answers a number": ("d.jsonl", json.dumps(ROW | {"answers": 3}), "must be strings"),
    "answers without texts": ("d.jsonl", json.dumps(ROW | {"answers": [{"answer_start": 3}]}), "'text'"),
    "a text as is_impossible": ("d.jsonl", json.dumps(ROW | {"is_impossible": "false"}), "must be true or false"),
    "id twice": ("d.jsonl", json.dumps(ROW) + "\n" + json.dumps(ROW), "line 2: the id '1' stands twice"),
    "all unanswerable": ("d.jsonl", json.dumps(ROW | {"answers": {"text": []}}), "no question with a ground truth"),
    "all blank": ("d.jsonl", json.dumps(ROW | {"answers": ["", " \n"]}), "no question with a ground truth"),
    "cell of neither kind": ("d.csv", "id,context,question,answers\n1,c,q,{a\n", "row 1: the answers are neither"),
    "not what its name says": ("d.parquet", "nonsense", "d.parquet"),
    "half a character": ("d.jsonl", json.dumps(ROW | {"id": "\ud800"}), "half a character"),
    "not utf-8": ("d.jsonl", b'{"id": "\xff"}', "line 1: is not JSON"),
    "json: a number": ("d.json", "7", "neither a list"),
    "json: empty object": ("d.json", "{}", "neither a list of questions nor in SQuAD's nested form"),
    "json: empty list": ("d.json", "[]", "no question"),
    "json: deep": ("d.json", "[" * 100_000, "is not JSON"),
    "json: qas a number": ("d.json", '{"data": [{"paragraphs": [{"context": "c", "qas": 3}]}]}', "neither a list"),
    "overlong": (
        "d.jsonl",
        json.dumps(ROW | {"id": "the long one", "context": "The harp. " * 300}),
        "no selected question fits the model's context of 512 tokens, with an answer of 50",
    ),
}
SAMPLE = {"id": "questions-000-0", "answer": "a", "em": 1.0, "f1": 1.0, "active": [1, 2], "topk": [1], "bottomk": [2]}
RUN = json.loads((ROOT / "activations_baseline.json").read_text())["run"]
OTHER = RUN | {"model": "other", "model_digest": "0" * 64}
THEIRS = {"original": [1], "have_gradient": [1], "no_gradient": [1]}
RECORD = {"id": "questions-000-0", "text": "t", "answer": "a", "em": 1.0, "f1": 1.0, "accuracy": 1.0, "named": 1.0}
FIGURES = {"n": 1, "em": 100.0, "f1": 100.0, "intervals": {"em": None, "f1": None}}
ENTRY = {"run": RUN, "round": "false", "masked": "topk", "k": "50%", "mean_k": 6.0, "population": "0f"} | FIGURES
ENTRY |= {"clean": FIGURES, "drop": FIGURES}


def activations(run=None, **changed):
    return json.dumps({"run": RUN | (run or {}), "samples": [SAMPLE | changed]})


ACTIVATIONS = {
    "no json": ("{", "is not JSON"),
    "no run": (json.dumps({"samples": [SAMPLE]}), "names no run"),
    "topk negative": (activations(topk=[-1]), "sample 1: topk.0: Input should be greater than or equal to 0"),
    "another model": (
        activations({"model_digest": "0" * 64}),
        'model "demo/model" (content 00000000), now "demo/model"',
    ),
    "another SAE": (activations({"sae_digest": "0" * 64}), 'sae_release "demo/sae" (content 00000000), now "demo/sae"'),
    "another ranking": (activations({"ranking": "gradsae"}), 'ranking "gradsae", now "baseline"'),
    "another way to splice": (activations({"error_term": "keep"}), 'error_term "keep", now "drop"'),
    "other questions": (activations({"questions": "0" * 64}), "questions"),
    "another dtype": (activations({"dtype": "float16"}), 'dtype "float16"'),
    "another prompt": (activations({"prompt_template": "{context}{question}"}), "prompt_template"),
    "lists of different lengths": (activations(removed_topk=[]), "sample 1: removed_topk is not as long as topk"),
    "a limit that is none": (
        activations({"limit": "all"}),
        "its run is damaged (limit: Input should be a valid integer)",
    ),
    "none of these questions": (activations(id="of another data set"), "none of its questions"),
    "theirs: no lists": ('[{"prompt": {}}]', "sample 1: active: Field required"),
    "theirs: other prompts": (json.dumps([{"prompt": THEIRS}]), "none of its questions"),
}
OF_THE_SAE = {  # these show once the SAE is loaded
    "another width": (activations({"d_sae": 7}), "d_sae 7, now 512"),
    "another place": (activations({"hook_name": "blocks.2.hook_resid_post"}), 'hook_name "blocks.2.hook_resid_post"'),
    "token outside the model": (
        activations(tokens=[10**9]),
        "questions-000-0 names token 1000000000, but the model has",
    ),
    "latent outside the SAE": (activations(topk=[512]), "question questions-000-0 names latent 512, but the SAE has"),
}
OF_THE_ROUND = {  # what stands in round 1's way: file name, content, what the line says
    "journal damaged": ("predictions_baseline.jsonl", '{"run": {}}\nnonsense\n', "line 2: is damaged"),
    "journal empty": ("predictions_baseline.jsonl", "", "line 1: is damaged"),
    "journal of another run": (
        "predictions_baseline.jsonl",
        json.dumps({"run": OTHER}) + "\n" + json.dumps(RECORD) + "\n",
        'model "other" (content 00000000), now "demo/model" (content ',
    ),
    "part of another run": (
        "predictions_baseline.part1.jsonl",
        json.dumps({"run": RUN | {"max_new_tokens": 7}}) + "\n",
        "max_new_tokens 7, now 50",
    ),
    "results no json": ("results.json", "[", "is not JSON"),
    "results an object": ("results.json", "{}", "is not a file of results"),
    "results of another run": (
        "results.json",
        json.dumps([ENTRY | {"run": OTHER}]),
        'model "other"',
    ),
    "activations of another run": (
        "activations_baseline.json",
        activations({"dtype": "float16"}),
        'dtype "float16", now "float32"',
    ),
    "activations of another length": (
        "activations_baseline.json",
        activations({"max_new_tokens": 7}),
        "max_new_tokens 7, now 50",
    ),
    "the authors' activations": ("activations_baseline.json", json.dumps([{"p": THEIRS}]), "the authors' published"),
    "something else": ("activations_baseline.json", "my notes", "is not JSON"),
}
TEMPLATES = {
    "no context": ("{question}", "{context} exactly once"),
    "no question": ("{context}", "{question} exactly once"),
    "context twice": ("{context}{context}{question}", "{context} exactly once"),
    "not utf-8": (b"\xff", "nor a text file"),
}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def read_all(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused(script, arguments, says): the script stops with one line beside its news, and touches no file."""

    def check(script, arguments, says):
        before = read_all(tmp_path)
        arguments = ["--demo", "--output-dir", tmp_path, *arguments]
        code, out, err = run_script(script, arguments, monkeypatch, capsys)
        # What is being done, and what was found in a file.
        news = re.compile(rf"Loading |Loaded in |[0-9]+ tokens in a batch, |Round 1: |{re.escape(str(tmp_path))}")
        lines = [line for line in err.splitlines() if line and not news.match(line)]
        assert (code, out, len(lines)) == (2, "", 1), err
        assert lines[0].startswith(f"{script}.py: ") and says in lines[0], err
        assert read_all(tmp_path) == before
        return lines[0]

    return check


@pytest.mark.parametrize("case", DATA)
def test_data_sets(case, refused, tmp_path):
    name, content, says = DATA[case]
    write(tmp_path / name, content)
    assert str(tmp_path / name) in refused("baseline", ["--dataset", tmp_path / name], says) or case == "overlong"


@pytest.mark.parametrize("case", ACTIVATIONS | OF_THE_SAE)
def test_activations(case, refused, tmp_path, monkeypatch):
    """What can be said before the model is loaded is."""
    content, says = (ACTIVATIONS | OF_THE_SAE)[case]
    if case in ACTIVATIONS:
        monkeypatch.setattr("common.load", None)
    write(tmp_path / "activations_baseline.json", content)
    assert str(tmp_path / "activations_baseline.json") in refused("baseline_after_false", [], says)


@pytest.mark.parametrize("case", OF_THE_ROUND)
def test_files_of_another_round(case, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("common.load", None)
    name, content, says = OF_THE_ROUND[case]
    write(tmp_path / name, content)
    assert str(tmp_path / name) in refused("baseline", [], says)


def test_results_of_another_run_beside_its_journal(refused, tmp_path):
    """They make way only for the run whose journal is there: one that an interrupted --overwrite left."""
    write(tmp_path / "predictions_baseline.jsonl", json.dumps({"run": OTHER}) + "\n" + json.dumps(RECORD) + "\n")
    write(tmp_path / "results.json", json.dumps([ENTRY | {"run": OTHER}]))
    refused("baseline_after_false", [], "results.json: is of another run")


@pytest.mark.parametrize("case", TEMPLATES)
def test_templates(case, refused, tmp_path):
    content, says = TEMPLATES[case]
    write(tmp_path / "template.txt", content)
    refused("baseline", ["--prompt-template", tmp_path / "template.txt"], says)


@pytest.mark.parametrize("k", ["0%", "51%", "-1", "1.5", "ten", "", "50 %"])
def test_k(k, refused):
    refused("baseline_after_false", ["--k", "0", f"--k={k}"], "--k")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--ranking", "gradsae"], "activations_gradsae.json"),
        (["--ranking", "baseline", "gradsae"], "activations_gradsae.json"),
        (["--activations", "none.json"], "none.json"),
        (["--dtype", "float16"], "activations_baseline.json"),  # the file that ships is of another run
    ],
)
def test_no_activations(arguments, named, refused, tmp_path):
    line = refused("baseline_after_true", arguments, f"{named}: there is no such file: ")
    assert "run this first: python baseline.py --demo" in line and "--activations none.json" not in line
    assert named == "none.json" or str(tmp_path / named) in line


def test_rankings_of_different_questions(refused, tmp_path):
    write(tmp_path / "activations_baseline.json", activations())
    write(tmp_path / "activations_gradsae.json", activations({"ranking": "gradsae"}, id="questions-000-1"))
    arguments = ["--ranking", "baseline", "gradsae"]
    refused("baseline_after_false", arguments, "are of different unmasked answers (question questions-000-0)")


def test_output_folder_that_is_a_file(refused, tmp_path):
    write(tmp_path / "file", "")
    refused("baseline", ["--output-dir", tmp_path / "file"], "--output-dir")


def test_logits_that_are_not_finite(refused, tmp_path):
    """An SAE that overflows: the round stops with one line, and writes no answer."""
    from test_loading import save_sae

    save_sae(tmp_path / "sae", bias=float("inf"))
    refused("baseline", ["--sae-release", tmp_path / "sae", "--limit", "5"], "not finite")


def test_matched_with_an_sae_that_normalizes(refused, tmp_path):
    """What its latents remove is not known. Refused once the SAE is loaded."""
    from test_loading import save_sae

    save_sae(tmp_path / "sae")
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    config["normalize_activations"] = "constant_norm_rescale"
    write(tmp_path / "sae" / "cfg.json", json.dumps(config))
    says = "--ranking matched: what a latent of this SAE removes is not known"
    assert "constant_norm_rescale" in refused(
        "baseline", ["--sae-release", tmp_path / "sae", "--ranking", "matched"], says
    )


@pytest.mark.parametrize("fields", [{}, {"removed_topk": [0.5]}, {"target_topk": [0.5]}], ids=str)
def test_matched_to_nothing(fields, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("common.load", None)
    write(tmp_path / "activations_matched.json", activations({"ranking": "matched"}, **fields))
    says = "activations_matched.json: does not say what the baseline's latents remove: run this first: python"
    refused("baseline_after_false", ["--ranking", "matched"], says)


MEANS = {
    "not there": (
        None,
        "there is no such file: run this first: python baseline.py --demo --ablation mean --output",
    ),
    "no json": ("{", "is not JSON"),
    "a list": ("[]", "is damaged"),
    "no means": (json.dumps({"run": RUN}), "is damaged"),
    "run a number": (json.dumps({"run": 3, "means": [0.0] * 512}), "is damaged"),
    "texts": (json.dumps({"run": RUN, "means": ["a"] * 512}), "is damaged"),
    "not numbers": (json.dumps({"run": RUN, "means": [float("nan")] * 512}), "is damaged"),
    "beyond floats": (json.dumps({"run": RUN, "means": [10**400] * 512}), "is damaged"),
    "too few": (json.dumps({"run": RUN, "means": [0.0] * 511}), "is of another SAE"),
    "of another run": (json.dumps({"run": RUN | {"dtype": "float16"}, "means": [0.0] * 512}), 'dtype "float16"'),
}


@pytest.mark.parametrize("case", MEANS)
def test_means(case, refused, tmp_path):
    content, says = MEANS[case]
    for name in ("activations_baseline.json", "activations_baseline_mean.json"):  # as round 1 leaves them there
        shutil.copy(ROOT / "activations_baseline.json", tmp_path / name)
    if content is not None:
        write(tmp_path / "means.json", content)
    assert str(tmp_path / "means.json") in refused("baseline_after_false", ["--ablation", "mean"], says)
