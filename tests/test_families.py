"""Tiny random models of each family, with SAEs of several architectures: all three rounds against the naive oracle,
every place an SAE may stand at against hooks on Transformers' own modules, masked answers by every way they take."""

import collections
import contextlib
import json
import os
import random
import subprocess
import types

import conftest
import oracle
import pytest
import sae_lens
import tokenizers
import torch
import transformers
from conftest import load, options, read_journal, run_script
from sae_lens.saes.sae import SAEMetadata

import common
from experiment import UserError
from experiment.intervention import forward, generate, modules, ranked_lists, rankings, splice
from experiment.intervention.ablations import Ablation
from experiment.intervention.sequences import Sequences
from experiment.report import figure

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
][:4]
QUESTIONS = ["who met the hare", "where"]


def make_tokenizer(bos, eos, pad, end_of_turn, others):
    """Whole words, so that a random model's answers have brackets in them: every other of its words has one."""
    words = sorted(set(" ".join([HEAD, *CONTEXTS, *QUESTIONS, "user assistant"]).split()))
    words += [("[w{}", "w{}]", "[w{}", "w{}")[n % 4].format(n) for n in range(90)]
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


@pytest.fixture(autouse=True)
def share_whatever_is_alike(monkeypatch):
    """Batches are small here: no pass is too much for what it shares."""
    monkeypatch.setattr(generate, "PASS_ON_CPU", 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_three_rounds(name, tmp_path, monkeypatch, capsys):
    installed = []  # TransformerLens would install torchvision for Gemma 3's processor
    monkeypatch.setattr(subprocess, "check_call", lambda *arguments, **_: installed.append(arguments))
    monkeypatch.setattr(figure, "draw", lambda entries: {})  # takes a second, and says nothing of a family
    model_folder, sae_folder = make_family(name, tmp_path)
    _, _, (bos, eos, _, end_of_turn, _), prompt_text, (*_, hook_name) = FAMILIES[name]
    names = ["--model", model_folder, "--sae-release", sae_folder, "--max-new-tokens", TOKENS]
    model, tokenizer = load(*names)
    bridge, sae = model.model, model.splice.sae
    assert common.choose_template("auto", tokenizer) == prompt_text and model.hook_name == hook_name
    assert model.end_ids == {*map(tokenizer.convert_tokens_to_ids, (eos, end_of_turn))}
    if name == "llama-3":  # Meta's own template begins with BOS, and so does what its tokenizer makes of any text
        (tmp_path / "template.txt").write_text(bos + prompt_text)
        names += ["--prompt-template", tmp_path / "template.txt"]

    asked, expected = [], {}
    for c, context in enumerate(CONTEXTS):
        for q, question in enumerate(QUESTIONS):
            prompt = oracle.encode_prompt(tokenizer, context, question, prompt_text)
            assert prompt.count(tokenizer.bos_token_id) == (bos is not None)
            ids = oracle.generate(bridge, sae, tokenizer, prompt, (), TOKENS, end_of_turn)
            text = oracle.parse(tokenizer.decode(ids, skip_special_tokens=True))
            truth = "something else" if c == q == 1 else text
            asked.append({"id": f"{c}-{q}", "context": context, "question": question, "answers": {"text": [truth]}})
            expected[f"{c}-{q}"] = (prompt, ids)
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)))
    arguments = ["--demo", *names, "--dataset", tmp_path / "questions.jsonl", "--output-dir", tmp_path / "out"]
    arguments += ["--ranking", "baseline", "gradsae"]
    for script in ("baseline", "baseline_after_false", "baseline_after_true"):
        code, _, err = run_script(script, arguments, monkeypatch, capsys)
        assert code == 0, err
    _, found = read_journal(tmp_path / "out" / "predictions_baseline.jsonl")
    assert {i: r["text"] for i, r in found.items()} == {i: tokenizer.decode(ids) for i, (_, ids) in expected.items()}

    changed = 0
    for ranking in ("baseline", "gradsae"):
        samples = json.loads((tmp_path / "out" / f"activations_{ranking}.json").read_text())["samples"]
        prefix = "" if ranking == "baseline" else "gradsae_"
        _, masked = read_journal(tmp_path / "out" / f"predictions_{prefix}false.jsonl")
        _, masked_least = read_journal(tmp_path / "out" / f"predictions_{prefix}true.jsonl")
        assert len(samples) >= 3 and [sample["id"] for sample in samples] == list(masked) == list(masked_least)
        for sample in samples[:: 1 if ranking == "baseline" else 3]:
            prompt, ids = expected[sample["id"]]
            theirs = oracle.rank_latents(bridge, sae, tokenizer, prompt, ids)
            assert sample["active"] == theirs["active"] and sample["tokens"] == ids
            scores = theirs["scores"]
            if ranking == "gradsae":
                bracket = max(i for i, token in enumerate(ids) if "[" in tokenizer.decode([token]))
                scores, _ = oracle.gradient_scores(bridge, sae, prompt + ids[:bracket], ids[bracket])
                scores = scores.tolist()
            half = len(theirs["active"]) // 2
            for which, texts in (("topk", masked), ("bottomk", masked_least)):
                assert_ranked(sample[which], scores, which)
                text = oracle.generate(bridge, sae, tokenizer, prompt, sample[which][:half], TOKENS, end_of_turn)
                assert texts[sample["id"]]["text"] == tokenizer.decode(text)
                changed += text != ids and which == "topk"
    assert changed

    # TransformerLens' wrappers change nothing but speed, in every family.
    ids = torch.tensor([expected["0-0"][0]])
    with torch.no_grad():
        through_bridge = model.lm(ids).logits
        with modules.hooked(bridge, hook_name, lambda residual: residual) as lm:
            torch.testing.assert_close(lm(ids).logits, through_bridge)
    assert not installed


def assert_ranked(latents, scores, which):
    """At most 100 latents that have a score, highest (topk) or lowest first; where rounding alone tells two apart, in
    any order."""
    best = sorted((score for score in scores if score), reverse=which == "topk")[:100]
    assert len(set(latents)) == len(latents) == len(best) > 10
    for latent, score in zip(latents, best):
        assert scores[latent] == pytest.approx(score, rel=1e-4, abs=0)


# ---------------------------------------------------------------------------------------------------------------------
# Places

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
    (sae_lens.StandardSAE, sae_lens.StandardSAEConfig, {"normalize_activations": "layer_norm"}),
]


def splice_by_hand(layer, place, gemma, sae, masked, error_term="drop", means=None):
    """Replaces what a module of a Transformers layer reads or gives by the SAE's reconstruction, `masked` set to zero
    or to their means; or, with the error term, takes away what that takes away from the reconstruction."""
    of_gemma, of_others, direction = PLACES[place]
    module = layer.get_submodule(of_gemma if gemma else of_others)

    def replace(x):
        whole = sae.decode(sae.encode(x))
        acts = sae.encode(x)  # again: decoding may use up what encoding noted
        acts[..., masked] = 0.0 if means is None else means[masked]
        without = sae.decode(acts)
        return without if error_term == "drop" else x - (whole - without)

    def reads(module, args):
        return replace(args[0]), *args[1:]

    def gives(module, args, out):
        return (replace(out[0]), *out[1:]) if isinstance(out, tuple) else replace(out)

    return module.register_forward_pre_hook(reads) if direction == "reads" else module.register_forward_hook(gives)


def get_layers(model):
    (layers,) = [m for n, m in model.named_modules() if n.endswith("layers") and "vision" not in n]
    return layers


@pytest.mark.parametrize("name", FAMILIES)
def test_places(name, tmp_path):
    """Each place an SAE may stand at is where Transformers has it; masks act there; no TransformerLens judges it."""
    folder, _ = make_family(name, tmp_path)
    chosen = options("--model", folder)
    tokenizer = common.load_tokenizer(chosen)
    bridge, plain = common.load_model(chosen, tokenizer), FAMILIES[name][0].from_pretrained(folder).eval()
    layers, heads = get_layers(plain), bridge.cfg.n_heads * bridge.cfg.d_head
    ids = torch.tensor([tokenizer(f"{HEAD} {context}")["input_ids"] for context in CONTEXTS[:2]])
    rows, columns = torch.meshgrid(torch.arange(ids.shape[0]), torch.arange(ids.shape[1]), indexing="ij")
    everywhere = (rows.flatten(), columns.flatten())
    with torch.no_grad():
        unspliced = plain(ids).logits
    for number, place in enumerate(PLACES):
        d_in = heads if place == "attn.hook_z" else 32
        sae = make_sae(*SAES[(number + list(FAMILIES).index(name)) % len(SAES)], d_in, f"blocks.1.{place}")
        half, means = list(range(0, 3 * d_in, 2)), torch.rand(3 * d_in)
        for error_term, masked, set_to in [
            (error_term, *mask) for error_term in ("drop", "keep") for mask in (([], None), (half, None), (half, means))
        ]:
            model = forward.SplicedModel(bridge, splice.Splice(sae, error_term))
            mask = model.splice.mask(Ablation([masked] * 2), set_to)
            handle = splice_by_hand(layers[1], place, name.startswith("gemma"), sae, masked, error_term, set_to)
            with torch.no_grad(), model.ready():
                expected = plain(ids).logits
                found = model.forward(ids, torch.ones_like(ids), mask=mask, outputs=everywhere)
                if not masked:
                    unmasked = model.forward(ids, torch.ones_like(ids), outputs=everywhere)
                    torch.testing.assert_close(found, unmasked, rtol=1e-4, atol=1e-4)
            handle.remove()
            of_positions = expected.flatten(0, 1)
            torch.testing.assert_close(found, of_positions, rtol=1e-4, atol=1e-4)  # logits of 1 to 10
            changes = bool(masked) or error_term == "drop"
            assert torch.allclose(expected, unspliced, atol=1e-3) != changes


# ---------------------------------------------------------------------------------------------------------------------
# Masked answers, by every way they take

STEPS = 5  # of the answers here
ROWS = [(context, question) for context in CONTEXTS[:2] for question in QUESTIONS]


WORDS = dict(vocab_size=50)
LAST_LAYERS = {
    "gemma-2": (transformers.Gemma2ForCausalLM, transformers.Gemma2Config(**SIZES, **WORDS, sliding_window=8)),
    "gemma-3": (transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig(**SIZES, **WORDS, sliding_window=8)),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES, **WORDS)),
    "mixture of experts": (
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig(**SIZES, **WORDS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    ),
    "run in another way": (
        transformers.GPTNeoXForCausalLM,
        transformers.GPTNeoXConfig(
            **WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            initializer_range=0.4, max_position_embeddings=512,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAST_LAYERS)
@torch.no_grad()
def test_the_last_layer_at_a_few_positions(name):
    """The logits there, and all keys and values, are those of a whole pass, also behind a cache and with padding."""
    model_class, config = LAST_LAYERS[name]
    torch.manual_seed(0)
    lm = model_class._from_config(config, attn_implementation="eager").eval()
    ids = torch.randint(50, (3, 20))
    attention = torch.ones_like(ids)
    attention[1, :4] = 0

    def run(first):
        cache = forward.new_cache(lm)
        logits = []
        for part, start in ((slice(0, 12), first), (slice(12, 20), 5)):
            block = contextlib.nullcontext() if first == 0 else modules.last_layer_from(lm, start)
            with block:
                found = lm(
                    input_ids=ids[:, part],
                    attention_mask=attention[:, : part.stop],
                    position_ids=(attention.cumsum(1) - 1).clamp(min=0)[:, part],
                    past_key_values=cache,
                )
            logits.append(found.logits)
        return cache, logits

    whole, expected = run(0)
    cache, logits = run(9)
    is_known = name != "run in another way"
    assert [found.shape[1] for found in logits] == ([3, 3] if is_known else [12, 8])
    for mine, theirs in zip(logits, expected):
        torch.testing.assert_close(mine[:, -3:], theirs[:, -3:], rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(cache.layers, whole.layers):
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine.values, theirs.values, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=[32, 512], ids=lambda window: f"window {window}")
def windowed(request, tmp_path_factory):
    """A Gemma 2 whose window is shorter than the prompts, and one whose window is longer: its TransformerBridge,
    Transformers' own, the tokenizer, the window and the prompts."""
    folder, _ = make_family("gemma-2", tmp_path_factory.mktemp("family"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": request.param}))
    chosen = options("--model", folder)
    tokenizer = common.load_tokenizer(chosen)
    bridge, plain = common.load_model(chosen, tokenizer), transformers.Gemma2ForCausalLM.from_pretrained(folder).eval()
    prompts = [oracle.encode_prompt(tokenizer, *row, FAMILIES["gemma-2"][3]) for row in ROWS]
    assert 32 < min(map(len, prompts)) and plain.config.sliding_window == request.param
    return types.SimpleNamespace(
        bridge=bridge, plain=plain, tokenizer=tokenizer, window=request.param, prompts=prompts,
        contexts=[context for context, _ in ROWS],
    )  # fmt: skip


def splice_into(windowed, hook_name, error_term="drop", kind=0, bypass=()):
    """The windowed model with a random SAE at a place: a SplicedModel."""
    torch.manual_seed(5)
    sae = make_sae(*SAES[kind], 32, hook_name)
    return forward.SplicedModel(windowed.bridge, splice.Splice(sae, error_term, bypass))


def draw_masks(d_sae):
    """Two masks for each row: a few latents (of the first row none), and a third of them."""
    rng = random.Random(1)
    few, many = ([sorted(rng.sample(range(d_sae), size)) for _ in ROWS] for size in (2, d_sae // 3))
    return [[[], *few[1:]], many]


def answer_masked(model, windowed, drafts, masks, means=None):
    found = conftest.answer_masked(model, windowed.prompts, windowed.contexts, drafts, masks, STEPS, means)
    return [[answer.tokens for answer in of_mask] for of_mask in found]


def count_left(tokens, draft):
    """How many tokens there are after the first one that differs from the draft."""
    agreed = len(os.path.commonprefix([tokens, draft]))
    return max(0, len(tokens) - agreed - 1)


def record_passes(model, monkeypatch):
    """(what it is, shape of its token ids) of each forward pass from here on, and of each layer the shapes that its MLP
    is given."""
    seen = []
    layers = collections.defaultdict(list)
    parts = []  # of the model, those that are run where not all of it is
    run = model._run

    def record(ids, *arguments, **more):
        kind = parts[-1] if parts else "step" if ids.shape[1] == 1 else "whole"
        seen.append((kind, tuple(ids.shape)))
        return run(ids, *arguments, **more)

    def name(part, of_part):
        def named(*arguments, **more):
            parts.append(part)
            try:
                return of_part(*arguments, **more)
            finally:
                parts.pop()

        return named

    monkeypatch.setattr(model, "_run", record)
    if model.boundary is not None:
        monkeypatch.setattr(model, "forward_below", name("below", model.forward_below))
        monkeypatch.setattr(model, "forward_above", name("above", model.forward_above))
    mlp_class = transformers.models.gemma2.modeling_gemma2.Gemma2MLP
    run_mlp = mlp_class.forward
    numbers = {}
    for number, layer in enumerate(get_layers(model.lm)):
        block = getattr(layer, "original_component", layer)
        mlp = getattr(block.mlp, "original_component", block.mlp)
        numbers[id(mlp)] = number

    def count(self, hidden):
        layers[numbers[id(self)]].append(tuple(hidden.shape[:2]))
        return run_mlp(self, hidden)

    monkeypatch.setattr(mlp_class, "forward", count)
    return seen, layers


@pytest.mark.parametrize(
    ("hook_name", "boundary"),
    [
        ("blocks.0.hook_resid_pre", None),
        ("blocks.0.hook_resid_post", 1),
        ("blocks.2.hook_resid_pre", 2),
        ("blocks.1.hook_mlp_out", 1),
        ("blocks.1.attn.hook_z", 1),
        ("blocks.1.hook_attn_out", 1),
        ("blocks.2.hook_resid_post", None),
    ],
)
def test_masked_answers(hook_name, boundary, windowed, monkeypatch):
    """Two masks at once, with the unmasked answers as drafts, with none, and with wrong ones: always the oracle's. The
    layers below the SAE run once for both masks; what prompts share, once, unless a window would count the padding.
    What differs from its draft goes on from what was run, also where a window has left that behind."""
    model, prompts = splice_into(windowed, hook_name), windowed.prompts
    assert (model.boundary, model.window) == (boundary, windowed.window)
    masks = draw_masks(model.splice.d_sae)

    def generate(prompt, masked=()):
        return oracle.generate(windowed.bridge, model.splice.sae, windowed.tokenizer, prompt, masked, STEPS)

    drafts = [generate(prompt) for prompt in prompts]
    expected = [[generate(*pair) for pair in zip(prompts, masked)] for masked in masks]
    same = [mine == theirs for of_mask in expected for mine, theirs in zip(of_mask, drafts)]
    assert any(same) and not all(same)

    assert any(any(map(count_left, of_mask, drafts)) for of_mask in expected)

    seen, layers = record_passes(model, monkeypatch)
    found, _ = conftest.answer(model, prompts, windowed.contexts, STEPS)
    assert [answer.tokens for answer in found] == drafts
    shares = windowed.window == 512
    wide = 3 if shares else 1  # over what all prompts begin with, what those of a context do, and the rests
    assert [kind for kind, _ in seen[: wide + 1]] == ["whole"] * wide + ["step"]

    for guess in (drafts[0][:2], drafts[1][:4], [7, *drafts[2][:1]]):  # what answers begin with: right for some
        found, read = conftest.answer(model, prompts, windowed.contexts, STEPS, guess)
        assert [answer.tokens for answer in found] == drafts
        sequences = [prompt + draft[:-1] for prompt, draft in zip(prompts, drafts)]
        lengths = list(map(len, sequences))
        assert read.rows.bincount().tolist() == lengths
        for row, means in enumerate(rankings.mean(model, read.select(range(len(prompts)), lengths))):
            acts = oracle.activations(windowed.bridge, model.splice.sae, sequences[row])
            torch.testing.assert_close(means, acts.mean(0), rtol=1e-4, atol=1e-5)

    wrong = [[*draft[:2], 7, 8, 9][:STEPS] for draft in drafts]
    for of_rows in (drafts, [[]] * len(prompts), wrong, [*drafts[:1], [], *wrong[2:]]):
        del seen[:]
        layers.clear()
        assert answer_masked(model, windowed, of_rows, masks) == expected
        kinds = collections.Counter(kind for kind, _ in seen)
        width = max(len(prompt) + max(0, len(draft) - 1) for prompt, draft in zip(prompts, of_rows))
        assert kinds["whole"] == (0 if boundary else len(masks))
        assert kinds["step"] == max(max(map(count_left, of_mask, of_rows)) for of_mask in expected)  # all together
        if boundary is None:
            assert not kinds["below"] and not kinds["above"] and seen[0] == ("whole", (len(prompts), width))
        elif shares:
            (_, of_all), (_, of_contexts), (_, rest), *_ = seen
            assert [kind for kind, _ in seen[:4]] == [*["below"] * 3, "above"] and kinds["below"] == 3
            assert (of_all[0], of_contexts[0], rest[0]) == (1, 2, len(prompts))
            assert of_all[1] > 10 and of_contexts[1] > 1 and rest[1] < 0.6 * width
        else:
            assert seen[0] == ("below", (len(prompts), width)) and kinds["below"] == 1
        assert kinds["above"] == (len(masks) if boundary else 0)
        whole = kinds["whole"] + kinds["step"]
        for number in range(3):
            runs = whole + kinds["below" if boundary and number < boundary else "above"]
            assert len(layers[number]) == runs
        # The last layer works where a token is said alone, unless the SAE stands in it or behind it.
        widest = max(1, *map(len, of_rows))
        last_layer_is_free = not hook_name.startswith("blocks.2")
        assert max(shape[1] for shape in layers[2]) == (widest if last_layer_is_free else width)


@pytest.mark.parametrize("hook_name", ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"])
@pytest.mark.parametrize("windowed", [64], indirect=True)
def test_a_batch_that_is_wider_than_the_window(hook_name, windowed):
    """Each sequence fits into the window, and yet the longest prefix and the longest rest side by side do not: a window
    counts the padding between them."""
    model = splice_into(windowed, hook_name)
    rng = random.Random(6)

    def draw(length):
        return [rng.randrange(10, len(windowed.tokenizer)) for _ in range(length)]

    shared = draw(50)
    prompts = [[*shared, *draw(4)], [*shared, *draw(3)], draw(6)]
    drafts = [draw(2), [], draw(30)]
    masks = [[sorted(rng.sample(range(96), 12)) for _ in prompts]]
    assert max(len(prompt) + len(draft) for prompt, draft in zip(prompts, drafts)) < windowed.window < 50 + 30
    expected = []
    for prompt, latents in zip(prompts, masks[0]):
        sae = model.splice.sae
        expected.append(oracle.generate(windowed.bridge, sae, windowed.tokenizer, prompt, latents, STEPS))
    (found,) = conftest.answer_masked(model, prompts, "aab", drafts, masks, STEPS)
    assert [answer.tokens for answer in found] == expected


@pytest.mark.parametrize("hook_name", ["blocks.1.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"])
@pytest.mark.parametrize(("error_term", "ablation"), [("keep", "zero"), ("drop", "mean")])
@pytest.mark.parametrize("windowed", [512], indirect=True)
def test_masked_answers_of_other_kinds(hook_name, error_term, ablation, windowed, monkeypatch):
    """Against a loop over Transformers' own model, the whole sequence again for every token."""
    monkeypatch.setattr(splice, "DENSE", 1)  # the way of sparse activations, which these are not
    model, masks = splice_into(windowed, hook_name, error_term), draw_masks(96)
    means = 4 * torch.rand(96) if ablation == "mean" else None  # far from what is active

    def generate(prompt, masked):
        ids, place = [], hook_name.partition(".1.")[2]
        handle = splice_by_hand(get_layers(windowed.plain)[1], place, True, model.splice.sae, masked, error_term, means)
        with torch.no_grad():
            while len(ids) < STEPS and not (ids and ids[-1] in model.end_ids):
                ids.append(int(windowed.plain(torch.tensor([prompt + ids])).logits[0, -1].argmax()))
        handle.remove()
        return ids

    drafts = [generate(prompt, []) for prompt in windowed.prompts]
    expected = [[generate(*pair) for pair in zip(windowed.prompts, masked)] for masked in masks]
    found, _ = conftest.answer(model, windowed.prompts, windowed.contexts, STEPS)
    assert [answer.tokens for answer in found] == drafts
    assert expected[0] != expected[1] != drafts
    assert answer_masked(model, windowed, drafts, masks, means) == expected


@pytest.mark.parametrize("hook_name", ["blocks.1.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"])
@pytest.mark.parametrize("error_term", ["drop", "keep"])
@pytest.mark.parametrize("windowed", [512], indirect=True)
def test_where_nothing_is_sparse(hook_name, error_term, windowed, monkeypatch):
    """Activations of which too many are not zero are encoded and decoded whole; nothing else changes."""
    bypass = [windowed.tokenizer.bos_token_id]
    model = splice_into(windowed, hook_name, error_term, bypass=bypass)
    masks, used = draw_masks(model.splice.d_sae), []
    for name in ("_decode_entries", "_decode_whole"):
        real = getattr(model.splice, name)
        monkeypatch.setattr(model.splice, name, lambda *a, real=real, name=name: used.append(name) or real(*a))

    def answer_all():
        del used[:]
        found, read = conftest.answer(model, windowed.prompts, windowed.contexts, STEPS)
        masked = answer_masked(model, windowed, [answer.tokens for answer in found], masks)
        latents = read.select(range(len(found)), [10**6] * len(found)).latents
        return found, latents, masked, set(used)

    monkeypatch.setattr(splice, "DENSE", 1)
    sparse, sparse_latents, sparse_masked, way = answer_all()
    assert way == {"_decode_entries"}
    monkeypatch.setattr(splice, "DENSE", 0)
    model.splice.chunk = 7  # no divisor of anything here
    dense, dense_latents, dense_masked, way = answer_all()
    assert way == {"_decode_whole"} and dense_masked == sparse_masked
    for one, other in zip(dense, sparse):
        assert one.tokens == other.tokens and one.log_probs == pytest.approx(other.log_probs, abs=1e-4)
    assert torch.equal(dense_latents.ids, sparse_latents.ids) and torch.equal(
        dense_latents.counts, sparse_latents.counts
    )
    torch.testing.assert_close(dense_latents.values, sparse_latents.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hook_name", ["blocks.0.hook_resid_post", "blocks.1.hook_attn_out"])
@pytest.mark.parametrize("windowed", [512], indirect=True)
def test_an_sae_that_normalizes(hook_name, windowed, monkeypatch):
    """Its decoding is no sum of rows, so it is always decoded whole: answers, rankings and masks are the oracle's."""
    model, prompts = splice_into(windowed, hook_name, kind=4), windowed.prompts
    sae, masks = model.splice.sae, draw_masks(model.splice.d_sae)
    assert sae.cfg.normalize_activations == "layer_norm" and model.splice.bias is None
    monkeypatch.setattr(model.splice, "_decode_entries", None)

    def generate(prompt, masked=()):
        return oracle.generate(windowed.bridge, sae, windowed.tokenizer, prompt, masked, STEPS)

    found, read = conftest.answer(model, prompts, windowed.contexts, STEPS)
    drafts = [generate(prompt) for prompt in prompts]
    assert [answer.tokens for answer in found] == drafts
    expected = [[generate(*pair) for pair in zip(prompts, masked)] for masked in masks]
    assert answer_masked(model, windowed, drafts, masks) == expected and drafts not in expected

    count, generated = len(prompts), [answer.tokens for answer in found]
    ids = [str(row) for row in range(count)]
    sequences = Sequences(ids, prompts, generated, [3] * count, [[]] * count, range(count), read, [])
    for row, means, gradients in zip(
        range(count),
        rankings.rank_by_mean_activation(model, sequences, 0),
        rankings.rank_by_gradient(model, sequences, 0),
    ):
        ids = prompts[row] + generated[row][:3]
        scores, active = oracle.score_latents(windowed.bridge, sae, ids)
        assert sequences.active[row] == active
        torch.testing.assert_close(means, torch.tensor(scores), rtol=1e-4, atol=1e-6)
        scores, _ = oracle.gradient_scores(windowed.bridge, sae, ids, generated[row][3])
        torch.testing.assert_close(gradients, scores, rtol=1e-3, atol=1e-3 * float(scores.max()))
    # What a latent writes depends on what the position was before it was normalised: it is not told.
    (lists, *_) = ranked_lists.rank(model, "baseline", sequences, 0)
    assert lists.fields().keys() == {"topk", "bottomk"}
    with pytest.raises(UserError, match=r"--ranking matched: .*layer_norm"):
        ranked_lists.refuse_unmeasurable("matched", model.splice)
