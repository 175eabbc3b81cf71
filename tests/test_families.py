"""Tiny random models of each family, with SAEs of several architectures: all three rounds against the naive oracle."""

import json

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
]
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
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(3)
    model = model_class(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    sae = sae_class(sae_config(d_in=32, d_sae=96, metadata=SAEMetadata(hook_name=hook_name), **more))
    with torch.no_grad():  # a frame of 96 directions in 32 dimensions, half of them over zero: about the identity
        sae.W_enc.copy_(torch.randn(32, 96) / 32**0.5)
        sae.W_dec.copy_(sae.W_enc.T / 1.5)
        for parameter in sae.parameters():
            if parameter.dim() == 1:
                parameter.copy_(0.05 * torch.rand(len(parameter)))
    sae.save_model(folder / "sae")
    return folder / "model", folder / "sae"


@pytest.mark.parametrize("name", FAMILIES)
def test_three_rounds(name, tmp_path, monkeypatch, capsys):
    model_folder, sae_folder = make_family(name, tmp_path)
    _, _, (bos, eos, _, end_of_turn, _), prompt_text, (*_, hook_name) = FAMILIES[name]
    names = ["--model", model_folder, "--sae-release", sae_folder, "--device", "cpu", "--dtype", "float32"]
    names += ["--output-dir", tmp_path / "out", "--max-new-tokens", TOKENS]
    chosen = common.parse_options([*map(str, names)], "", masks=False)
    common.prepare(chosen)
    model, sae = common.load(chosen, common.load_tokenizer(chosen))
    tokenizer = common.load_tokenizer(chosen)  # as it is on disk, whatever TransformerLens made of the other
    expected = {bos and tokenizer.convert_tokens_to_ids(bos), *map(tokenizer.convert_tokens_to_ids, (eos, end_of_turn))}
    ends = set(model.original_model.generation_config.eos_token_id)
    assert ends == expected - {bos and tokenizer.convert_tokens_to_ids(bos)} and sae.cfg.metadata.hook_name == hook_name

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
    for which, word in (("topk", "false"), ("bottomk", "true")):
        _, masked = read_journal(tmp_path / "out" / f"predictions_{word}.jsonl")
        changed = 0
        for sample in content["samples"]:
            prompt, ids = answers[sample["id"]]
            ranking = oracle.rank_latents(model, sae, tokenizer, prompt, ids)
            assert sample["active"] == ranking["active"] and len(sample[which]) == len(ranking["active"]) // 2
            for mine, theirs in zip(sample[which], ranking[which]):
                scores = ranking["scores"]
                assert mine == theirs or scores[mine] == pytest.approx(scores[theirs], rel=1e-5)
            theirs = oracle.generate(model, sae, tokenizer, prompt, sample[which], TOKENS, end_of_turn)
            assert masked[sample["id"]]["text"] == tokenizer.decode(theirs)
            changed += theirs != ids
        assert changed or which == "bottomk"

    # TransformerLens' wrappers change nothing but speed, in every family.
    ids = torch.tensor([answers["0-0"][0]])
    with torch.no_grad():
        bridge = model.original_model(ids).logits
        with generation.spliced(model, sae, lambda residual, token_ids: residual) as lm:
            torch.testing.assert_close(lm(ids).logits, bridge)
