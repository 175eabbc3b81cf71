"""From Python, or in a notebook: a model with its SAE, asked one question at a time. See examples/quickstart.py."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import common
from experiment import options
from experiment.hub import prepare_libraries
from experiment.intervention import generate, rankings
from experiment.intervention.ablations import Ablation
from experiment.intervention.forward import SplicedModel
from experiment.intervention.generate import Group
from experiment.intervention.pool import Limits
from experiment.prompts import build_prompt, decode, tokenize

OF_ONE_QUESTION = Limits(options.Options.max_new_tokens, pool_tokens=2**20)  # nothing to share


def open_model(*arguments: str) -> tuple[SplicedModel, PreTrainedTokenizerBase]:
    """A model with the SAE in it, and its tokenizer. arguments: the scripts' options, as "--demo"."""
    chosen = options.parse(list(arguments), __doc__, masks="topk")
    prepare_libraries(chosen)
    tokenizer = common.load_tokenizer(chosen)
    return common.load(chosen, tokenizer), tokenizer


def ask(
    model: SplicedModel, tokenizer: PreTrainedTokenizerBase, context: str, question: str, masked: Sequence[int] = ()
) -> str:
    """What the model answers with these latents masked at every position, as a round of a single question."""
    group = _make_group_of_one(tokenizer, context, question, masked)
    [[answer]] = generate.answer_masked(model, group, OF_ONE_QUESTION)
    return decode(tokenizer, answer.tokens)


def mean_activations(
    model: SplicedModel, tokenizer: PreTrainedTokenizerBase, context: str, question: str
) -> Float[Tensor, "d_sae"]:
    """Each latent's mean activation over the prompt and the unmasked answer."""
    group = _make_group_of_one(tokenizer, context, question, ())
    _, read = generate.answer(model, group, OF_ONE_QUESTION)
    return rankings.mean(model, read)[0]


def _make_group_of_one(tokenizer: PreTrainedTokenizerBase, context: str, question: str, masked: Sequence[int]) -> Group:
    template = common.choose_template("auto", tokenizer)
    prompt = tokenize(tokenizer, build_prompt(template, context, question))
    return Group([prompt], [context], batches=[[0]], drafts=[[]], masks=[Ablation([list(masked)])])
