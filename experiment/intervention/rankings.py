"""Scores of SAE latents. Knows nothing of files or SQuAD.

A ranking is a function that gives the scores [sequence, d_sae] of a batch, on the SAE's device; a latent whose score is
zero is in none of its lists. RANKINGS has those that have a name; one's own may stand in any file
(examples/own_ranking.py). `effects` measures what these scores are to tell.
"""

import random
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from experiment import UserError, own_rankings
from experiment.intervention.forward import SplicedModel
from experiment.intervention.gradients import gradients, log_prob_gradients, rows_at_once
from experiment.intervention.memory import halve_on_oom
from experiment.intervention.sequences import SequenceActivations, Sequences

Scores = Float[Tensor, "sequence d_sae"]
Seed = int | str


def add_up(
    model: SplicedModel,
    read: SequenceActivations,
    values: Float[Tensor, "entry"],
    where: Bool[Tensor, "pos"],
) -> Float64[Tensor, "sequence d_sae"]:
    """The sum of a latent's values over those positions of a sequence `where` it is true.

    read: as of `Sequences.until`: its latents in the order of its positions, a position at least of the last sequence.
    values: of the entries of `read.latents`.
    In double precision, so that the order in which a GPU adds up does not show.
    """
    latents = read.latents
    d_sae = model.splice.d_sae
    is_counted = where.repeat_interleave(latents.counts)
    rows = read.rows.repeat_interleave(latents.counts)
    count = int(read.rows.max()) + 1
    values = values.double() * is_counted
    total = values.new_zeros(count * d_sae)
    places = rows * d_sae + latents.ids
    total.index_add_(0, places, values)
    return total.view(count, d_sae)


def mean(
    model: SplicedModel,
    read: SequenceActivations,
    values: Float[Tensor, "entry"] | None = None,
    where: Bool[Tensor, "pos"] | None = None,
) -> Scores:
    """The mean size of each latent's activation (or the mean of other `values`) over a sequence's positions, or over
    those `where` it is true; over no position it is 0.

    read, values: as of `add_up`.  The positions are those where the SAE stands.
    The size, for there are SAEs with negative activations: of two latents the one that writes less ranks lower.
    """
    latents = read.latents
    if values is None:
        values = latents.values.abs()
    is_counted = latents.spliced
    if where is not None:
        is_counted = is_counted & where
    total = add_up(model, read, values, is_counted)
    rows = read.rows[is_counted]
    positions = rows.bincount(minlength=len(total))
    at_least_one = positions.clamp(min=1)
    means = total / at_least_one.unsqueeze(1)
    return means.float()


def rank_by_mean_activation(model: SplicedModel, sequences: Sequences, seed: Seed) -> Scores:
    """The baseline: mean activation over all positions, BOS included. Source: GradSAE (arXiv 2505.08080)."""
    return mean(model, sequences.ranked)


def rank_by_gradient(model: SplicedModel, sequences: Sequences, seed: Seed) -> Scores:
    """GradSAE: the mean over positions of relu(dP/dH * H), P the probability of the [ token that the model gave, H the
    activations. Source: GradSAE (arXiv 2505.08080)."""
    places = dict(enumerate(sequences.brackets))
    return _score_by_gradient(model, sequences, places)


def rank_by_gradient_of_answer(model: SplicedModel, sequences: Sequences, seed: Seed) -> Scores:
    """As GradSAE, but P is the probability of the answer's first token inside the brackets; no scores without one."""
    first_places = {}
    for number in sequences.answered:
        inside = sequences.answer_positions[number]
        first_places[number] = inside[0]
    return _score_by_gradient(model, sequences, first_places)


def _score_by_gradient(
    model: SplicedModel,
    sequences: Sequences,
    places: dict[int, int],
) -> Scores:
    """Mean over positions of relu(dP/dH * H), P the probability of the token at each sequence's place in what was
    generated; 0 for sequences without one. places: {sequence: place}."""
    scores = _no_scores(model, sequences)

    def score(part: list[int]) -> None:
        ends = []
        tokens = []
        next_ids = []
        for number in part:
            end = places[number]
            generated = sequences.generated[number]
            ends.append(end)
            tokens.append(sequences.tokens_until(number, end))
            next_ids.append(generated[end])
        read = sequences.until(ends, part)
        gradient, scale = gradients(model, tokens, next_ids, read)
        slopes = model.splice.decoder_vjp(read.latents, gradient)
        products = slopes * read.latents.values
        means = mean(model, read, products.relu())
        scaled = means * scale.unsqueeze(1)
        scores[part] = scaled.to(scores)

    _run_in_parts(model, score, sequences, places)
    return scores


def rank_by_attribution(model: SplicedModel, sequences: Sequences, seed: Seed) -> Scores:
    """Attribution: the sum over positions of H * dm/dH, with its sign; no scores without an answer inside the brackets.

    H: the activations at all positions before the answer's last token.  m: the mean log probability (nats per token) of
    the answer's own tokens inside the brackets, each given what stands before it.
    To first order that is m less m with the latent masked, so it estimates `effects` with one pass forward and one
    back: attribution patching (Nanda 2023, "Attribution Patching"; Syed et al. 2023, arXiv 2310.10348) to zero, for SAE
    latents as in Marks et al. 2024 (arXiv 2403.19647). A negative score: without it the answer is likelier.
    The gradient is the one at what stands in the model's place; where the error term stays, it is held fixed.
    """
    scores = _no_scores(model, sequences)

    def score(part: list[int]) -> None:
        ends = []
        tokens = []
        targets = []
        for number in part:
            end = sequences.answered[number]
            ends.append(end)
            tokens.append(sequences.tokens_until(number, end))
            targets.append(find_targets(sequences, number))
        read = sequences.until(ends, part)
        gradient, scale = log_prob_gradients(model, tokens, targets, read)
        slopes = model.splice.decoder_vjp(read.latents, gradient)
        products = slopes * read.latents.values
        total = add_up(model, read, products, read.latents.spliced)
        scaled = total * scale.unsqueeze(1)
        scores[part] = scaled.to(scores)

    _run_in_parts(model, score, sequences, sequences.answered)
    return scores


def find_targets(sequences: Sequences, number: int) -> dict[int, int]:
    """{position in the sequence: token} of the answer's tokens inside the brackets."""
    first = len(sequences.prompts[number])
    generated = sequences.generated[number]
    targets = {}
    for place in sequences.answer_positions[number]:
        targets[first + place] = generated[place]
    return targets


def _no_scores(model: SplicedModel, sequences: Sequences) -> Scores:
    """Zero for each latent of each sequence."""
    return torch.zeros(
        len(sequences.rows),
        model.splice.d_sae,
        device=model.splice.device,
    )


def _run_in_parts(
    model: SplicedModel,
    run: Callable[[list[int]], None],
    sequences: Sequences,
    places: dict[int, int],
) -> None:
    """run(some of these sequences), for all of them, as many at once as have room for their gradients, in `ready()`.

    places: {sequence: its end, a place in what was generated}.
    Raises the device's own error where even one sequence is too much for its memory.
    """
    numbers = list(places)
    if not numbers:
        return
    lengths = []
    for number, place in places.items():
        length = len(sequences.prompts[number]) + place
        lengths.append(length)
    size = rows_at_once(model, len(sequences.rows), max(lengths))
    with model.ready():
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            halve_on_oom(run, part)


def rank_at_random(model: SplicedModel, sequences: Sequences, seed: Seed) -> Scores:
    """A score drawn for each latent active at an ordinary position: TopK and BottomK are two draws of these."""
    scores = mean(model, sequences.ranked, where=sequences.ordinary)
    for question_id, row in zip(sequences.ids, scores):
        active = row.nonzero().flatten()
        generator = random.Random(f"{seed} {question_id}")
        drawn = []
        for _ in range(len(active)):
            score = 1 + generator.random()
            drawn.append(score)
        row[active] = row.new_tensor(drawn)
    return scores


def rank_matched(model: SplicedModel, sequences: Sequences, seed: Seed) -> Scores:
    """The fair control: as at random, but none of those that the baseline masks at K = 50%. Rounds 2 and 3 mask as many
    as it takes to remove no less of the residual stream than the baseline's K."""
    scores = rank_at_random(model, sequences, seed)
    baseline = rank_by_mean_activation(model, sequences, seed)
    for row, means, active in zip(scores, baseline, sequences.active):
        half = len(active) // 2
        topk, bottomk = top_and_bottom(means, half)
        row[topk] = 0
        row[bottomk] = 0
    return scores


def top_and_bottom(
    scores: Float[Tensor, "d_sae"],
    k: int,
    among: Sequence[int] | None = None,
) -> tuple[list[int], list[int]]:
    """The ids of the k highest scores, highest first, and of the k lowest, lowest first.

    among: the latents that have a score, ascending; None: those whose score is not zero.
    Equal scores stand in the order of their ids in both lists.
    """
    ids = scores.nonzero().flatten()
    if among is not None:
        ids = ids.new_tensor(among)
    of_ids = scores[ids]
    ascending = of_ids.sort(stable=True).indices
    descending = of_ids.sort(stable=True, descending=True).indices
    topk = ids[descending[:k]]
    bottomk = ids[ascending[:k]]
    return topk.tolist(), bottomk.tolist()


Ranking = Callable[[SplicedModel, Sequences, Seed], Scores]
RANKINGS: dict[str, Ranking] = {
    "baseline": rank_by_mean_activation,
    "gradsae": rank_by_gradient,
    "gradsae-answer": rank_by_gradient_of_answer,
    "attribution": rank_by_attribution,
    "matched": rank_matched,
    "random": rank_at_random,
}


def find_ranking(name: str) -> Ranking:
    """The function of a name of RANKINGS, or of FILE.py:FUNCTION, whose file is executed.

    Raises UserError for a file that cannot be read, or lacks the function; what is wrong in its code shows as it is.
    """
    if name in RANKINGS:
        return RANKINGS[name]
    return own_rankings.load(name)


def score_latents(model: SplicedModel, name: str, sequences: Sequences, seed: Seed) -> Scores:
    """The scores of a ranking. name: as of `find_ranking`.

    Raises UserError for scores of another shape, a score that is NaN, and a ranking that writes into what it is given.
    """
    ranking = find_ranking(name)
    given = (sequences.read.latents.values, sequences.ranked.latents.values)  # every other ranking's as well
    before = [values._version for values in given]  # how often each was written into
    scores = ranking(model, sequences, seed)
    if before != [values._version for values in given]:
        raise UserError(f"--ranking {name}: writes into the activations that it is given: clone() them first")
    shape = (len(sequences.rows), model.splice.d_sae)
    refuse_other_shape(name, scores, shape)
    refuse_nan(name, scores, sequences.ids)
    return scores


def refuse_other_shape(name: str, scores: object, shape: tuple[int, int]) -> None:
    """Raises UserError where a ranking's scores are none of this shape, [sequence, d_sae]."""
    given: object = type(scores).__name__
    if isinstance(scores, Tensor):
        given = tuple(scores.shape)
    if given != shape:
        raise UserError(f"--ranking {name}: gives {given}, not a tensor of scores [sequence, d_sae], here {shape}")


def refuse_nan(name: str, scores: Scores, ids: list[str]) -> None:
    """Raises UserError where a score is not a number: such latents would stand first in every list."""
    has_nan = scores.isnan().any(1)
    wrong = has_nan.nonzero().flatten().tolist()
    if wrong:
        first = ids[wrong[0]]
        raise UserError(
            f"--ranking {name}: gives scores that are not a number (NaN), first for question {first}: a mean over no "
            "position?"
        )
