"""What each latent does for the answer: it is masked alone, at every position, and the answer is asked for again.

IE(l) = m(nothing masked) - m(l masked), where m is the mean log probability (nats per token) of the unmasked answer's
own tokens inside the brackets, each given the prompt and the answer before it. A positive effect: the answer is less
likely without the latent. A negative one: the latent speaks against the answer, which is likelier without it. Masked
latents are zero. Source: Marks et al. 2024 (arXiv 2403.19647), who estimate it by attribution.

Exact, so it takes a row of a batch for each latent. Layers below the SAE run once per sequence.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float64
from torch import Tensor

from experiment import UserError
from experiment.intervention.ablations import Ablation
from experiment.intervention.forward import Below, SplicedModel
from experiment.intervention.layout import Layout
from experiment.intervention.memory import halve_on_oom
from experiment.intervention.rankings import Scores, add_up, find_targets, top_and_bottom
from experiment.intervention.rows import NOT_FINITE, pick_log_probs
from experiment.intervention.sequences import Sequences


@dataclass(frozen=True)
class Candidates:
    """The latents of a sequence whose effect is measured, ascending, and how many active ones are left out.

    latents: their ids.  left_out: None where the sequence has no answer inside the brackets: then nothing is measured.
    """

    latents: list[int] = field(default_factory=list)
    left_out: int | None = None


def find_candidates(
    model: SplicedModel,
    sequences: Sequences,
    scores: Collection[Scores],
    most: int,
) -> list[Candidates]:
    """Of each sequence the latents that are active at an ordinary position before the answer's last token.

    scores: of each ranking, [sequence, d_sae].  most: how many latents of a sequence, at most.
    Where there are more than `most` of them, first those in the TopK of one of these scores at K = 50%, then those that
    write most: by the sum over these positions of the activation's size times the norm of its decoder row.
    """
    candidates = [Candidates() for _ in sequences.rows]
    if not sequences.answered:
        return candidates
    tops = find_tops(sequences, scores)
    numbers = list(sequences.answered)
    places = list(sequences.answered.values())
    read = sequences.until(places, numbers)
    is_ordinary = sequences.find_ordinary(read, places, numbers)
    sizes = add_up(model, read, read.latents.values.abs(), is_ordinary)
    norms = model.splice.sae.W_dec.norm(dim=1)
    for number, of_sequence in zip(numbers, sizes):
        active = of_sequence.nonzero().flatten()
        written = of_sequence[active] * norms[active]
        order = []
        for latent, amount in zip(active.tolist(), written.tolist()):
            comes_later = latent not in tops[number]
            order.append((comes_later, -amount, latent))
        order.sort()
        chosen = [latent for _, _, latent in order[:most]]
        left_out = len(order) - len(chosen)
        candidates[number] = Candidates(sorted(chosen), left_out)
    return candidates


def find_tops(sequences: Sequences, scores: Collection[Scores]) -> list[set[int]]:
    """The latents of each sequence that are in the TopK at 50% of any of these scores."""
    tops = []
    for number, active in enumerate(sequences.active):
        half = len(active) // 2
        top: set[int] = set()
        for of_ranking in scores:
            topk, _ = top_and_bottom(of_ranking[number], half)
            top.update(topk)
        tops.append(top)
    return tops


def count_passes(lengths: Iterable[int], most: int, batch_tokens: int) -> int:
    """How many passes it takes to mask each of `most` latents alone in sequences of these lengths, in tokens."""
    passes = 0
    for length in lengths:
        in_a_pass = _latents_per_pass(length, batch_tokens)
        passes += math.ceil(most / in_a_pass)
    return passes


def _latents_per_pass(length: int, batch_tokens: int) -> int:
    """One row less than fits, for in the first one nothing is masked; one latent at least."""
    fits = batch_tokens // length
    return max(1, fits - 1)


@torch.no_grad()
def measure(
    model: SplicedModel,
    sequences: Sequences,
    candidates: list[Candidates],
    batch_tokens: int,
    on_measured: Callable[[int], None] = lambda count: None,
) -> list[list[float]]:
    """The effect of each candidate of each sequence, in nats per token: [sequence][candidate].

    batch_tokens: of one pass; two rows at least.  on_measured: called with 1 once a sequence is done.
    Raises UserError where logits are not finite, and the device's own error where even one latent is too much for its
    memory.
    """
    effects = []
    with model.ready():
        for number, of_sequence in enumerate(candidates):
            found = _measure_sequence(model, sequences, number, of_sequence.latents, batch_tokens)
            effects.append(found)
            on_measured(1)
    return effects


def _measure_sequence(
    model: SplicedModel,
    sequences: Sequences,
    number: int,
    latents: list[int],
    batch_tokens: int,
) -> list[float]:
    """The effects of these latents of one sequence."""
    if not latents:
        return []
    targets = find_targets(sequences, number)
    sequence = sequences.tokens_until(number, sequences.answered[number])
    layout = Layout([sequence], model.pad_id, model.device)
    below = model.forward_below(layout)
    effects: list[float] = []  # in the order of the latents: halves of a part are run one after the other

    def run(some: list[int]) -> None:
        # In every pass a row with nothing masked: in half precision the last digits hang on how many rows there are.
        alone = [[latent] for latent in some]
        masked = [[], *alone]
        means = _score_answer(model, below, Ablation(masked), targets)
        unmasked, *others = means.tolist()
        for mean in others:
            effects.append(unmasked - mean)

    size = _latents_per_pass(len(sequence), batch_tokens)
    for start in range(0, len(latents), size):
        some = latents[start : start + size]
        halve_on_oom(run, some, name="masks in a batch")
    if not all(map(math.isfinite, effects)):
        raise UserError(NOT_FINITE)
    return effects


def _score_answer(
    model: SplicedModel,
    below: Below,
    ablation: Ablation,
    targets: dict[int, int],
) -> Float64[Tensor, "row"]:
    """m under each item of the ablation. below: of the sequence.  targets: {position: token} of the answer's tokens."""
    count = len(ablation.latents)
    rows = []
    columns = []
    tokens = []
    for row in range(count):
        for position, token in targets.items():
            rows.append(row)
            columns.append(position - 1)  # the logits there say it
            tokens.append(token)
    outputs = (torch.tensor(rows), torch.tensor(columns))
    mask = model.splice.mask(ablation)
    rows_alike = repeat(below, count)
    logits, _ = model.forward_above(rows_alike, mask, outputs)
    ids = torch.tensor(tokens, device=logits.device)
    log_probs = pick_log_probs(logits, ids).double()
    of_rows = log_probs.view(count, -1)
    return of_rows.mean(1)


def repeat(below: Below, count: int) -> Below:
    """A batch of one row as one of so many rows alike. Its cache stays as it is: nothing may go on from there."""
    latents = below.latents
    start = below.start
    if latents is not None:
        of_rows = latents.every_position().repeat(count)
        latents = latents.take(of_rows)
    if start is not None:
        start = start.repeat(count, 1, 1)
    return dataclasses.replace(
        below,
        ids=below.ids.repeat(count, 1),
        attention=below.attention.repeat(count, 1),
        latents=latents,
        start=start,
    )
