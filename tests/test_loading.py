"""Loading the real thing, as far as a machine without network can: real libraries, a Hub of our own."""

import contextlib
import ctypes
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest
import sae_lens
import safetensors.torch
import torch
import transformers
from conftest import ROOT, load, options, run_script
from sae_lens.saes.sae import SAEMetadata
from transformers.models.gemma2 import modeling_gemma2

import common
from experiment import UserError, catalogue, guard, questions, saes
from experiment import hub as hub_module
from experiment import options as command_line
from experiment.hub import hub_errors, prepare_libraries


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
    attend = modeling_gemma2.eager_attention_forward
    assert attend.__module__ == modeling_gemma2.__name__  # not TransformerLens' own, with its hooks around it


def test_what_ends_an_answer():
    """The model's own ids, the tokenizer's end of sequence, the end of turn: each counts, also where the others lack it
    (Llama 3's tokenizer ends at <|eot_id|>, its model has two ids more)."""
    model, tokenizer = load()
    eos, end_of_turn = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")
    for own, ends in (([7, eos], [eos, 7, end_of_turn]), (9, [eos, 9, end_of_turn]), (None, [eos, end_of_turn])):
        model.lm.generation_config.eos_token_id = own
        common.configure_generation(model.lm, tokenizer)
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
        (["--demo", "--sae-release", "someone/unreachable", "--sae-id", "a"], "cannot be reached"),
        (
            ["--demo", "--sae-release", "someone/no-entry", "--sae-id", "a"],
            "someone/no-entry a: no SAE, for the repository has no a/cfg.json: cfg.json with sae_weights.safetensors",
        ),
        (["--demo", "--sae-release", ROOT / "demo", "--sae-id", "x"], "no such folder in"),
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


def test_the_demo_needs_no_token(refused, tmp_path, monkeypatch):
    """A token.txt that is not filled in stops everything but the demo. One that is filled in is used there too."""
    monkeypatch.setenv("HF_TOKEN", "")
    for module in (hub_module, command_line):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "token.txt").write_text("your token here")
    demo, other = ["--model", ROOT / "demo" / "model", "--sae-release", ROOT / "demo" / "sae"], ["--device", "cpu"]
    prepare_libraries(options(*demo))
    assert not os.environ["HF_TOKEN"]
    with pytest.raises(UserError, match="token.txt: holds no Hugging Face token"):
        prepare_libraries(command_line.parse([*map(str, demo), *other], "", masks=None))
    (tmp_path / "token.txt").write_text("hf_abcdefghijkl")
    prepare_libraries(options(*demo))
    assert os.environ["HF_TOKEN"] == "hf_abcdefghijkl"


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
import json, runpy, sys
for arguments in json.loads(sys.argv[1]):
    for options in arguments:
        sys.argv = [sys.argv[0], *options, "--output-dir", "out"]
        try:
            runpy.run_path(SCRIPT, run_name="__main__")
        except SystemExit as end:
            print(end.code)
    print(*[name for name in ("torch", "transformer_lens", "sae_lens", "datasets", "pandas") if name in sys.modules])
""".replace("SCRIPT", repr(str(ROOT / "baseline.py")))
    found = subprocess.run(
        [sys.executable, "-c", code, json.dumps([mistakes, later])],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    lines = found.stdout.splitlines()
    assert lines == ["2"] * len(mistakes) + [""] + ["2"] * len(later) + ["torch"], found
    assert len(found.stderr.splitlines()) == len(mistakes) + len(later) and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# SAEs


def save_sae(
    folder, d_in=128, hook_name="blocks.1.hook_resid_post", transcoder=False, bias=0.0, model_name=None, centred=False
):
    sizes = {"d_in": d_in, "d_sae": 32}
    if transcoder:
        metadata = SAEMetadata(hook_name="blocks.1.ln2.hook_normalized", hook_name_out="blocks.1.hook_mlp_out")
        config = sae_lens.TranscoderConfig(**sizes, d_out=d_in, apply_b_dec_to_input=False, metadata=metadata)
        sae = sae_lens.Transcoder(config)
    else:
        metadata = SAEMetadata(hook_name=hook_name, model_name=model_name)
        if centred:
            metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
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
    "centred": ({"centred": True}, "was trained on a model whose writing weights were centred"),
    "another model's": ({"model_name": "gemma-2-2b"}, "it is for gemma-2-2b, not for google/gemma-2-9b-it"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_saes_that_do_not_fit(case, refused, tmp_path, monkeypatch, hub):
    """Said before the model's weights are loaded or asked for; the model's name needs no Hub at all."""
    made, says = MISFITS[case]
    save_sae(tmp_path / "sae", **made)
    tokenizer, asked = common.load_tokenizer(options()), len(hub.tokens)
    monkeypatch.setattr(common, "load_tokenizer", lambda _: tokenizer)  # gemma-2-9b-it's would have to be there
    monkeypatch.setattr(hub_module, "find_context_length", lambda _: 512)  # and so would its configuration
    monkeypatch.setattr(common, "load_model", None)
    monkeypatch.setattr(common, "load_sae", None)
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
        config, sae = saes.read_config(chosen), common.load_sae(chosen)
        for found in (config, sae.cfg):
            assert (found.d_in, found.metadata.hook_name) == (d_in, old["hook_point"])
        with contextlib.nullcontext() if d_in == 128 else pytest.raises(UserError, match="reads 64 dimensions"):
            hub_module.check_fit(chosen, config)


def test_the_default_saes_configuration(hub):
    """Known without a download, as that of every SAE of Gemma Scope: what does not fit costs nothing."""
    asked = len(hub.tokens)
    config = saes.read_config(command_line.parse([], "", masks=None))
    assert (config.d_in, config.d_sae, config.architecture()) == (3584, 131072, "jumprelu")
    metadata = config.metadata
    assert (metadata.hook_name, metadata.model_name) == ("blocks.9.hook_resid_post", "gemma-2-9b-it")
    chosen = ["--sae-release", "gemma-scope-2b-pt-res", "--sae-id", "embedding/width_4k/average_l0_6"]
    with pytest.raises(UserError, match="is for hook_embed, but only a layer's"):
        saes.read_config(command_line.parse(chosen, "", masks=None))
    assert len(hub.tokens) == asked


def make_cached(repository, folder, monkeypatch):
    """The folder of the Hub's cache that holds a repository's files, as where they were downloaded and the Hub cannot
    be reached any more."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cached = folder / f"models--{repository.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    return cached / "snapshots" / ("0" * 40)


def test_a_release_of_centred_weights(tmp_path, monkeypatch):
    """That is not in the SAE's own file, but in SAELens' table."""
    release, sae_id = "gpt2-small-res-jb", "blocks.7.hook_resid_pre"
    folder = make_cached(catalogue.sae_table()[release]["repo_id"], tmp_path, monkeypatch) / sae_id
    folder.mkdir(parents=True)
    old = {"dtype": "float32", "hook_point": sae_id, "d_in": 768, "d_sae": 24576, "model_name": "gpt2-small"}
    (folder / "cfg.json").write_text(json.dumps(old))
    chosen = command_line.parse(["--sae-release", release, "--sae-id", sae_id], "", masks=None)
    with pytest.raises(
        UserError, match=f"{release} {sae_id}: was trained on a model whose writing weights were centred"
    ):
        saes.read_config(chosen)


def test_temporal_saes(refused, tmp_path, monkeypatch):
    """They encode a position with those before it in view; a mask here is of one position's latents."""
    monkeypatch.setattr(common, "load_sae", None)
    save_sae(tmp_path / "sae")
    file = tmp_path / "sae" / "cfg.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architecture": "temporal"}))
    refused(["--demo", "--sae-release", tmp_path / "sae"], f"{tmp_path / 'sae'}: a temporal SAE, which encodes")


FORMATS = "cfg.json with sae_weights.safetensors (SAELens) or sae.safetensors (sparsify) would make it one"


def test_folders_that_are_no_sae(refused, tmp_path):
    """The line says which files would make it one, and where there are SAEs further in, or names in SAELens' table."""
    release, place = tmp_path / "saes", "layer_9/width_131k/average_l0_121"
    (release / "empty").mkdir(parents=True)
    refused(
        ["--demo", "--sae-release", release],
        f"{release}: no SAE that SAELens can read, for it has no cfg.json: {FORMATS}",
    )
    save_sae(release / "b" / "c")
    save_sae(release / "a")
    for given in ([], ["--sae-id", "x"], ["--sae-id", "empty"]):
        refused(["--demo", "--sae-release", release, *given], "(--sae-id may be a, b/c)")
    (release / place).mkdir(parents=True)
    (release / place / "params.npz").touch()
    says = "but Gemma Scope's own download: give --sae-release gemma-scope-9b-it-res --sae-id "
    says += f"{place} or --sae-release gemma-scope-9b-it-res-canonical --sae-id layer_9/width_131k/canonical instead"
    refused(["--demo", "--sae-release", release, "--sae-id", place], says)
    refused(["--demo", "--sae-release", release / place], says)
    (release / "empty" / "params.npz").touch()
    refused(["--demo", "--sae-release", release / "empty"], "a release's name (--list-saes gemma-scope) instead")
    second = tmp_path / "gemma-scope-2-4b-it" / "resid_post" / "layer_17_width_16k_l0_medium"
    second.mkdir(parents=True)
    (second / "params.safetensors").touch()
    says = f"give --sae-release gemma-scope-2-4b-it-res --sae-id {second.name} instead of the folder"
    refused(["--demo", "--sae-release", second], says)


def save_sparsify(folder, d_in=128, d_sae=256, **settings):
    """An SAE as sparsify's save_to_disk writes it; returns its tensors."""
    torch.manual_seed(5)
    shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    tensors = {name: torch.randn(shape) / d_in**0.5 for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    safetensors.torch.save_file(tensors, folder / "sae.safetensors")
    config = {"activation": "topk", "expansion_factor": d_sae // d_in, "normalize_decoder": True, "num_latents": 0}
    config |= {"k": 8, "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": d_in}
    (folder / "cfg.json").write_text(json.dumps(config | settings))
    return tensors


def encode_by_sparsify(tensors, x, k=8):
    """What sparsify's SparseCoder does: b_dec is taken away first, whatever is set, then relu, then the k largest."""
    pre = torch.relu((x - tensors["b_dec"]) @ tensors["encoder.weight"].T + tensors["encoder.bias"])
    values, ids = pre.topk(k)
    return torch.zeros_like(pre).scatter(-1, ids, values)


@pytest.mark.parametrize("where", ["folder", "id", "hub"])
@pytest.mark.parametrize("settings", [{}, {"num_latents": 256, "normalize_decoder": False}], ids=["factor", "latents"])
def test_saes_of_sparsify(where, settings, tmp_path, monkeypatch, capsys):
    """Latents and reconstruction are sparsify's, from a folder or a repository on the Hub (here from its cache, as
    where the Hub cannot be reached), and round 1 runs with it."""
    release, given = tmp_path / "saes", ["--sae-id", "layers.1"]
    if where == "hub":
        release = make_cached("someone/saes", tmp_path, monkeypatch)
    tensors = save_sparsify(release / "layers.1", **settings)
    if where == "folder":
        release, given = release / "layers.1", []
    arguments = ["--sae-release", "someone/saes" if where == "hub" else release, *given]
    model, _ = load(*arguments)
    sae, x = model.splice.sae, torch.randn(7, 128)
    assert (model.hook_name, sae.cfg.d_sae, sae.cfg.architecture()) == ("blocks.1.hook_resid_post", 256, "topk")
    acts = encode_by_sparsify(tensors, x)
    torch.testing.assert_close(sae.encode(x), acts)
    torch.testing.assert_close(sae.decode(acts), acts @ tensors["W_dec"] + tensors["b_dec"])
    assert model.splice.bias is not None  # decoded from entries, as other SAEs are
    if where == "id":
        arguments = ["--demo", "--limit", "4", *arguments, "--output-dir", tmp_path / "out"]
        code, _, err = run_script("baseline", arguments, monkeypatch, capsys)
        assert code == 0, err


SPARSIFY = {
    "mlp": ("layers.1.mlp", {}, "is for what layers.1.mlp gives, but demo/model norms that before it is added"),
    "attention": ("layers.1.self_attn", {}, "is for what layers.1.self_attn gives, but demo/model norms that"),
    "too deep": ("layers.7", {}, "is for blocks.7.hook_resid_post, but demo/model has 4 layers"),
    "embedding": ("embed_tokens", {}, "in the name of its folder alone: layers.N, layers.N.mlp or layers.N.self_attn"),
    "a name of one's own": ("mine", {}, "in the name of its folder alone"),
    "transcoder": ("layers.1.mlp", {"transcode": True}, "sparsify's transcode"),
    "skip": ("layers.1", {"skip_connection": True}, "sparsify's skip_connection"),
    "groupmax": ("layers.1", {"activation": "groupmax"}, "sparsify's activation groupmax"),
}


def test_the_model_that_sparsify_names(tmp_path):
    """In the file beside the folder, as its training writes it."""
    save_sparsify(tmp_path / "layers.1")
    (tmp_path / "config.json").write_text(json.dumps({"model": "meta-llama/Meta-Llama-3-8B-Instruct"}))
    chosen = options("--model", "gemma-2b-it", "--sae-release", tmp_path / "layers.1")
    with pytest.raises(UserError, match="is for meta-llama/Meta-Llama-3-8B-Instruct, not for gemma-2b-it"):
        hub_module.check_fit(chosen, saes.read_config(chosen))


@pytest.mark.parametrize("case", SPARSIFY)
def test_saes_of_sparsify_that_do_not_fit(case, refused, tmp_path, monkeypatch):
    name, settings, says = SPARSIFY[case]
    monkeypatch.setattr(common, "load_sae", None)
    save_sparsify(tmp_path / name, **settings)
    refused(["--demo", "--sae-release", tmp_path / name], says)


def test_places_of_sparsify(tmp_path):
    """A folder is named after the module whose output its SAE is for."""
    places = {"layers.3": "hook_resid_post", "layers.3.mlp": "hook_mlp_out"}
    places |= {"layers.3.self_attn": "hook_attn_out", "layers.3.attention": "hook_attn_out"}
    for name, place in places.items():
        save_sparsify(tmp_path / name)
        assert saes.read_config(options("--sae-release", tmp_path / name)).metadata.hook_name == f"blocks.3.{place}"


# ---------------------------------------------------------------------------------------------------------------------
# Models that cannot be run here: said by their configuration, without any weights


SIZES = dict(hidden_size=128, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
HEADS = SIZES | dict(head_dim=32)
QUANTISED = {"quant_method": "bitsandbytes", "load_in_4bit": True}
UNFIT = {
    "GPT-2": (transformers.GPT2Config(n_embd=128, n_layer=4, n_head=4), "its GPT2Model has no list of layers"),
    "Bloom": (transformers.BloomConfig(hidden_size=128, n_layer=4, n_head=4), "its BloomModel has no list of layers"),
    "Llama 4": (transformers.Llama4TextConfig(**HEADS), "its Llama4ForCausalLM has no list of layers"),
    "Qwen 3.5": (
        transformers.Qwen3_5TextConfig(**HEADS),
        "some of its layers keep a state in place of keys and values",
    ),
    "Mamba": (
        transformers.MambaConfig(hidden_size=128, num_hidden_layers=4),
        "keep a state in place of keys and values",
    ),
    "Gemma 4": (
        transformers.Gemma4TextConfig(**HEADS, global_head_dim=64),
        "its attention heads are of several sizes (32, 64)",
    ),
    "Gemma 3n": (transformers.Gemma3nTextConfig(**SIZES), "some of its layers use the keys and values of others"),
    "T5": (transformers.T5Config(d_model=128, num_layers=4), "it has an encoder beside its decoder"),
    "quantised": (
        transformers.Gemma2Config(**HEADS, quantization_config=QUANTISED),
        "its weights are quantised (bitsandbytes): give them in float16, bfloat16 or float32",
    ),
    "unknown to TransformerLens": (
        transformers.CTRLConfig(n_embd=128, n_layer=4, n_head=4),
        "model: TransformerLens knows no model of its kind (ctrl)",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_models_that_cannot_be_run(case, refused, tmp_path, monkeypatch):
    """A folder with the configuration and a tokenizer, and no weights: what is missing is not even looked for."""
    config, says = UNFIT[case]
    copy_without("model", tmp_path / "model", model_safetensors=None)
    config.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(common, "load_sae", None)
    arguments = ["--demo", "--model", tmp_path / "model"]
    refused(arguments, says, f"Warning: {tmp_path / 'model'} looks like a base model")


PLAIN = SIZES | dict(pad_token_id=0)
FIT = {  # families whose masked answers were found equal to those of hooks on Transformers' own modules
    "Gemma": transformers.GemmaConfig(**HEADS),
    "Gemma 2": transformers.Gemma2Config(**HEADS),
    "Gemma 3": transformers.Gemma3TextConfig(**HEADS, architectures=["Gemma3ForCausalLM"]),
    "Llama": transformers.LlamaConfig(**PLAIN),
    "Mistral": transformers.MistralConfig(**PLAIN),
    "Mixtral": transformers.MixtralConfig(**PLAIN),
    "Phi": transformers.PhiConfig(**PLAIN),
    "Phi 3": transformers.Phi3Config(**PLAIN),
    "Qwen 2": transformers.Qwen2Config(**PLAIN),
    "Qwen 3": transformers.Qwen3Config(**HEADS),
    "Qwen 3 MoE": transformers.Qwen3MoeConfig(**HEADS, architectures=["Qwen3MoeForCausalLM"]),
    "GPT-OSS": transformers.GptOssConfig(**HEADS, architectures=["GptOssForCausalLM"]),
    "OLMo 2": transformers.Olmo2Config(**PLAIN, architectures=["Olmo2ForCausalLM"]),
    "SmolLM 3": transformers.SmolLM3Config(**PLAIN),
    "Granite": transformers.GraniteConfig(**PLAIN, architectures=["GraniteForCausalLM"]),
    "GPT-NeoX": transformers.GPTNeoXConfig(
        hidden_size=128, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4
    ),
    "OPT": transformers.OPTConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, ffn_dim=64),
}


@pytest.mark.parametrize("family", FIT)
def test_models_that_can_be_run(family, tmp_path):
    """Nothing of what is looked for in the others stands in the way of these."""
    FIT[family].save_pretrained(tmp_path)
    chosen = options("--model", tmp_path)
    hub_module.check_fit(chosen, saes.read_config(chosen))


def test_a_package_that_only_this_model_needs(refused, tmp_path):
    """What Transformers says of it is several lines long: all of them are told."""
    if importlib.util.find_spec("timm"):
        pytest.skip("timm is installed here")
    copy_without("model", tmp_path / "model", config_json=b'{"model_type": "timm_wrapper"}')
    says = f"{tmp_path / 'model'}: TimmWrapperConfig requires the timm library but it was not found in your environment"
    refused(["--demo", "--model", tmp_path / "model"], says, f"Warning: {tmp_path / 'model'} looks like a base model")


@pytest.mark.parametrize("template", ["auto", "gemma", "own"])
@pytest.mark.parametrize("model_type", ["gemma2", "gpt2", "qwen2", "llama", "gpt_neox"])
def test_no_tokenizer_files(model_type, template, refused, tmp_path):
    """Some families' tokenizers are made of special tokens alone then: a round went on, on <unk>."""
    (tmp_path / "own").write_text("{context} {question}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": model_type}))
    template = tmp_path / "own" if template == "own" else template
    arguments = ["--demo", "--model", tmp_path / "model", "--prompt-template", template]
    refused(arguments, f"{tmp_path / 'model'}: has no tokenizer files that can be read: it needs tokenizer.json")


OWN_CODE = {  # what changes in which file. Transformers has a configuration of vit's, but no tokenizer and no text.
    "config": {"config.json": {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}},
    "model": {
        "config.json": {
            "model_type": "vit",
            "architectures": ["LlamaForCausalLM"],
            "auto_map": {"AutoModelForCausalLM": "own.Model"},
        }
    },
    "tokenizer": {
        "config.json": {"model_type": "vit"},
        "tokenizer_config.json": {
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": [None, "own.Tokenizer"]},
        },
    },
}


@pytest.mark.parametrize("of", OWN_CODE)
def test_code_of_a_model_is_never_run(of, refused, tmp_path, monkeypatch):
    """Nor asked about, whatever the answer would be."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    copy_without("model", tmp_path / "model")
    (tmp_path / "model" / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from transformers import Gemma2Config as Config, Gemma2ForCausalLM as Model\n"
        "from transformers import PreTrainedTokenizerFast as Tokenizer\n"
    )
    for file, changes in OWN_CODE[of].items():
        path = tmp_path / "model" / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    says = f"{tmp_path / 'model'}: needs Python code of its own to be loaded"
    news = f"Warning: {tmp_path / 'model'} looks like a base model"
    refused(["--demo", "--model", tmp_path / "model"], says, news)
    assert not (tmp_path / "ran").exists()


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
        ("model", {"tokenizer_json": None}, "has no tokenizer files that can be read: it needs tokenizer.json"),
        ("model", {"model_safetensors": None}, "no file named model.safetensors"),
        ("model", {"model_safetensors": b"nonsense"}, "deserializing header"),
        ("sae", {}, "cfg.json"),
        ("sae", {"cfg_json": b"{"}, ""),
        ("sae", {"cfg_json": b"{}"}, "SAELens cannot read it"),
        ("sae", {"cfg_json": b"[]"}, "SAELens cannot read it"),
        ("sae", {"cfg_json": b'{"architecture": "new", "d_in": 128}'}, "SAELens cannot read it"),
        (
            "sae",
            {"sae_weights_safetensors": None},
            "no SAE that SAELens can read, for it has no sae_weights.safetensors",
        ),
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
@pytest.mark.parametrize("place", ["experiment/questions.py", "experiment/records/files.py"])
def test_a_bug_of_ours_is_a_traceback(place, error, tmp_path, monkeypatch):
    """Also where libraries are asked for files: no line about the Hub hides it."""
    scope = {}
    code = f"def load(*_):\n    error = {error}\n    raise error"
    exec(compile(code, ROOT / place, "exec"), scope)
    monkeypatch.setattr(questions, "load", scope["load"])
    monkeypatch.setattr(sys, "argv", ["baseline.py", "--demo", "--output-dir", str(tmp_path)])
    import baseline

    with pytest.raises((ValueError, OSError, KeyError), match="ours"):
        guard(baseline.main)


def test_an_error_of_a_library_is_a_line():
    """All of it, for the first of its lines may be half a sentence; but not a list of everything that is wrong. What
    package is missing is said whole, however long."""
    for error in (ValueError, OSError, RuntimeError, ImportError):
        scope = {"error": error}
        exec(compile("def load(text): raise error(text)", "/lib/site-packages/library.py", "exec"), scope)
        with pytest.raises(UserError, match="^name: one of: this, that$"), hub_errors("name"):
            scope["load"]("one of:\n  this,\n  that\n")
        long = "first\n" + "key\n" * 200
        with pytest.raises(UserError, match="^name: first( key){200}$|^name: first$") as caught, hub_errors("name"):
            scope["load"](long)
        assert (len(str(caught.value)) > 400) == (error is ImportError)
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


def test_a_path_that_the_terminal_cannot_show(tmp_path):
    """A round ends well under an encoding that lacks a character of the output folder's name."""
    folder = tmp_path / "caf\u00e9"
    for name, value in (("PYTHONIOENCODING", "ascii"), ("LC_ALL", "C")):
        command = [sys.executable, ROOT / "baseline.py", "--demo", "--limit", "2", "--output-dir", folder / name]
        environment = os.environ | {name: value}
        done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        assert b"All files: " in done.stdout and (folder / name / "results.json").is_file()
