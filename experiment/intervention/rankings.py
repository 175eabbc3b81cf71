"""Scores of SAE latents, and the TopK and BottomK by score. Knows nothing of files or SQuAD.

A ranking is a function that gives the scores [sequence, d_sae] of a batch. RANKINGS has those that have a name; one's
own may stand in any file (examples/own_ranking.py).
"""

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from experiment import UserError, own_rankings
from experiment.intervention.forward import SplicedModel
from experiment.intervention.gradients import gradients, rows_at_once
from experiment.intervention.memory import halve_on_oom
from experiment.intervention.removed import removed_shares
from experiment.intervention.sequences import SequenceActivations
from experiment.intervention.splice import SparseActivations, Splice
from experiment.records.lists import SIDES, count_to_reach

STORED = 100  # latents of a list at least, so that --k 30 and --k 100 mean what they say
LONGEST = 1000  # of the lists of the matched ranking, which takes as many latents as remove enough
Scores = Float[Tensor, "sequence d_sae"]


@dataclass(frozen=True)
class Sequences:
    """The kept questions of a batch as a ranking sees them: lists with an item each.

    ids: the questions'.  prompts, generated: token ids.  brackets: the place in `generated` of the last token with a [
    in its text.  answer_positions: the places there of the tokens inside the brackets.  rows: each one's in `read`,
    which is what the SAE read in the whole group.  special_ids: of the tokenizer's special tokens, BOS among them.
    """

    ids: list[str]
    prompts: list[list[int]]
    generated: list[list[int]]
    brackets: list[int]
    answer_positions: list[list[int]]
    rows: list[int]
    read: SequenceActivations
    special_ids: Sequence[int]

    def until(self, places: Sequence[int], numbers: Sequence[int] | None = None) -> SequenceActivations:
        """What the SAE read in sequences (`numbers`; None: in all) up to these places in what was generated."""
        numbers = range(len(self.rows)) if numbers is None else numbers
        ends = [len(self.prompts[number]) + place for number, place in zip(numbers, places)]
        return self.read.select([self.rows[number] for number in numbers], ends)

    @functools.cached_property
    def ranked(self) -> SequenceActivations:
        """What the paper ranks: each sequence up to the last [, without it."""
        return self.until(self.brackets)

    @functools.cached_property
    def active(self) -> list[list[int]]:
        """The latents active at the last position that is ranked, ascending: a list for each sequence."""
        spliced = self.ranked.latents.spliced
        last = self.ranked.rows.new_zeros(len(self.rows))
        last = last.scatter_reduce(0, self.ranked.rows[spliced], spliced.nonzero().flatten(), "amax")
        at_the_end = self.ranked.latents.take(last)
        counts = at_the_end.counts.tolist()
        ids = at_the_end.ids.tolist()
        active = []
        first = 0
        for count in counts:
            active.append(sorted(ids[first : first + count]))
            first += count
        return active

    @functools.cached_property
    def ordinary(self) -> Bool[Tensor, " pos"]:
        """Where in `ranked` the SAE stands at a token that is not special. Controls are drawn and what masks remove is
        measured there: at BOS, whose norm is many times the others', an SAE's latents say nothing of the text."""
        tokens = []
        for prompt, generated, bracket in zip(self.prompts, self.generated, self.brackets):
            tokens += prompt + generated[:bracket]
        device = self.ranked.latents.spliced.device
        special = torch.isin(torch.tensor(tokens, device=device), torch.tensor([*self.special_ids], device=device))
        return self.ranked.latents.spliced & ~special

    def read_ordinary(self) -> list[SparseActivations]:
        """What the SAE read at the `ordinary` positions of each sequence."""
        positions = self.ordinary.nonzero().flatten()
        counts = self.ranked.rows[positions].bincount(minlength=len(self.rows)).tolist()
        return [self.ranked.latents.take(part) for part in positions.split(counts)]


def mean(
    model: SplicedModel,
    read: SequenceActivations,
    values: Float[Tensor, " entry"] | None = None,
    where: Bool[Tensor, " pos"] | None = None,
) -> Float[Tensor, "sequence d_sae"]:
    """The mean size of each latent's activation (or the mean of other `values`) over a sequence's positions, or over
    those `where` it is true; over no position it is 0.

    The size, for there are SAEs with negative activations: of two latents the one that writes less ranks lower. In
    double precision, so that the order in which a GPU adds up does not show.
    """
    latents, rows, d_sae = read.latents, read.rows, model.splice.d_sae
    values = latents.values.abs() if values is None else values
    counted = latents.spliced if where is None else latents.spliced & where
    values = values.double() * counted.repeat_interleave(latents.counts)
    entries = rows.repeat_interleave(latents.counts) * d_sae + latents.ids
    count = int(rows.max()) + 1
    total = values.new_zeros(count * d_sae).index_add_(0, entries, values).view(count, d_sae)
    positions = rows[counted].bincount(minlength=count).clamp(min=1)
    return (total / positions.unsqueeze(1)).float()


def rank_by_mean_activation(model: SplicedModel, sequences: Sequences, seed: int) -> Scores:
    """The baseline: mean activation over all positions, BOS included. Source: GradSAE (arXiv 2505.08080)."""
    return mean(model, sequences.ranked)


def rank_by_gradient(model: SplicedModel, sequences: Sequences, seed: int) -> Scores:
    """GradSAE: the mean over positions of relu(dP/dH * H), P the probability of the [ token that the model gave, H the
    activations. Source: GradSAE (arXiv 2505.08080)."""
    return _score_by_gradient(model, sequences, sequences.brackets)


def rank_by_gradient_of_answer(model: SplicedModel, sequences: Sequences, seed: int) -> Scores:
    """As GradSAE, but P is the probability of the answer's first token inside the brackets; no scores without one."""
    first_places = [inside[0] if inside else None for inside in sequences.answer_positions]
    return _score_by_gradient(model, sequences, first_places)


def _score_by_gradient(
    model: SplicedModel, sequences: Sequences, places: Sequence[int | None]
) -> Float[Tensor, "sequence d_sae"]:
    """Mean over positions of relu(dP/dH * H), P the probability of the token at each sequence's place in what was
    generated; 0 for sequences without one."""
    scores = sequences.ranked.latents.values.new_zeros(len(places), model.splice.d_sae)
    place_of = {number: place for number, place in enumerate(places) if place is not None}

    def score(part: Sequence[int]) -> None:
        ends = [place_of[number] for number in part]
        tokens = []
        next_ids = []
        for number, end in zip(part, ends):
            tokens.append(sequences.prompts[number] + sequences.generated[number][:end])
            next_ids.append(sequences.generated[number][end])
        read = sequences.until(ends, part)
        slopes, scale = gradients(model, tokens, next_ids, read)
        values = (model.splice.decoder_vjp(read.latents, slopes) * read.latents.values).relu()
        scores[list(part)] = (mean(model, read, values) * scale.unsqueeze(1)).to(scores)

    numbers = list(place_of)
    width = max((len(sequences.prompts[number]) + place for number, place in place_of.items()), default=0)
    size = rows_at_once(model, len(places), width)
    for start in range(0, len(numbers), size):
        halve_on_oom(score, numbers[start : start + size])
    return scores


def rank_at_random(model: SplicedModel, sequences: Sequences, seed: int) -> Scores:
    """A score drawn for each latent active at an ordinary position: TopK and BottomK are two draws of these."""
    scores = mean(model, sequences.ranked, where=sequences.ordinary)
    for question_id, row in zip(sequences.ids, scores):
        active = row.nonzero().flatten()
        draw = random.Random(f"{seed} {question_id}")
        row[active] = row.new_tensor([1 + draw.random() for _ in range(len(active))])
    return scores


def rank_matched(model: SplicedModel, sequences: Sequences, seed: int) -> Scores:
    """The fair control: as at random, but none of those that the baseline masks at K = 50%. Rounds 2 and 3 mask as many
    as it takes to remove no less of the residual stream than the baseline's K."""
    scores = rank_at_random(model, sequences, seed)
    for row, means, active in zip(scores, rank_by_mean_activation(model, sequences, seed), sequences.active):
        for ids in top_and_bottom(means, len(active) // 2):
            row[ids] = 0
    return scores


Ranking = Callable[[SplicedModel, Sequences, int], Scores]
RANKINGS: dict[str, Ranking] = {
    "baseline": rank_by_mean_activation,
    "gradsae": rank_by_gradient,
    "gradsae-answer": rank_by_gradient_of_answer,
    "matched": rank_matched,
    "random": rank_at_random,
}


def find_ranking(name: str) -> Ranking:
    """The function of a name of RANKINGS, or of FILE.py:FUNCTION, whose file is executed."""
    return RANKINGS[name] if name in RANKINGS else own_rankings.load(name)


def rank(model: SplicedModel, name: str, sequences: Sequences, seed: int) -> list[dict[str, Any]]:
    """The lists of each sequence: topk and bottomk, and removed_topk and removed_bottomk beside them (`add_removed`).

    name: as --ranking takes it.
    The lists hold 100 latents, or half of those active at the last position where that is more. Those of the matched
    ranking go on until they remove as much as the baseline's, which stand beside them as target_topk, target_bottomk.
    Raises UserError for scores of another shape, or a score that is NaN.
    """
    scores = find_ranking(name)(model, sequences, seed)
    refuse_other_shape(name, scores, (len(sequences.rows), model.splice.d_sae))
    refuse_nan(name, scores, sequences.ids)
    if name != "matched":
        return add_removed(model, sequences, cut_lists(scores, sequences))
    lists = add_removed(model, sequences, cut_lists(scores, sequences, LONGEST))
    baseline = rank(model, "baseline", sequences, seed)
    return [cut_matched(sample) for sample in add_targets(lists, baseline)]


def refuse_other_shape(name: str, scores: object, shape: tuple[int, int]) -> None:
    """Raises UserError where a ranking's scores are none of this shape, [sequence, d_sae]."""
    given = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    if given != shape:
        raise UserError(f"--ranking {name}: gives {given}, not a tensor of scores [sequence, d_sae], here {shape}")


def refuse_nan(name: str, scores: Float[Tensor, "sequence d_sae"], ids: list[str]) -> None:
    """Raises UserError where a score is not a number: such latents would stand first in every list."""
    wrong = scores.isnan().any(1).nonzero().flatten().tolist()
    if wrong:
        raise UserError(
            f"--ranking {name}: gives scores that are not a number (NaN), first for question {ids[wrong[0]]}: a mean "
            "over no position?"
        )


def refuse_unmeasurable(name: str, splice: Splice) -> None:
    """Raises UserError for a ranking that needs to know what latents remove, with an SAE that does not tell."""
    if name == "matched" and not splice.writes_rows:
        raise UserError(
            "--ranking matched: what a latent of this SAE removes is not known, for decoding does more than add up the "
            f"latents' rows (normalize_activations: {splice.sae.cfg.normalize_activations}): leave matched out"
        )


def cut_lists(
    scores: Float[Tensor, "sequence d_sae"], sequences: Sequences, length: int | None = None
) -> list[dict[str, list[int]]]:
    """topk and bottomk of each sequence, so many latents of each; None: as many as are stored."""
    lists = []
    for row, active in zip(scores, sequences.active):
        topk, bottomk = top_and_bottom(row, length or max(STORED, len(active) // 2))
        lists.append({"topk": topk, "bottomk": bottomk})
    return lists


def add_removed(
    model: SplicedModel, sequences: Sequences, lists: list[dict[str, Any]], means: Float[Tensor, " d_sae"] | None = None
) -> list[dict[str, Any]]:
    """The lists, with what masking the first 1, 2, ... latents of each takes away (`removed.removed_share`).

    means: what masked latents are set to, None for zero.  Without these numbers where the SAE does not tell them.
    """
    lists = [dict(sample) for sample in lists]
    if not model.splice.writes_rows:
        return lists
    positions = sequences.read_ordinary()
    for which in SIDES:
        shares = removed_shares(model.splice, positions, [sample[which] for sample in lists], means)
        for sample, of_sample in zip(lists, shares):
            sample[f"removed_{which}"] = of_sample
    return lists


def add_targets(lists: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The matched ranking's lists, with what the baseline's remove."""
    with_targets = []
    for sample, theirs in zip(lists, baseline):
        targets = {f"target_{which}": theirs[f"removed_{which}"] for which in SIDES}
        with_targets.append(sample | targets)
    return with_targets


def cut_matched(sample: dict[str, Any]) -> dict[str, Any]:
    """The matched ranking's lists, as long as it takes to remove as much as any beginning of the baseline's."""
    shorter: dict[str, Any] = {}
    for which in SIDES:
        removed = sample[f"removed_{which}"]
        enough = count_to_reach(removed, max(sample[f"target_{which}"], default=0))
        length = max(STORED, enough)
        shorter[which] = sample[which][:length]
        shorter[f"removed_{which}"] = removed[:length]
    return sample | shorter


def top_and_bottom(scores: Float[Tensor, "d_sae"], k: int) -> tuple[list[int], list[int]]:
    """The ids of the k highest scores, highest first, and of the k lowest non-zero scores, lowest first.

    Equal scores stand in the order of their ids in both lists.
    """
    ids = scores.nonzero().flatten()
    ascending = scores[ids].sort(stable=True).indices
    descending = scores[ids].sort(stable=True, descending=True).indices
    return ids[descending[:k]].tolist(), ids[ascending[:k]].tolist()
