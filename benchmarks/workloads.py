"""What is measured: the rounds' own functions on the bundled demo, or on a random model and SAE of a given shape, and
what they are compared with."""

import dataclasses
import functools
import math
import os
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as guard does before PyTorch is imported

import torch  # noqa: E402
from transformers import Gemma2Config, Gemma2ForCausalLM  # noqa: E402

import common  # noqa: E402
from experiment import masks, questions  # noqa: E402
from experiment.demo import bundled  # noqa: E402
from experiment.intervention import forward, generate, layout, ranked_lists  # noqa: E402
from experiment.intervention.ablations import Ablation  # noqa: E402
from experiment.intervention.generate import Group  # noqa: E402
from experiment.intervention.memory import halve_on_oom  # noqa: E402
from experiment.intervention.pool import Limits  # noqa: E402
from experiment.intervention.ranked_lists import RankedLists  # noqa: E402
from experiment.intervention.sequences import Sequences  # noqa: E402
from experiment.intervention.splice import Splice  # noqa: E402
from experiment.prompts import build_prompt, find_bracket, find_special_ids, tokenize  # noqa: E402

QUESTIONS_A_CONTEXT = 5  # SQuAD's validation set has 10,570 questions on 2,067 contexts
POOL_TOKENS = 32768  # as an 80 GB card has room for beside gemma-2-9b-it
NEW_TOKENS = 12  # of a random model: "Result = [[ ... ]]" and the end of the turn, around a short answer
SPECIAL_IDS = (2,)  # BOS, which begins every prompt
BRACKET = 2  # the place of the [ in such an answer


@dataclass(frozen=True)
class Shape:
    """A random Gemma 2 with a random JumpReLU SAE after one of its layers.

    active: about how many of its d_sae latents are.  saved: small enough to be saved to a folder and loaded from there.
    """

    config: dict
    layer: int
    d_sae: int
    active: int
    saved: bool = True


SHAPES = {
    "gemma-2-9b-it": Shape(
        dict(vocab_size=256000, hidden_size=3584, intermediate_size=14336, num_hidden_layers=42,
             num_attention_heads=16, num_key_value_heads=8, head_dim=256, query_pre_attn_scalar=256),
        layer=9, d_sae=131072, active=120, saved=False,
    ),
    "gemma-3-270m": Shape(
        dict(vocab_size=32000, hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
             num_attention_heads=4, num_key_value_heads=1, head_dim=256, query_pre_attn_scalar=256),
        layer=9, d_sae=65536, active=150,
    ),
    "tiny": Shape(  # for tests
        dict(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
             num_attention_heads=4, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16,
             tie_word_embeddings=False, initializer_range=0.3),  # so that its answers are not one word again and again
        layer=1, d_sae=1024, active=30,
    ),
    "narrow": Shape(  # as many layers as gemma-2-9b-it, of little work each: what the host does shows
        dict(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=42,
             num_attention_heads=4, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16,
             tie_word_embeddings=False, initializer_range=0.3),
        layer=9, d_sae=1024, active=30,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """bracket(tokens): the place of the last [ in an answer, up to which its latents are ranked, or None.
    guess: tokens that answers are expected to begin with; those of a random model never do.  special_ids: as of
    Sequences.  pool_tokens: of answers that go on together."""

    model: forward.SplicedModel
    prompts: list[list[int]]
    contexts: list
    new_tokens: int
    bracket: Callable
    guess: list[int]
    special_ids: list[int]
    pool_tokens: int

    @property
    def limits(self):
        return Limits(self.new_tokens, self.pool_tokens)


def load_demo(chosen):
    """The bundled model and SAE, and prompts of its questions."""
    tokenizer = common.load_tokenizer(chosen)
    bracket = functools.partial(find_bracket, tokenizer)
    guess = tokenizer(common.ANSWER_BEGINS, add_special_tokens=False)["input_ids"]
    prompts = demo_prompts(chosen, tokenizer)
    special_ids = find_special_ids(tokenizer)
    model = common.load(chosen, tokenizer)
    return Workload(model, *prompts, chosen.max_new_tokens, bracket, guess, special_ids, chosen.pool_tokens)


def demo_prompts(chosen, tokenizer):
    found, *_ = questions.load(bundled(chosen.dataset), chosen.split, chosen.dataset_config)
    found = questions.select(found, chosen.limit, chosen.sample, chosen.seed)
    template = common.choose_template(chosen.prompt_template, tokenizer)
    prompts = [tokenize(tokenizer, build_prompt(template, q.context, q.question)) for q in found]
    return prompts, [q.context for q in found]


def load_shape(shape, chosen, count):
    """A random model and SAE of this shape, and `count` prompts. chosen: the Options that say device and precisions.

    A small one is saved, and loaded by what loads a round's. gemma-2-9b-it's 22 GB stay on the device where they are
    made: a bridge goes around them there, and from then on it is what a round does after loading.
    """
    tokenizer = common.load_tokenizer(chosen)  # any: prompts are made of random ids
    lm = make_lm(shape, chosen.device, getattr(torch, chosen.dtype))
    sae = make_sae(lm, shape)
    if shape.saved:
        with tempfile.TemporaryDirectory() as folder:
            lm.save_pretrained(f"{folder}/model")
            sae.save_model(f"{folder}/sae")
            del lm, sae
            names = {"model": f"{folder}/model", "sae_release": f"{folder}/sae", "sae_id": ""}
            model = common.load(dataclasses.replace(chosen, **names), tokenizer)
    else:
        from transformer_lens.model_bridge import TransformerBridge

        bridge = TransformerBridge.boot_transformers("google/gemma-2-9b-it", hf_model=lm, tokenizer=tokenizer)
        sae = sae.to(dtype=getattr(torch, chosen.sae_dtype.replace("tf32", "float32")))
        common.configure_generation(bridge.original_model, tokenizer)
        model = forward.SplicedModel(bridge, Splice(sae))
    model.end_ids = {shape.config["vocab_size"]}  # no token ends an answer: the number of new tokens is fixed
    prompts, contexts = make_prompts(count, shape.config["vocab_size"])
    pool_tokens = chosen.pool_tokens or POOL_TOKENS
    return Workload(model, prompts, contexts, NEW_TOKENS, lambda tokens: BRACKET, [3, 4, 5], [2], pool_tokens)


def make_lm(shape, device, dtype):
    """A Gemma 2 with random weights, made on the device itself."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            config = Gemma2Config(**shape.config, sliding_window=4096)
            return Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def make_sae(lm, shape):
    """A random SAE in float32, its threshold such that about `active` latents are over it on random prompts."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    d_in, metadata = lm.config.hidden_size, SAEMetadata(hook_name=f"blocks.{shape.layer}.hook_resid_post")
    config = JumpReLUSAEConfig(d_in=d_in, d_sae=shape.d_sae, device=str(lm.device), metadata=metadata)
    sae = JumpReLUSAE(config).eval().requires_grad_(False)
    torch.manual_seed(1)
    sae.W_enc.copy_(torch.randn(d_in, shape.d_sae, device=lm.device) / math.sqrt(d_in))
    sae.W_dec.copy_(sae.W_enc.T / shape.active)
    ids = torch.randint(lm.config.vocab_size, (4, 64), device=lm.device)
    residual = lm(ids, output_hidden_states=True, logits_to_keep=1).hidden_states[shape.layer + 1]
    before = residual.flatten(0, 1).float() @ sae.W_enc + sae.b_enc  # [pos, d_sae]
    sae.threshold.fill_(before.topk(shape.active + 1).values[:, -1].median().clamp(min=0).item())
    return sae


def make_prompts(count, vocab_size):
    """Token ids of SQuAD's lengths: contexts of about 155 tokens, questions of about 15, and the template's 40."""
    rng, prompts, contexts = random.Random(2), [], []

    def tokens(length):
        return [rng.randrange(3, vocab_size) for _ in range(length)]

    head, tail = tokens(15), tokens(25)
    for number in range(count):
        context = tokens(round(min(700, max(30, rng.lognormvariate(math.log(145), 0.38)))))
        for _ in range(QUESTIONS_A_CONTEXT):
            prompts.append([*SPECIAL_IDS, *head, *context, *tokens(rng.randint(9, 22)), *tail])
            contexts.append(number)
    return prompts[:count], contexts[:count]


# ---------------------------------------------------------------------------------------------------------------------
# What is done


def naive_loop(work, numbers, masked):
    """As the authors' scripts do it: batch 1, no cache, the whole sequence again for every new token."""
    bridge, sae, generated = work.model.model, work.model.splice.sae, []
    for number, latents in zip(numbers, masked):

        def replace_residual(residual, hook, latents=latents):
            acts = sae.encode(residual.to(sae.dtype))
            acts[:, :, latents] = 0
            return sae.decode(acts).to(residual.dtype)

        tokens = []
        while len(tokens) < work.new_tokens and not work.model.end_ids & set(tokens[-1:]):
            ids = torch.tensor([work.prompts[number] + tokens], device=work.model.device)
            with torch.no_grad(), bridge.hooks(fwd_hooks=[(work.model.hook_name, replace_residual)]):
                tokens.append(bridge(ids)[0, -1].argmax().item())
        generated.append(tokens)
    return generated


@torch.no_grad()
def plain_generate(lm, prompts, batches, new_tokens):
    """Transformers alone: no SAE, no hooks, no shared prefixes."""
    for batch in batches:
        ids, mask = layout.pad([prompts[i] for i in batch], lm.generation_config.pad_token_id, lm.device, "left")
        lm.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens)


@dataclass(frozen=True)
class Found:
    """A question's round 1. active: how many latents at the last position.  lists: the baseline's topk and bottomk."""

    tokens: list[int]
    active: int
    lists: RankedLists

    def latents(self, which, k):
        """Those that rounds 2 and 3 mask."""
        return self.lists.latents(which)[: masks.count_masked(k, self.active)]


def round_1(work, batches, names=("baseline",)):
    """[Found]. As baseline.py, but it ranks wrong answers' latents too. names: rankings, the baseline first."""
    group = Group(work.prompts, work.contexts, batches)
    given, read = generate.answer(work.model, group, work.limits, work.guess)
    tokens = [one.tokens for one in given]
    brackets = [min(work.bracket(ids) or BRACKET, len(ids) - 1) for ids in tokens]
    found = {}

    def rank(part):
        of_part = [brackets[i] for i in part]
        sequences = Sequences(
            ids=part,
            prompts=[work.prompts[i] for i in part],
            generated=[tokens[i] for i in part],
            brackets=of_part,
            answer_positions=[[place] for place in of_part],
            rows=part,
            read=read,
            special_ids=work.special_ids,
        )
        lists, *_ = [ranked_lists.rank(work.model, name, sequences, seed=0) for name in names]
        for i, active, of_question in zip(part, sequences.active, lists):
            found[i] = Found(tokens[i], len(active), of_question)

    for batch in batches:
        halve_on_oom(rank, batch)
    return [found[i] for i in range(len(found))]


def masked_round(work, batches, found, which, ks=("50%",)):
    """[K][Answer]. As common.masked_round; found: what round_1 gave, whose answers are the drafts."""
    masks = [Ablation([one.latents(which, k) for one in found]) for k in ks]
    drafts = [one.tokens for one in found]
    return generate.answer_masked(work.model, Group(work.prompts, work.contexts, batches, drafts, masks), work.limits)
