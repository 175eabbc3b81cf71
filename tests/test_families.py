"""Tiny random models of each family, with SAEs of several architectures: all three rounds against the naive oracle, and
every place an SAE may stand at against hooks on Transformers' own modules."""

import json
import subprocess

import oracle
import pytest
import sae_lens
import tokenizers
import torch
import transformers
from conftest import run_script
from sae_lens.saes.sae import SAEMetadata
from test_rounds import read_journal

import common
from experiment import generation

TOKENS = 8
HEAD = "Answer the following question based on the context.\nContext:\n{context}\n\nQuestion:\n{question}\n\n"
HEAD += 'Please organize your final answer in this format: "Result = [[ label ]]"\n'
SIZES = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, initializer_range=0.4, max_position_embeddings=512,
    tie_word_embeddings=False,  # with them a random model says its last word again
)  # fmt: skip

# Model class and configuration, special tokens (BOS, end of sequence, padding, end of turn, others), the prompt by
# hand, and an SAE with its place. The sliding windows are shorter than the prompts.
FAMILIES = {
    "gemma-2": (
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config(**SIZES, sliding_window=32, query_pre_attn_scalar=8),
        ("<bos>", "<eos>", "<pad>", "<end_of_turn>", ["<start_of_turn>"]),
        "<start_of_turn>user\n" + HEAD,
        (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig, {}, "blocks.1.hook_resid_post"),
    ),
    "gemma-3": (
        transformers.Gemma3ForCausalLM,
        transformers.Gemma3TextConfig(**SIZES, sliding_window=32, query_pre_attn_scalar=8),
        ("<bos>", "<eos>", "<pad>", "<end_of_turn>", ["<start_of_turn>"]),
        "<start_of_turn>user\n" + HEAD,
        (sae_lens.TopKSAE, sae_lens.TopKSAEConfig, {"k": 12}, "blocks.1.hook_mlp_out"),
    ),
    # From 4b on it also reads pictures. The SAE as Gemma Scope 2's for attention: `hook_z`, but no reshaping.
    "gemma-3-4b": (
        transformers.Gemma3ForConditionalGeneration,
        transformers.Gemma3Config(
            text_config=SIZES | dict(sliding_window=32, query_pre_attn_scalar=8, head_dim=12),
            vision_config=dict(
                hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28
            ),
            tie_word_embeddings=False,
        ),
        ("<bos>", "<eos>", "<pad>", "<end_of_turn>", ["<start_of_turn>", "<image_soft_token>"]),
        "<start_of_turn>user\n" + HEAD,
        (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig, {}, "blocks.1.attn.hook_z"),
    ),
    "llama-3": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**SIZES),
        ("<|begin_of_text|>", "<|end_of_text|>", None, "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
        "<|start_header_id|>user<|end_header_id|>\n\n" + HEAD
        + "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        (sae_lens.StandardSAE, sae_lens.StandardSAEConfig, {}, "blocks.1.hook_resid_post"),
    ),
    "qwen-2.5": (
        transformers.Qwen2ForCausalLM,
        transformers.Qwen2Config(**SIZES),
        (None, "<|endoftext|>", "<|endoftext|>", "<|im_end|>", ["<|im_start|>"]),
        "<|im_start|>user\n" + HEAD + "<|im_end|>\n<|im_start|>assistant\n",
        (sae_lens.GatedSAE, sae_lens.GatedSAEConfig, {"reshape_activations": "hook_z"}, "blocks.1.attn.hook_z"),
    ),
}  # fmt: skip

CONTEXTS = [
    f"the {a} met the {b} near the {c}" for a in ("fox", "owl") for b in ("hare", "toad") for c in ("mill", "lake")
][:6]
QUESTIONS = ["who met the hare", "where"]


def make_tokenizer(bos, eos, pad, end_of_turn, others):
    """Whole words, so that a random model's answers have brackets in them: every third of its words has one."""
    words = sorted(set(" ".join([HEAD, *CONTEXTS, *QUESTIONS, "user assistant"]).split()))
    words += [f"[w{n}" if n % 3 == 0 else f"w{n}]" if n % 3 == 1 else f"w{n}" for n in range(90)]
    special = list(dict.fromkeys(token for token in (pad, eos, bos, *others, end_of_turn) if token))
    vocabulary = {token: number for number, token in enumerate(["<unk>", *special, *words])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if bos:  # as Llama's and Gemma's own do
        core.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=pad, unk_token="<unk>",
        additional_special_tokens=[*others, end_of_turn],
    )  # fmt: skip


def make_family(name, folder):
    """Saves a random model with its tokenizer and a random SAE; returns their folders."""
    model_class, config, special, _, (sae_class, sae_config, more, hook_name) = FAMILIES[name]
    tokenizer = make_tokenizer(*special)
    text_config = config.get_text_config()
    text_config.vocab_size = len(tokenizer)
    if text_config is not config:
        config.image_token_id = tokenizer.convert_tokens_to_ids("<image_soft_token>")
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(3)
    model = model_class(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    d_in = 4 * text_config.head_dim if hook_name.endswith("hook_z") else 32
    make_sae(sae_class, sae_config, more, d_in, hook_name).save_model(folder / "sae")
    return folder / "model", folder / "sae"


def make_sae(sae_class, sae_config, more, d_in, hook_name):
    """A frame of three times as many directions as dimensions, half of them over zero: about the identity."""
    sae = sae_class(sae_config(d_in=d_in, d_sae=3 * d_in, metadata=SAEMetadata(hook_name=hook_name), **more))
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(d_in, 3 * d_in) / d_in**0.5)
        sae.W_dec.copy_(sae.W_enc.T / 1.5)
        for parameter in sae.parameters():
            if parameter.dim() == 1:
                parameter.copy_(0.05 * torch.rand(len(parameter)))
    return sae


@pytest.mark.parametrize("name", FAMILIES)
def test_three_rounds(name, tmp_path, monkeypatch, capsys):
    installed = []  # TransformerLens would install torchvision for Gemma 3's processor
    monkeypatch.setattr(subprocess, "check_call", lambda *arguments, **_: installed.append(arguments))
    model_folder, sae_folder = make_family(name, tmp_path)
    _, _, (bos, eos, _, end_of_turn, _), prompt_text, (*_, hook_name) = FAMILIES[name]
    names = ["--model", model_folder, "--sae-release", sae_folder, "--device", "cpu", "--dtype", "float32"]
    names += ["--output-dir", tmp_path / "out", "--max-new-tokens", TOKENS]
    chosen = common.parse_options([*map(str, names)], "", masks=False)
    common.prepare(chosen)
    model, sae = common.load(chosen, common.load_tokenizer(chosen))
    tokenizer = common.load_tokenizer(chosen)  # as it is on disk, whatever TransformerLens made of the other
    assert common.choose_template("auto", tokenizer) == prompt_text and sae.cfg.metadata.hook_name == hook_name
    ends = set(model.original_model.generation_config.eos_token_id)
    assert ends == {*map(tokenizer.convert_tokens_to_ids, (eos, end_of_turn))}
    if name == "llama-3":  # Meta's own template begins with BOS, and so does what its tokenizer makes of any text
        (tmp_path / "template.txt").write_text(bos + prompt_text)
        names += ["--prompt-template", tmp_path / "template.txt"]

    asked, answers = [], {}
    for c, context in enumerate(CONTEXTS):
        for q, question in enumerate(QUESTIONS):
            prompt = oracle.encode_prompt(tokenizer, context, question, prompt_text)
            assert prompt.count(tokenizer.bos_token_id) == (bos is not None)
            ids = oracle.generate(model, sae, tokenizer, prompt, (), TOKENS, end_of_turn)
            text = oracle.parse(tokenizer.decode(ids, skip_special_tokens=True))
            truth = text if (c + q) % 4 else "something else"
            asked.append({"id": f"{c}-{q}", "context": context, "question": question, "answers": {"text": [truth]}})
            answers[f"{c}-{q}"] = (prompt, ids)
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)))
    arguments = [*names, "--dataset", tmp_path / "questions.jsonl"]
    for script in ("baseline", "baseline_after_false", "baseline_after_true"):
        code, _, err = run_script(script, arguments, monkeypatch, capsys)
        assert code == 0, err
    content = json.loads((tmp_path / "out" / "activations_baseline.json").read_text())
    _, found = read_journal(tmp_path / "out" / "predictions_baseline.jsonl")
    assert {i: r["text"] for i, r in found.items()} == {i: tokenizer.decode(ids) for i, (_, ids) in answers.items()}
    assert len(content["samples"]) >= 3
    _, masked = read_journal(tmp_path / "out" / "predictions_false.jsonl")
    _, masked_least = read_journal(tmp_path / "out" / "predictions_true.jsonl")
    changed = 0
    for sample in content["samples"]:
        prompt, ids = answers[sample["id"]]
        ranking = oracle.rank_latents(model, sae, tokenizer, prompt, ids)
        assert sample["active"] == ranking["active"]
        for which, texts in (("topk", masked), ("bottomk", masked_least)):
            assert len(sample[which]) == len(ranking["active"]) // 2
            for mine, theirs in zip(sample[which], ranking[which]):
                scores = ranking["scores"]
                assert mine == theirs or scores[mine] == pytest.approx(scores[theirs], rel=1e-5)
            theirs = oracle.generate(model, sae, tokenizer, prompt, sample[which], TOKENS, end_of_turn)
            assert texts[sample["id"]]["text"] == tokenizer.decode(theirs)
            changed += theirs != ids and which == "topk"
    assert changed

    # TransformerLens' wrappers change nothing but speed, in every family.
    ids = torch.tensor([answers["0-0"][0]])
    with torch.no_grad():
        bridge = model.original_model(ids).logits
        with generation.spliced(model, sae, lambda residual, token_ids: residual) as lm:
            torch.testing.assert_close(lm(ids).logits, bridge)
    assert not installed


# Where each place is in a layer of Transformers' own: the module (Gemma's; that of the others, which have no norm
# behind their sublayers), and whether it is what that module reads or what it gives.
PLACES = {
    "hook_resid_pre": ("", "", "reads"),
    "hook_resid_post": ("", "", "gives"),
    "hook_mlp_out": ("post_feedforward_layernorm", "mlp", "gives"),
    "hook_attn_out": ("post_attention_layernorm", "self_attn", "gives"),
    "attn.hook_z": ("self_attn.o_proj", "self_attn.o_proj", "reads"),
}
SAES = [
    (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig, {}),
    (sae_lens.TopKSAE, sae_lens.TopKSAEConfig, {"k": 12}),
    (sae_lens.StandardSAE, sae_lens.StandardSAEConfig, {}),
    (sae_lens.GatedSAE, sae_lens.GatedSAEConfig, {}),
]


def splice_by_hand(layer, module, direction, sae, masked):
    """Replaces what `module` of a Transformers layer reads or gives by the SAE's reconstruction, `masked` zeroed."""

    def reconstruct(x):
        acts = sae.encode(x)
        acts[..., masked] = 0
        return sae.decode(acts)

    def reads(module, args):
        return reconstruct(args[0]), *args[1:]

    def gives(module, args, out):
        return (reconstruct(out[0]), *out[1:]) if isinstance(out, tuple) else reconstruct(out)

    module = layer.get_submodule(module)
    return module.register_forward_pre_hook(reads) if direction == "reads" else module.register_forward_hook(gives)


@pytest.mark.parametrize("name", FAMILIES)
def test_places(name, tmp_path):
    """Each place an SAE may stand at is where Transformers has it; masks act there; no TransformerLens judges it."""
    folder, _ = make_family(name, tmp_path)
    arguments = ["--model", folder, "--sae-release", "demo/sae", "--device", "cpu", "--dtype", "float32"]
    chosen = common.parse_options([*map(str, arguments)], "", masks=False)
    common.prepare(chosen)
    tokenizer = common.load_tokenizer(chosen)
    model, plain = common.load_model(chosen, tokenizer), FAMILIES[name][0].from_pretrained(folder).eval()
    (layers,) = [m for n, m in plain.named_modules() if n.endswith("layers") and "vision" not in n]
    heads = model.cfg.n_heads * model.cfg.d_head
    ids = torch.tensor([tokenizer(f"{HEAD} {context}")["input_ids"] for context in CONTEXTS[:2]])
    unspliced = plain(ids).logits
    for number, (place, (of_gemma, of_others, direction)) in enumerate(PLACES.items()):
        d_in = heads if place == "attn.hook_z" else 32
        sae = make_sae(*SAES[(number + list(FAMILIES).index(name)) % len(SAES)], d_in, f"blocks.1.{place}")
        module = of_gemma if name.startswith("gemma") else of_others
        for masked in ([], list(range(0, 3 * d_in, 2))):
            handle = splice_by_hand(layers[1], module, direction, sae, masked)
            with torch.no_grad():
                expected = plain(ids).logits
                with generation.spliced(model, sae, generation.splice(sae, [masked] * 2)) as lm:
                    found = lm(ids).logits
            handle.remove()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # logits of 1 to 10
            assert not torch.allclose(expected, unspliced, atol=1e-3)
