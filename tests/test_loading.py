"""Loading the real thing, as far as a machine without network can: real libraries, a Hub of our own."""

import contextlib
import ctypes
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest
import sae_lens
import torch
import transformers
from conftest import ROOT, load, options, run_script
from sae_lens.saes.sae import SAEMetadata

import common
from experiment import UserError, guard, questions
from experiment.hub import hub_errors


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused(arguments, says): round 1 stops with exit code 2 and one line beside its news, and leaves no file."""

    def check(arguments, says, *news):
        out = tmp_path / "out"
        code, stdout, err = run_script("baseline", [*arguments, "--output-dir", out], monkeypatch, capsys)
        lines = [line for line in err.splitlines() if line and not line.startswith(("Loading ", *news))]
        assert (code, stdout, len(lines)) == (2, "", 1), err
        assert lines[0].startswith("baseline.py: ") and says in lines[0], err
        assert [path.name for path in out.glob("*")] in ([], [".lock"])

    return check


def test_demo_model_is_loaded_as_the_real_one_would_be(demo):
    model, tokenizer = demo
    assert type(model.lm).__name__ == "Gemma2ForCausalLM" and not model.lm.training
    assert model.splice.sae.cfg.architecture() == "jumprelu" and model.splice.sae.W_dec.dtype == torch.float32
    assert not any(p.requires_grad for p in (*model.lm.parameters(), *model.splice.sae.parameters()))
    config = model.lm.generation_config
    assert set(config.eos_token_id) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")}
    assert model.end_ids == set(config.eos_token_id) and model.pad_id == tokenizer.pad_token_id
    assert not config.do_sample and config.repetition_penalty in (None, 1.0)
    assert tokenizer.tokenize("<start_of_turn>Result = [[")[0] == "<start_of_turn>"


def test_what_ends_an_answer():
    """The model's own ids, the tokenizer's end of sequence, the end of turn: each counts, also where the others lack it
    (Llama 3's tokenizer ends at <|eot_id|>, its model has two ids more)."""
    model, tokenizer = load()
    eos, end_of_turn = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")
    for own, ends in (([7, eos], [eos, 7, end_of_turn]), (9, [eos, 9, end_of_turn]), (None, [eos, end_of_turn])):
        model.lm.generation_config.eos_token_id = own
        common.settle_model(model.model, tokenizer)
        assert model.lm.generation_config.eos_token_id == sorted(ends)


def test_base_models_are_named(tmp_path, capsys):
    """A folder's model by its chat template; the demo's has none, but was tuned."""
    shutil.copytree(ROOT / "demo" / "model", tmp_path / "base")
    shutil.copytree(ROOT / "demo" / "model", tmp_path / "tuned")
    (tmp_path / "tuned" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    for arguments, warning in (
        ([], ""),
        (["--model", tmp_path / "tuned"], ""),
        (["--model", tmp_path / "base"], f"Warning: {tmp_path / 'base'} looks like a base model"),
    ):
        common.prepare(options(*arguments))
        assert capsys.readouterr().err.partition(": such a model was not")[0] == warning


# ---------------------------------------------------------------------------------------------------------------------
# Each error: exit code 2, one line that says what to do

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
        (["--demo", "--dataset", "nobody/no-such-data"], "nobody/no-such-data: there is no such repository"),
        (["--demo", "--dataset", "missing.jsonl"], "missing.jsonl: cannot be read"),
        (["--demo", "--prompt-template", "missing.txt"], "missing.txt"),
        (["--demo", "--prompt-template", "chatml"], "this model's tokenizer has no <|im_start|>"),
        (["--demo", "--sae-release", "someone/saes", "--sae-id", "a"], "someone/saes a: there is no such repository"),
        # A few of test_options.py's: there it is the line that is tested, here that it comes alone.
        ([*HUB, "--model", "gemma-9b"], "not a model TransformerLens knows"),
        (["--demo", "--sae-release", "gemma-scope-9b-it-res-canonicle"], "nearest"),
        (["--demo", "--limit", "0"], "--limit"),
        (["--demo", "--no-such-option"], "--no-such-option"),
    ],
)
def test_errors(arguments, says, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(arguments, says)


@pytest.mark.parametrize("content", ["", "\n", "hf_your token", "hf_", "my-token-is-secret", None])
def test_unusable_token_file(content, refused, tmp_path):
    path = tmp_path / "token.txt" if content is not None else ROOT / "token.txt.example"
    if content is not None:
        path.write_text(content)
    refused(["--demo", "--token-file", path], "holds no Hugging Face token")


def test_token_reaches_the_hub(refused, tmp_path, monkeypatch, hub):
    monkeypatch.setenv("HF_TOKEN", "")
    (tmp_path / "token.txt").write_text("hf_abcdefghijkl\n")
    refused([*HUB, "--token-file", tmp_path / "token.txt"], "is gated")
    assert hub.tokens[-1] == "Bearer hf_abcdefghijkl"
    assert os.environ["HF_TOKEN"] == "hf_abcdefghijkl"


def test_nothing_slow_is_imported_for_a_mistake(tmp_path):
    """In one process that can reach nothing: what is wrong with options shows without PyTorch, what is wrong with
    template, questions or device without the libraries of model and SAE."""
    (tmp_path / "template.txt").write_text("{context}")
    mistakes = [
        ["--sae-release", "gemma-scope-9b-it-res-canonicle"],
        ["--sae-id", "layer_9/width_131k/canon"],
        ["--sae-release", "gemma-scope-2b-pt-transcoders"],
        ["--model", "google/gemma-3-4b-it"],
        ["--model", "gemma-9b"],
        ["--demo", "--sae-release", "gemma-2b-it-res-jb"],
        ["--limit", "0"],
    ]
    later = [
        ["--demo", "--prompt-template", "llama-3"],
        ["--demo", "--prompt-template", str(tmp_path / "template.txt")],
        ["--demo", "--dataset", "nobody.jsonl"],
        ["--demo", "--device", "nowhere"],
    ]
    code = """
import json, sys, baseline
from experiment import guard
for arguments in json.loads(sys.argv[1]):
    for options in arguments:
        sys.argv = ["baseline.py", *options, "--output-dir", "out"]
        print(guard(baseline.main))
    print(*[name for name in ("torch", "transformer_lens", "sae_lens", "datasets", "pandas") if name in sys.modules])
"""
    found = subprocess.run(
        [sys.executable, "-c", code, json.dumps([mistakes, later])],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    lines = found.stdout.splitlines()
    assert lines == ["2"] * len(mistakes) + [""] + ["2"] * len(later) + ["torch"], found
    assert len(found.stderr.splitlines()) == len(mistakes) + len(later) and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# SAEs


def save_sae(folder, d_in=128, hook_name="blocks.1.hook_resid_post", transcoder=False, bias=0.0, model_name=None):
    sizes = {"d_in": d_in, "d_sae": 32}
    if transcoder:
        metadata = SAEMetadata(hook_name="blocks.1.ln2.hook_normalized", hook_name_out="blocks.1.hook_mlp_out")
        config = sae_lens.TranscoderConfig(**sizes, d_out=d_in, apply_b_dec_to_input=False, metadata=metadata)
        sae = sae_lens.Transcoder(config)
    else:
        metadata = SAEMetadata(hook_name=hook_name, model_name=model_name)
        sae = sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(**sizes, metadata=metadata))
        sae.b_dec.data.fill_(bias)
    sae.save_model(folder)


MISFITS = {
    "narrow": ({"d_in": 64}, "reads 64 dimensions, but demo/model has 128"),
    "heads": ({"d_in": 64, "hook_name": "blocks.1.attn.hook_z"}, "reads 64 dimensions, but demo/model has 128"),
    "deep": ({"hook_name": "blocks.4.hook_resid_post"}, "blocks.4.hook_resid_post, but demo/model has 4 layers"),
    "embedding": ({"hook_name": "hook_embed"}, "is for hook_embed, but only a layer's"),
    "in between": ({"hook_name": "blocks.1.hook_resid_mid"}, "is for blocks.1.hook_resid_mid, but only a layer's"),
    "transcoder": ({"transcoder": True}, "a transcoder"),
    "another model's": ({"model_name": "gemma-2-2b"}, "it is for gemma-2-2b, not for google/gemma-2-9b-it"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_saes_that_do_not_fit(case, refused, tmp_path, monkeypatch, hub):
    """Said before the model's weights are loaded or asked for; the model's name needs no Hub at all."""
    made, says = MISFITS[case]
    save_sae(tmp_path / "sae", **made)
    tokenizer, asked = common.load_tokenizer(options()), len(hub.tokens)
    monkeypatch.setattr(common, "load_tokenizer", lambda _: tokenizer)  # gemma-2-9b-it's would have to be there
    monkeypatch.setattr(common, "find_context_length", lambda _: 512)  # and so would its configuration
    monkeypatch.setattr(common, "load_model", None)
    arguments = ["--demo", "--sae-release", tmp_path / "sae"]
    if "model_name" in made:
        arguments += ["--model", "google/gemma-2-9b-it"]
    refused(arguments, says)
    assert len(hub.tokens) == asked


def test_an_sae_of_a_folder_counts_as_the_folders(tmp_path, monkeypatch):
    """Whatever model its configuration names: a folder may hold that very model."""
    save_sae(tmp_path / "sae", model_name="gemma-2-2b")
    model, _ = load("--sae-release", tmp_path / "sae")
    assert model.hook_name == "blocks.1.hook_resid_post" and model.splice.d_sae == 32


def test_an_old_sae_configuration(tmp_path):
    """Without an architecture, and with the hook under its older name, it is SAELens that reads it; its sizes are
    checked as any other's."""
    old = {"dtype": "float32", "device": "cpu", "hook_point": "blocks.1.hook_resid_post", "d_sae": 32}
    for d_in in (128, 64):
        sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=d_in, d_sae=32)).save_model(tmp_path / "sae")
        (tmp_path / "sae" / "cfg.json").write_text(json.dumps(old | {"d_in": d_in}))
        chosen = options("--sae-release", tmp_path / "sae")
        sae = common.load_sae(chosen)
        assert (sae.cfg.d_in, sae.cfg.metadata.hook_name) == (d_in, old["hook_point"])
        with contextlib.nullcontext() if d_in == 128 else pytest.raises(UserError, match="reads 64 dimensions"):
            common.check_fit(chosen, sae)


# ---------------------------------------------------------------------------------------------------------------------
# What is damaged, and what is our own fault


def copy_without(name, folder, **files):
    """A copy of a folder of the demo with files replaced, or left out (None); returns its path."""
    shutil.copytree(ROOT / "demo" / name, folder)
    for file, content in files.items():
        path = next(path for path in folder.iterdir() if path.name.replace(".", "_") == file)
        path.unlink() if content is None else path.write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("option", "files", "says"),
    [
        ("model", {}, ""),  # an empty folder
        ("model", {"config_json": b"{"}, "config.json' is not a valid JSON file"),
        ("model", {"config_json": b'{"model_type": "foo"}'}, "model type `foo`"),
        ("model", {"tokenizer_json": b"{"}, ""),
        ("model", {"model_safetensors": None}, "no file named model.safetensors"),
        ("model", {"model_safetensors": b"nonsense"}, "deserializing header"),
        ("sae", {}, "cfg.json"),
        ("sae", {"cfg_json": b"{"}, ""),
        ("sae", {"cfg_json": b"{}"}, "SAELens cannot read it"),
        ("sae", {"cfg_json": b"[]"}, "SAELens cannot read it"),
        ("sae", {"sae_weights_safetensors": None}, "No such file"),
        ("sae", {"sae_weights_safetensors": b"nonsense"}, "deserializing header"),
    ],
)
def test_damaged_folders(option, files, says, refused, tmp_path):
    folder = tmp_path / option
    copy_without(option, folder, **files) if files else folder.mkdir()
    arguments = ["--model", folder] if option == "model" else ["--sae-release", folder]
    refused(["--demo", *arguments], says, f"Warning: {folder} looks like a base model")


@pytest.mark.parametrize("name", ["train.json", "train.parquet"])
def test_a_folder_of_damaged_questions(name, refused, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(b"nonsense")
    arguments = ["--demo", "--dataset", tmp_path / "data", "--split", "train"]
    refused(arguments, f"{tmp_path / 'data'}: ", "Generating ", "Failed to ")


@pytest.mark.parametrize("error", ["ValueError('ours')", "OSError('ours')", "int('ours')", "KeyError('ours')"])
def test_a_bug_of_ours_is_a_traceback(error, tmp_path, monkeypatch):
    """Also where libraries are asked for files: no line about the Hub hides it."""
    scope = {}
    code = f"def load(*_):\n    error = {error}\n    raise error"
    exec(compile(code, ROOT / "experiment" / "questions.py", "exec"), scope)
    monkeypatch.setattr(questions, "load", scope["load"])
    monkeypatch.setattr(sys, "argv", ["baseline.py", "--demo", "--output-dir", str(tmp_path)])
    import baseline

    with pytest.raises((ValueError, OSError, KeyError), match="ours"):
        guard(baseline.main)


def test_an_error_of_a_library_is_a_line():
    for error in (ValueError, OSError, RuntimeError):
        scope = {"error": error}
        exec(compile("def load(): raise error('first\\nsecond')", "/lib/site-packages/library.py", "exec"), scope)
        with pytest.raises(UserError, match="^name: first$"), hub_errors("name"):
            scope["load"]()
    for error in (TypeError, UserError, KeyboardInterrupt):
        with pytest.raises(error, match="^as it is$"), hub_errors("name"):
            raise error("as it is")


# ---------------------------------------------------------------------------------------------------------------------
# Where it is loaded to, and what it keeps


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["--device", "cpu"], {"": "cpu"}), (["--device-map", "auto"], "auto")],
)
def test_weights_go_straight_to_where_they_belong(arguments, expected, monkeypatch):
    asked, real = [], transformers.PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls, *args, **named):
        asked.append((named.get("device_map"), named.get("dtype", named.get("torch_dtype"))))
        return real(cls, *args, **named)

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
    load(*arguments, "--dtype", "bfloat16")
    assert asked == [(expected, torch.bfloat16)]


def measure_peak(work):
    """The bytes that work() takes at its peak in a process of its own, beyond what that has when it begins.

    Counted is all that is resident, pages of mapped files included (VmHWM); not what the C library keeps of what was
    freed: a tenth of a model of 500 MB, and nothing of tensors of more than 32 MB.
    """

    def read(name):
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    from_child, to_parent = os.pipe()
    child = os.fork()
    if not child:
        try:
            signal.alarm(120)
            torch.set_num_threads(1)  # the others do not survive a fork
            libc = ctypes.CDLL(None)
            libc.malloc_trim(0)  # what earlier tests left is not to be used
            libc.mallopt(-3, 2**17)  # M_MMAP_THRESHOLD: what is freed goes back at once
            pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
            before, kept = read("VmRSS"), work()
            os.write(to_parent, str(read("VmHWM") - before).encode())
            del kept
        finally:
            os._exit(1)
    os.close(to_parent)
    with open(from_child) as file:
        found = file.read()
    os.waitpid(child, 0)
    return int(found)


def test_host_memory(tmp_path):
    """On the CPU, loading takes at most 1.2 times the model's size, also where the weights are converted."""
    config = transformers.Gemma2Config(
        vocab_size=1024, hidden_size=1024, intermediate_size=3072, num_hidden_layers=18, num_attention_heads=8,
        num_key_value_heads=8, head_dim=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.Gemma2ForCausalLM(config)
    model.half().to_empty(device="cpu").save_pretrained(tmp_path / "model", max_shard_size="200MB")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    del model
    tokenizer = common.load_tokenizer(options())
    tokenizer.save_pretrained(tmp_path / "model")
    assert 450e6 < size < 550e6
    load()  # so that all modules are imported
    for dtype in ("bfloat16", "float16"):
        chosen = options("--model", tmp_path / "model", "--dtype", dtype)
        peak = measure_peak(lambda chosen=chosen: common.load_model(chosen, tokenizer)) / size
        print(f"{dtype}, stored as float16, {size / 1e6:.0f} MB: peak {peak:.3f} times that")
        assert 0.95 < peak < 1.2
    shutil.rmtree(tmp_path / "model")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (None, "expandable_segments:True")),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, (None, "max_split_size_mb:64")),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, ("max_split_size_mb:64", None)),
    ],
)
def test_memory_of_a_gpu_grows_in_place(given, expected):
    """Unless its user wants something else; said before PyTorch, which reads it as it is imported."""
    code = """
import os, sys
from experiment import guard
def main():
    print("torch" in sys.modules, os.environ.get("PYTORCH_ALLOC_CONF"), os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
guard(main)
"""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    environment = {name: value for name, value in os.environ.items() if name not in names} | given
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert found.stdout.split() == ["False", *map(str, expected)], found


def test_no_pass_keeps_attention_matrices(tmp_path, monkeypatch, capsys):
    """TransformerLens asks for those of all layers: of gemma-2-9b-it 44 MB a token of a batch's width."""
    language_model = transformers.models.gemma2.modeling_gemma2.Gemma2ForCausalLM
    forward, seen = language_model.forward, []

    def watched(self, *arguments, **named):
        assert not self.config.output_attentions and not self.config.get_text_config().output_attentions
        assert not named.get("output_attentions")
        out = forward(self, *arguments, **named)
        seen.append((out.attentions, out.hidden_states))
        return out

    monkeypatch.setattr(language_model, "forward", watched)
    arguments = ["--demo", "--limit", "8", "--output-dir", tmp_path, "--ranking", "baseline", "gradsae"]
    for script, passes in (("baseline", 10), ("baseline_after_false", 3)):
        del seen[:]
        code, _, err = run_script(script, arguments, monkeypatch, capsys)
        assert code == 0, err
        assert len(seen) >= passes and set(seen) == {(None, None)}
