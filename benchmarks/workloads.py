"""What is measured: the rounds' own functions on the bundled demo, or on a random model and SAE of a given shape, and
what they are compared with."""

import dataclasses
import functools
import math
import os
import random
import sys
import tempfile
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as guard does before PyTorch is imported

import torch  # noqa: E402
from jaxtyping import Float  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel, PreTrainedTokenizerBase  # noqa: E402

import common  # noqa: E402
from experiment import masks, patches, questions  # noqa: E402
from experiment.demo import bundled  # noqa: E402
from experiment.intervention import forward, generate, ranked_lists  # noqa: E402
from experiment.intervention.ablations import Ablation  # noqa: E402
from experiment.intervention.generate import Group  # noqa: E402
from experiment.intervention.memory import halve_on_oom  # noqa: E402
from experiment.intervention.pool import Limits  # noqa: E402
from experiment.intervention.ranked_lists import RankedLists  # noqa: E402
from experiment.intervention.rows import Answer  # noqa: E402
from experiment.intervention.sequences import Sequences  # noqa: E402
from experiment.intervention.splice import Splice  # noqa: E402
from experiment.masks import Side  # noqa: E402
from experiment.options import Options  # noqa: E402
from experiment.prompts import build_prompt, find_bracket, find_special_ids, tokenize  # noqa: E402

if TYPE_CHECKING:  # importing it takes seconds
    from sae_lens import JumpReLUSAE

QUESTIONS_PER_CONTEXT = 5  # SQuAD's validation set has 10,570 questions on 2,067 contexts
POOL_TOKENS = 32768  # as an 80 GB card has room for beside gemma-2-9b-it
NEW_TOKENS = 12  # of a random model: "Result = [[ ... ]]" and the end of the turn, around a short answer
SPECIAL_IDS = (2,)  # BOS, which begins every prompt
BRACKET = 2  # the place of the [ in such an answer


@dataclass(frozen=True)
class Shape:
    """A random Gemma 2 with a random JumpReLU SAE after one of its layers.

    active: about how many of its d_sae latents are.  saved: small enough to be saved to a folder and loaded from there.
    """

    config: dict[str, Any]
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
    contexts: list[Hashable]
    new_tokens: int
    bracket: Callable[[list[int]], int | None]
    guess: list[int]
    special_ids: list[int]
    pool_tokens: int

    @property
    def limits(self) -> Limits:
        return Limits(self.new_tokens, self.pool_tokens)

    def take(self, numbers: Sequence[int]) -> "Workload":
        """These questions alone."""
        prompts = [self.prompts[number] for number in numbers]
        contexts = [self.contexts[number] for number in numbers]
        return dataclasses.replace(self, prompts=prompts, contexts=contexts)


def load_demo(chosen: Options) -> Workload:
    """The bundled model and SAE, and prompts of its questions."""
    tokenizer = common.load_tokenizer(chosen)
    prompts, contexts = demo_prompts(chosen, tokenizer)
    assert chosen.pool_tokens is not None  # the demo's is fixed
    return Workload(
        model=common.load(chosen, tokenizer),
        prompts=prompts,
        contexts=contexts,
        new_tokens=chosen.max_new_tokens,
        bracket=functools.partial(find_bracket, tokenizer),
        guess=tokenizer(common.ANSWER_BEGINS, add_special_tokens=False)["input_ids"],
        special_ids=find_special_ids(tokenizer),
        pool_tokens=chosen.pool_tokens,
    )


def demo_prompts(chosen: Options, tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[int]], list[Hashable]]:
    """Token ids, and what names each prompt's context."""
    found, *_ = questions.load(bundled(chosen.dataset), chosen.split, chosen.dataset_config)
    found = questions.select(found, chosen.limit, chosen.sample, chosen.seed)
    template = common.choose_template(chosen.prompt_template, tokenizer)
    prompts = []
    contexts: list[Hashable] = []
    for question in found:
        text = build_prompt(template, question.context, question.question)
        prompts.append(tokenize(tokenizer, text))
        contexts.append(question.context)
    return prompts, contexts


def load_shape(shape: Shape, chosen: Options, count: int) -> Workload:
    """A random model and SAE of this shape, and `count` prompts. chosen: the Options that say device and precisions."""
    vocab_size = shape.config["vocab_size"]
    model = _load_random(shape, chosen)
    model.end_ids = {vocab_size}  # no token ends an answer: the number of new tokens is fixed
    prompts, contexts = make_prompts(count, vocab_size)
    return Workload(
        model=model,
        prompts=prompts,
        contexts=contexts,
        new_tokens=NEW_TOKENS,
        bracket=lambda tokens: BRACKET,
        guess=[3, 4, 5],
        special_ids=[*SPECIAL_IDS],
        pool_tokens=chosen.pool_tokens or POOL_TOKENS,
    )


def _load_random(shape: Shape, chosen: Options) -> forward.SplicedModel:
    """A small model is saved, and loaded by what loads a round's. gemma-2-9b-it's 22 GB stay on the device where they
    are made: a bridge goes around them there, and from then on it is what a round does after loading."""
    tokenizer = common.load_tokenizer(chosen)  # any: prompts are made of random ids
    lm = make_lm(shape, chosen.device, getattr(torch, chosen.dtype))
    sae = make_sae(lm, shape)
    if shape.saved:
        with tempfile.TemporaryDirectory() as folder:
            lm.save_pretrained(f"{folder}/model")
            sae.save_model(f"{folder}/sae")
            del lm, sae
            saved = dataclasses.replace(chosen, model=f"{folder}/model", sae_release=f"{folder}/sae", sae_id="")
            return common.load(saved, tokenizer)

    from transformer_lens.model_bridge import TransformerBridge

    with patches.attention_as_it_is():
        bridge = TransformerBridge.boot_transformers("google/gemma-2-9b-it", hf_model=lm, tokenizer=tokenizer)
    sae = sae.to(dtype=getattr(torch, chosen.sae_dtype.replace("tf32", "float32")))
    common.configure_generation(cast(PreTrainedModel, bridge.original_model), tokenizer)
    return forward.SplicedModel(bridge, Splice(sae))


def make_lm(shape: Shape, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A Gemma 2 with random weights, made on the device itself."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            config = Gemma2Config(**shape.config, sliding_window=4096)
            lm = Gemma2ForCausalLM._from_config(config, attn_implementation="eager")
    finally:
        torch.set_default_dtype(before)
    return lm.eval().requires_grad_(False)


@torch.no_grad()
def make_sae(lm: PreTrainedModel, shape: Shape) -> "JumpReLUSAE":
    """A random SAE in float32, its threshold such that about `active` latents are over it on random prompts."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    d_in = lm.config.hidden_size
    metadata = SAEMetadata(hook_name=f"blocks.{shape.layer}.hook_resid_post")
    config = JumpReLUSAEConfig(d_in=d_in, d_sae=shape.d_sae, device=str(lm.device), metadata=metadata)
    sae = JumpReLUSAE(config).eval().requires_grad_(False)
    torch.manual_seed(1)
    sae.W_enc.copy_(torch.randn(d_in, shape.d_sae, device=lm.device) / math.sqrt(d_in))
    sae.W_dec.copy_(sae.W_enc.T / shape.active)
    ids = torch.randint(lm.config.vocab_size, (4, 64), device=lm.device)
    residual = lm(ids, output_hidden_states=True, logits_to_keep=1).hidden_states[shape.layer + 1]
    before = residual.flatten(0, 1).float() @ sae.W_enc + sae.b_enc  # [pos, d_sae]
    highest = before.topk(shape.active + 1).values
    threshold = highest[:, -1].median().clamp(min=0)
    sae.threshold.fill_(threshold.item())
    return sae


def make_prompts(count: int, vocab_size: int) -> tuple[list[list[int]], list[Hashable]]:
    """Token ids of SQuAD's lengths, and what names each prompt's context: contexts of about 155 tokens, questions of
    about 15, and the template's 40."""
    rng = random.Random(2)
    prompts: list[list[int]] = []
    contexts: list[Hashable] = []

    def tokens(length: int) -> list[int]:
        return [rng.randrange(3, vocab_size) for _ in range(length)]

    head = tokens(15)
    tail = tokens(25)
    for number in range(count):
        length = round(rng.lognormvariate(math.log(145), 0.38))
        length = min(700, max(30, length))
        context = tokens(length)
        for _ in range(QUESTIONS_PER_CONTEXT):
            question = tokens(rng.randint(9, 22))
            prompts.append([*SPECIAL_IDS, *head, *context, *question, *tail])
            contexts.append(number)
    return prompts[:count], contexts[:count]


# ---------------------------------------------------------------------------------------------------------------------
# What is done


def naive_loop(work: Workload, numbers: Iterable[int], masked: list[list[int]]) -> list[list[int]]:
    """As the authors' scripts do it: batch 1, no cache, the whole sequence again for every new token.

    numbers: of questions.  masked: latents, of each of them. Returns the tokens of their answers.
    """
    bridge = work.model.model
    sae = work.model.splice.sae
    generated = []
    for number, latents in zip(numbers, masked):

        def replace_residual(
            residual: Float[Tensor, "row pos d_in"],
            hook: object,
            latents: list[int] = latents,
        ) -> Float[Tensor, "row pos d_in"]:
            acts = sae.encode(residual.to(sae.dtype))
            acts[:, :, latents] = 0
            return sae.decode(acts).to(residual.dtype)

        tokens: list[int] = []
        while len(tokens) < work.new_tokens and not work.model.end_ids & set(tokens[-1:]):
            ids = torch.tensor([work.prompts[number] + tokens], device=work.model.device)
            with torch.no_grad(), bridge.hooks(fwd_hooks=[(work.model.hook_name, replace_residual)]):
                likeliest = bridge(ids)[0, -1].argmax()
            tokens.append(int(likeliest))
        generated.append(tokens)
    return generated


@dataclass(frozen=True)
class Found:
    """A question's round 1. active: how many latents at the last position.  lists: the baseline's topk and bottomk."""

    tokens: list[int]
    active: int
    lists: RankedLists

    def latents(self, which: Side, k: str) -> list[int]:
        """Those that rounds 2 and 3 mask."""
        count = masks.count_masked(k, self.active)
        return self.lists.latents(which)[:count]


def round_1(work: Workload, batches: list[list[int]], names: Sequence[str] = ("baseline",)) -> list[Found]:
    """As baseline.py, but it ranks wrong answers' latents too. names: rankings, the baseline first."""
    group = Group(work.prompts, work.contexts, batches)
    given, read = generate.answer(work.model, group, work.limits, work.guess)
    tokens = [one.tokens for one in given]
    brackets = [min(work.bracket(ids) or BRACKET, len(ids) - 1) for ids in tokens]
    found: dict[int, Found] = {}

    def rank(part: list[int]) -> None:
        of_part = [brackets[number] for number in part]
        sequences = Sequences(
            ids=[str(number) for number in part],
            prompts=[work.prompts[number] for number in part],
            generated=[tokens[number] for number in part],
            brackets=of_part,
            answer_positions=[[place] for place in of_part],
            rows=part,
            read=read,
            special_ids=work.special_ids,
        )
        lists, *_ = [ranked_lists.rank(work.model, name, sequences, seed=0) for name in names]
        for number, active, of_question in zip(part, sequences.active, lists):
            found[number] = Found(tokens[number], len(active), of_question)

    for batch in batches:
        halve_on_oom(rank, batch)
    return [found[number] for number in range(len(found))]


def masked_round(
    work: Workload,
    batches: list[list[int]],
    found: list[Found],
    which: Side,
    ks: Sequence[str] = ("50%",),
) -> list[list[Answer]]:
    """The answers under each K, as common.masked_round has them. found: what round_1 gave, whose answers are the
    drafts."""
    drafts = [one.tokens for one in found]
    ablations = []
    for k in ks:
        latents = [one.latents(which, k) for one in found]
        ablations.append(Ablation(latents))
    group = Group(work.prompts, work.contexts, batches, drafts, ablations)
    return generate.answer_masked(work.model, group, work.limits)
