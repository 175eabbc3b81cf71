"""Loading the real thing, as far as a machine without network can: real tables, real libraries, a Hub of our own."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, options, run_script

import common
from experiment import UserError, names


def test_default_options_resolve():
    chosen = common.parse_options([], "", masks=True)
    assert names.official_name(chosen.model) == "google/gemma-2-9b-it"
    assert chosen.sae_id in [sae["id"] for sae in names.sae_table()[chosen.sae_release]["saes"]]
    assert names.sae_table()[chosen.sae_release]["model"] == chosen.model
    assert (chosen.device, chosen.dtype, chosen.sae_dtype, chosen.k) == ("cuda", "float16", "float32", ("50%",))
    assert chosen.max_new_tokens == 50


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--sae-release", "gemma-scope-9b-it-res-canonicle"], "nearest: gemma-scope-9b-it-res-canonical"),
        (["--sae-id", "layer_9/width_131k/canon"], "nearest: layer_9/width_131k/canonical"),
        (
            ["--sae-release", "gemma-scope-2b-pt-transcoders", "--sae-id", "layer_0/width_16k/average_l0_76"],
            "transcoder",
        ),
        (["--sae-release", "gemma-scope-2-4b-it-res"], "holds 52 SAEs: give --sae-id"),
        (["--model", "google/gemma-3-4b-it"], "belongs to gemma-2-9b-it, not to google/gemma-3-4b-it"),
        (["--sae-release", "llama-3-8b-it-res-jh", "--model", "gemma-2-9b-it"], "belongs to meta-llama"),
        (["--demo", "--sae-release", "gemma-2b-it-res-jb"], "belongs to gemma-2b-it, not to demo/model"),
    ],
)
def test_names_that_do_not_belong_together(arguments, named):
    with pytest.raises(UserError, match=named):
        common.parse_options(arguments, "", masks=False)


def test_the_table_is_saelens_own():
    """Read from its file, without SAELens, it says what SAELens says, but for one release that it has wrong."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    theirs = get_pretrained_saes_directory()
    assert set(names.sae_table()) == set(theirs)
    for release, entry in names.sae_table().items():
        assert entry["model"] == theirs[release].model or release == "gemma-scope-9b-it-res"
        assert [sae["id"] for sae in entry["saes"]] == list(theirs[release].saes_map)


def test_the_release_says_the_model():
    chosen = common.parse_options(["--sae-release", "llama-3-8b-it-res-jh"], "", masks=False)
    assert (chosen.model, chosen.sae_id) == ("meta-llama/Meta-Llama-3-8B-Instruct", "blocks.25.hook_resid_post")
    assert (
        names.neuronpedia_page(chosen.sae_release, chosen.sae_id, 7)
        == "https://www.neuronpedia.org/llama3-8b-it/25-res-jh/7"
    )
    id_ = "layer_17_width_16k_l0_medium"
    chosen = common.parse_options(["--sae-release", "gemma-scope-2-4b-it-res", "--sae-id", id_], "", masks=True)
    assert chosen.model == "google/gemma-3-4b-it"
    for model in ("google/gemma-2-9b-it", "gemma-2-9b-it"):
        assert common.parse_options(["--model", model], "", masks=False).sae_release == common.DEFAULTS["sae_release"]


def test_every_release_that_is_listed_can_be_picked():
    """By --sae-release and --sae-id alone: the model is the release's, and a tuned one."""
    listed = [line.split()[0] for line in names.list_saes("").splitlines()[1:-2]]
    assert len(listed) > 30
    for release in listed:
        for sae_id in names.list_saes(release).splitlines()[::20]:
            chosen = common.parse_options(["--sae-release", release, "--sae-id", sae_id], "", masks=False)
            assert names.same_model(chosen.model, names.sae_table()[release]["model"]) and chosen.sae_id == sae_id
            assert "/" in names.official_name(chosen.model) and names.INSTRUCTION_TUNED.search(chosen.model)


def test_list_saes():
    """As a process: within seconds, without a download and without the libraries that take long to import."""
    start = time.perf_counter()
    command = [sys.executable, ROOT / "baseline.py", "--list-saes"]
    listed = subprocess.run([*command, "9b"], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 15
    assert listed.stdout.splitlines()[2].split() == [
        *("gemma-scope-9b-it-res-canonical", "gemma-2-9b-it", "6"), "9,", "20,", "31", "16k,", "131k"
    ]  # fmt: skip
    assert "layer_9/width_131k/canonical" in names.list_saes("gemma-scope-9b-it-res-canonical").splitlines()
    every = names.list_saes("")
    for family in ("gemma-scope-9b-it-res ", "gemma-3-27b-it", "Qwen2.5-7B-Instruct", "Llama-3.3-70B-Instruct"):
        assert family in every
    assert "transcoder" not in every and "gemma-2-2b " not in every


def test_base_models_are_named(tmp_path, demo):
    _, _, tokenizer = demo
    tuned = ("gemma-2-9b-it", "meta-llama/Meta-Llama-3-8B-Instruct", "Qwen/Qwen2.5-7B-Instruct", "nobody/a-chat-model")
    for model in tuned:
        assert names.INSTRUCTION_TUNED.search(model)
    for model in ("google/gemma-2-9b", "meta-llama/Meta-Llama-3-8B", "Qwen/Qwen2.5-7B", "nobody/bits"):
        assert not names.INSTRUCTION_TUNED.search(model)
    assert not common.seems_untuned(options(), tokenizer)


def test_wrong_model_name():
    with pytest.raises(UserError, match="nearest: .*gemma-2-9b-it"):
        names.official_name("gemma-2-9b-its")


def test_demo_model_is_loaded_as_the_real_one_would_be(demo):
    model, sae, tokenizer = demo
    assert type(model.original_model).__name__ == "Gemma2ForCausalLM"
    assert sae.cfg.architecture() == "jumprelu"
    config = model.original_model.generation_config
    assert set(config.eos_token_id) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")}
    assert not config.do_sample and config.repetition_penalty in (None, 1.0)
    assert tokenizer.tokenize("<start_of_turn>Result = [[")[0] == "<start_of_turn>"


# --- each error: exit code 2, one line that says what to do -----------------------------------------------------------

HUB = ["--device", "cpu", "--dtype", "float32"]
OWN = ["--sae-release", "demo/sae"]  # a folder, which belongs to whatever model it fits


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no CUDA device here: add --demo"),
        (["--device", "cuda", "--model", "gemma-2-9b-it"], "no CUDA device here: add --demo"),
        (["--demo", "--device", "cuda"], "no CUDA device"),
        (["--demo", "--device", "gpu"], "--device gpu"),
        (HUB, "gemma-2-9b-it: is gated: accept its licence"),
        ([*HUB, *OWN, "--model", "nobody/no-such-model"], "there is no such repository"),
        ([*HUB, *OWN, "--model", "nobody/bad-token"], "refused the token"),
        ([*HUB, *OWN, "--model", "nobody/unreachable"], "cannot be reached"),
        ([*HUB, "--model", "gemma-9b"], "not a model TransformerLens knows"),
        (["--demo", "--sae-release", "gemma-scope-9b-it-res-canonicle", "--sae-id", "x"], "nearest"),
        (["--demo", "--sae-release", "gemma-scope-9b-it-res-canonical", "--sae-id", "layer_9/x"], "not in release"),
        (["--demo", "--dataset", "nobody/no-such-data"], "nobody/no-such-data: there is no such repository"),
        (["--demo", "--dataset", "missing.jsonl"], "missing.jsonl: cannot be read"),
        (["--demo", "--token-file", "missing.txt"], "missing.txt"),
        (["--demo", "--prompt-template", "missing.txt"], "missing.txt"),
        (["--demo", "--prompt-template", "chatml"], "this model's tokenizer has no <|im_start|>"),
        (["--demo", "--limit", "0"], "--limit"),
        (["--demo", "--limit", "3", "--sample", "3"], "cannot be combined"),
        (["--demo", "--dtype", "int8"], "--dtype"),
        (["--demo", "--no-such-option"], "--no-such-option"),
    ],
)
def test_errors(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused(arguments, says, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("content", ["", "\n", "hf_your token", "hf_", "my-token-is-secret"])
def test_unusable_token_file(content, tmp_path, monkeypatch, capsys):
    (tmp_path / "token.txt").write_text(content)
    arguments = ["--demo", "--token-file", str(tmp_path / "token.txt")]
    assert_refused(arguments, "holds no Hugging Face token", tmp_path, monkeypatch, capsys)


def test_example_token_is_no_token(tmp_path, monkeypatch, capsys):
    arguments = ["--demo", "--token-file", str(ROOT / "token.txt.example")]
    assert_refused(arguments, "holds no Hugging Face token", tmp_path, monkeypatch, capsys)


def test_token_reaches_the_hub(tmp_path, monkeypatch, capsys, hub):
    monkeypatch.setenv("HF_TOKEN", "")
    (tmp_path / "token.txt").write_text("hf_abcdefghijkl\n")
    arguments = [*HUB, "--token-file", str(tmp_path / "token.txt")]
    assert_refused(arguments, "is gated", tmp_path, monkeypatch, capsys)
    assert hub.tokens[-1] == "Bearer hf_abcdefghijkl"
    assert os.environ["HF_TOKEN"] == "hf_abcdefghijkl"


def save_sae(folder, d_in=128, hook_name="blocks.1.hook_resid_post", transcoder=False, bias=0.0, model_name=None):
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, Transcoder, TranscoderConfig
    from sae_lens.saes.sae import SAEMetadata

    if transcoder:
        metadata = SAEMetadata(hook_name="blocks.1.ln2.hook_normalized", hook_name_out="blocks.1.hook_mlp_out")
        sae = Transcoder(
            TranscoderConfig(d_in=d_in, d_sae=32, d_out=d_in, apply_b_dec_to_input=False, metadata=metadata)
        )
    else:
        metadata = SAEMetadata(hook_name=hook_name, model_name=model_name)
        sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=32, metadata=metadata))
        sae.b_dec.data.fill_(bias)
    sae.save_model(folder)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ({"d_in": 64}, "reads 64 dimensions, but demo/model has 128"),
        ({"hook_name": "blocks.9.hook_resid_post"}, "blocks.9.hook_resid_post, but demo/model has 4 layers"),
        ({"hook_name": "hook_embed"}, "is for hook_embed, but only a layer's"),
        ({"hook_name": "blocks.1.hook_resid_mid"}, "is for blocks.1.hook_resid_mid, but only a layer's"),
        ({"model_name": "gemma-2-2b"}, "it is for gemma-2-2b, not for google/gemma-2-9b-it"),
        ({"transcoder": True}, "a transcoder"),
    ],
)
def test_saes_that_do_not_fit(made, says, tmp_path, monkeypatch, capsys):
    """Said from the configurations alone: before the model is asked for, or a Hub."""
    save_sae(tmp_path / "sae", **made)
    monkeypatch.setattr(common, "load", None)
    arguments = ["--demo", "--sae-release", str(tmp_path / "sae")]
    if "model_name" in made:
        arguments += ["--model", "google/gemma-2-9b-it"]
    assert_refused(arguments, says, tmp_path, monkeypatch, capsys)


def test_every_wrong_combination_shows_within_15_seconds(tmp_path):
    """In one process that can reach nothing, all of them: none waits for the libraries that take long to import."""
    save_sae(tmp_path / "narrow", d_in=64)
    save_sae(tmp_path / "deep", hook_name="blocks.9.hook_resid_post")
    save_sae(tmp_path / "transcoder", transcoder=True)
    save_sae(tmp_path / "gemma-2-2b", model_name="gemma-2-2b")
    (tmp_path / "template.txt").write_text("{context}")
    wrong = [
        ["--sae-release", "gemma-scope-9b-it-res-canonicle"],
        ["--sae-id", "layer_9/width_131k/canon"],
        ["--sae-release", "gemma-scope-2b-pt-transcoders"],
        ["--model", "google/gemma-3-4b-it"],
        ["--model", "gemma-9b"],
        ["--demo", "--sae-release", "gemma-2b-it-res-jb"],
        *(["--demo", "--sae-release", str(tmp_path / name)] for name in ("narrow", "deep", "transcoder", "none")),
        ["--device", "cpu", "--sae-release", str(tmp_path / "gemma-2-2b"), "--model", "gemma-2-9b-it"],
        ["--demo", "--prompt-template", "llama-3"],
        ["--demo", "--prompt-template", str(tmp_path / "template.txt")],
        ["--demo", "--dataset", "nobody.jsonl"],
        ["--demo", "--device", "nowhere"],
    ]
    script = (
        "import json, sys, common, baseline\n"
        "for sys.argv in json.loads(sys.argv[1]): print(common.guard(baseline.main))\n"
        "print(sorted({'transformer_lens', 'sae_lens', 'datasets'} & set(sys.modules)))"
    )
    start = time.perf_counter()
    found = subprocess.run(
        [sys.executable, "-c", script, json.dumps([["baseline.py", *arguments] for arguments in wrong])],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9"},
    )  # fmt: skip
    seconds = time.perf_counter() - start
    assert found.stdout.split() == ["2"] * len(wrong) + ["[]"], found
    assert len(found.stderr.splitlines()) == len(wrong) and seconds < 15, f"{seconds}\n{found.stderr}"


def test_an_old_sae_configuration(tmp_path):
    """Without an architecture, and with the hook under its older name, it is left to SAELens; its sizes are checked."""
    save_sae(tmp_path / "sae")
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    old = {"d_in": 128, "d_sae": 32, "dtype": "float32", "device": "cpu", "hook_point": config["metadata"]["hook_name"]}
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(old))
    chosen = options("--sae-release", tmp_path / "sae")
    common.check_local_sae(chosen)
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(old | {"d_in": 64}))
    with pytest.raises(UserError, match="reads 64 dimensions"):
        common.check_local_sae(chosen)


def test_device_map_and_a_launcher(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_refused(["--demo", "--device-map", "auto"], "without a launcher", tmp_path, monkeypatch, capsys)


def test_folder_without_an_sae(tmp_path, monkeypatch, capsys):
    (tmp_path / "sae").mkdir()
    assert_refused(["--demo", "--sae-release", str(tmp_path / "sae")], "sae", tmp_path, monkeypatch, capsys)


def test_folder_without_a_model(tmp_path, monkeypatch, capsys):
    (tmp_path / "model").mkdir()
    assert_refused(["--demo", "--model", str(tmp_path / "model")], "model", tmp_path, monkeypatch, capsys)


def assert_refused(arguments, says, tmp_path, monkeypatch, capsys):
    code, out, err = run_script("baseline", [*arguments, "--output-dir", tmp_path / "out"], monkeypatch, capsys)
    assert code == 2, err
    lines = [line for line in err.splitlines() if not line.startswith("Loading ")]
    assert len(lines) == 1 and says in lines[0], err
    assert lines[0].startswith("baseline.py: ")
    assert out == ""
    assert [p.name for p in (tmp_path / "out").glob("*")] in ([], [".lock"])


def test_options_of_the_demo():
    chosen = options("--device", "cuda", "--dtype", "float16", "--k", "10", masks=True)
    assert (chosen.model, chosen.device, chosen.dtype, chosen.k) == ("demo/model", "cuda", "float16", ("10",))
