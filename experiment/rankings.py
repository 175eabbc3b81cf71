"""Scores of SAE latents, and the TopK and BottomK by score. Knows nothing of files or SQuAD.

To add a ranking of your own, write a function that gives the scores [sequence, d_sae] of a batch, and put it into
RANKINGS: `--ranking` takes its name then.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiment import UserError

if TYPE_CHECKING:  # the command line reads RANKINGS, and is to answer before PyTorch is there
    from collections.abc import Sequence

    from jaxtyping import Bool, Float
    from torch import Tensor

    from experiment.answers import Trace
    from experiment.passes import SplicedModel
    from experiment.splice import Latents, Splice

STORED = 100  # latents of a list at least, so that --k 30 and --k 100 mean what they say
LONGEST = 1000  # of the lists of the matched ranking, which takes as many latents as remove enough
LISTS = ("topk", "bottomk")


@dataclass(frozen=True)
class Sequences:
    """The kept questions of a batch as a ranking sees them: lists with an item each.

    ids: the questions'.  prompts, generated: token ids.  brackets: the place in `generated` of the last token with a [
    in its text.  insides: the places there of the tokens inside the brackets.  rows: each one's in `trace`, which is
    the Trace of the whole batch.  special_ids: of the tokenizer's special tokens, BOS among them.
    """

    ids: list[str]
    prompts: list[list[int]]
    generated: list[list[int]]
    brackets: list[int]
    insides: list[list[int]]
    rows: list[int]
    trace: Trace
    special_ids: Sequence[int]

    def until(self, places, numbers=None):
        """The Trace of sequences (`numbers`; None: of all) up to these places in what was generated, one for each."""
        numbers = range(len(self.rows)) if numbers is None else numbers
        ends = [len(self.prompts[n]) + place for n, place in zip(numbers, places)]
        return self.trace.select([self.rows[n] for n in numbers], ends)

    @functools.cached_property
    def ranked(self):
        """The Trace that the paper ranks: up to the last [, without it."""
        return self.until(self.brackets)

    @functools.cached_property
    def active(self):
        """The latents active at the last position that is ranked, ascending: a list for each sequence."""
        latents, spliced = self.ranked.latents, self.ranked.latents.spliced
        last = self.ranked.rows.new_zeros(len(self.rows))
        last = last.scatter_reduce(0, self.ranked.rows[spliced], spliced.nonzero().flatten(), "amax")
        at_the_end = latents.take(last)
        return [ids.sort().values.tolist() for ids in at_the_end.ids.split(at_the_end.counts.tolist())]

    @functools.cached_property
    def ordinary(self) -> Bool[Tensor, " pos"]:
        """Where in `ranked` the SAE stands at a token that is not special. Controls are drawn and what masks remove is
        measured there: at BOS, whose norm is many times the others', an SAE's latents say nothing of the text."""
        import torch

        tokens = []
        for prompt, generated, bracket in zip(self.prompts, self.generated, self.brackets):
            tokens += prompt + generated[:bracket]
        device = self.ranked.latents.spliced.device
        special = torch.isin(torch.tensor(tokens, device=device), torch.tensor([*self.special_ids], device=device))
        return self.ranked.latents.spliced & ~special

    def read_ordinary(self) -> list[Latents]:
        """What the SAE read at the `ordinary` positions of each sequence."""
        positions = self.ordinary.nonzero().flatten()
        counts = self.ranked.rows[positions].bincount(minlength=len(self.rows)).tolist()
        return [self.ranked.latents.take(part) for part in positions.split(counts)]


def mean(
    model: SplicedModel,
    trace: Trace,
    values: Float[Tensor, " entry"] | None = None,
    where: Bool[Tensor, " pos"] | None = None,
) -> Float[Tensor, "sequence d_sae"]:
    """The mean size of each latent's activation (or the mean of other `values`) over a sequence's positions, or over
    those `where` it is true; over no position it is 0.

    The size, for there are SAEs with negative activations: of two latents the one that writes less ranks lower. In
    double precision, so that the order in which a GPU adds up does not show.
    """
    latents, rows, d_sae = trace.latents, trace.rows, model.splice.d_sae
    values = latents.values.abs() if values is None else values
    counted = latents.spliced if where is None else latents.spliced & where
    values = values.double() * counted.repeat_interleave(latents.counts)
    entries = rows.repeat_interleave(latents.counts) * d_sae + latents.ids
    count = int(rows.max()) + 1
    total = values.new_zeros(count * d_sae).index_add_(0, entries, values).view(count, d_sae)
    positions = rows[counted].bincount(minlength=count).clamp(min=1)
    return (total / positions.unsqueeze(1)).float()


def rank_by_mean_activation(model, sequences, seed):
    """The baseline: mean activation over all positions, BOS included. Source: GradSAE (arXiv 2505.08080)."""
    return mean(model, sequences.ranked)


def rank_by_gradient(model, sequences, seed):
    """GradSAE: the mean over positions of relu(dP/dH * H), P the probability of the [ token that the model gave, H the
    activations. Source: GradSAE (arXiv 2505.08080)."""
    return _score_by_gradient(model, sequences, sequences.brackets)


def rank_by_gradient_of_answer(model, sequences, seed):
    """As GradSAE, but P is the probability of the answer's first token inside the brackets; no scores without one."""
    return _score_by_gradient(model, sequences, [inside[0] if inside else None for inside in sequences.insides])


def _score_by_gradient(model, sequences, places):
    from experiment.answers import gradients, in_halves

    def work(part):
        ends = [places[n] for n in part]
        tokens = [sequences.prompts[n] + sequences.generated[n][:end] for n, end in zip(part, ends)]
        trace = sequences.until(ends, part)
        slopes, scale = gradients(model, tokens, [sequences.generated[n][end] for n, end in zip(part, ends)], trace)
        values = (model.splice.pull_back(trace.latents, slopes) * trace.latents.values).relu()
        return list(mean(model, trace, values) * scale.unsqueeze(1))

    numbers = [n for n, place in enumerate(places) if place is not None]
    # On its way back a token takes in every layer about 16 times what it takes in the cache (an estimate).
    size, scores = -(-len(places) // 16), sequences.ranked.latents.values.new_zeros(len(places), model.splice.d_sae)
    for start in range(0, len(numbers), size):
        part = numbers[start : start + size]
        for n, row in zip(part, in_halves(work, part)):
            scores[n] = row
    return scores


def rank_at_random(model: SplicedModel, sequences: Sequences, seed: int) -> Float[Tensor, "sequence d_sae"]:
    """A score drawn for each latent active at an ordinary position: TopK and BottomK are two draws of these."""
    scores = mean(model, sequences.ranked, where=sequences.ordinary)
    for question_id, row in zip(sequences.ids, scores):
        active, draw = row.nonzero().flatten(), random.Random(f"{seed} {question_id}")
        row[active] = row.new_tensor([1 + draw.random() for _ in active])
    return scores


def rank_matched(model: SplicedModel, sequences: Sequences, seed: int) -> Float[Tensor, "sequence d_sae"]:
    """The fair control: as at random, but none of those that the baseline masks at K = 50%. Rounds 2 and 3 mask as many
    as it takes to remove no less of the residual stream than the baseline's K."""
    scores = rank_at_random(model, sequences, seed)
    for row, means, active in zip(scores, rank_by_mean_activation(model, sequences, seed), sequences.active):
        for ids in top_and_bottom(means, len(active) // 2):
            row[ids] = 0
    return scores


RANKINGS = {
    "baseline": rank_by_mean_activation,
    "gradsae": rank_by_gradient,
    "gradsae-answer": rank_by_gradient_of_answer,
    "matched": rank_matched,
    "random": rank_at_random,
}


def rank(model: SplicedModel, name: str, sequences: Sequences, seed: int) -> list[dict]:
    """The lists of each sequence: topk and bottomk, and removed_topk and removed_bottomk beside them (`add_removed`).

    The lists hold 100 latents, or half of those active at the last position where that is more. Those of the matched
    ranking go on until they remove as much as the baseline's, which stand beside them as target_topk, target_bottomk.
    Raises UserError for a score that is NaN.
    """
    scores = RANKINGS[name](model, sequences, seed)
    refuse_nan(name, scores, sequences.ids)
    if name != "matched":
        return add_removed(model, sequences, cut_lists(scores, sequences))
    lists = add_removed(model, sequences, cut_lists(scores, sequences, LONGEST))
    baseline = rank(model, "baseline", sequences, seed)
    return [cut_matched(sample) for sample in add_targets(lists, baseline)]


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
    model: SplicedModel, sequences: Sequences, lists: list[dict], means: Float[Tensor, " d_sae"] | None = None
) -> list[dict]:
    """The lists, with what masking the first 1, 2, ... latents of each takes away (`removed.removed_share`).

    means: what masked latents are set to, None for zero.  Without these numbers where the SAE does not tell them.
    """
    from experiment.removed import removed_shares

    lists = [dict(sample) for sample in lists]
    if not model.splice.writes_rows:
        return lists
    positions = sequences.read_ordinary()
    for which in LISTS:
        shares = removed_shares(model.splice, positions, [sample[which] for sample in lists], means)
        for sample, of_sample in zip(lists, shares):
            sample[f"removed_{which}"] = of_sample
    return lists


def add_targets(lists: list[dict], baseline: list[dict]) -> list[dict]:
    """The matched ranking's lists, with what the baseline's remove."""
    with_targets = []
    for sample, theirs in zip(lists, baseline):
        targets = {f"target_{which}": theirs[f"removed_{which}"] for which in LISTS}
        with_targets.append(sample | targets)
    return with_targets


def cut_matched(sample: dict) -> dict:
    """The matched ranking's lists, as long as it takes to remove as much as any beginning of the baseline's."""
    shorter = {}
    for which in LISTS:
        removed = sample[f"removed_{which}"]
        enough = count_to_reach(removed, max(sample[f"target_{which}"], default=0))
        length = max(STORED, enough)
        shorter[which] = sample[which][:length]
        shorter[f"removed_{which}"] = removed[:length]
    return sample | shorter


def top_and_bottom(scores, k):
    """The ids of the k highest scores, highest first, and of the k lowest non-zero scores, lowest first.

    scores: [d_sae].  Equal scores stand in the order of their ids in both lists.
    """
    ids = scores.nonzero().flatten()
    ascending = scores[ids].sort(stable=True).indices
    descending = scores[ids].sort(stable=True, descending=True).indices
    return ids[descending[:k]].tolist(), ids[ascending[:k]].tolist()


def pick_latents(sample: dict, which: str, k: str) -> tuple[list[int], bool]:
    """The latents that a question has masked, and whether its list has as many as K asks for.

    K is a number, or a percentage (rounded down) of the latents active at the last position. Of the matched ranking
    as many are masked as it takes to remove no less than the baseline's first K.
    """
    latents = sample[which]
    target = find_target(sample, which, k)
    if target is None:
        count = count_masked(k, len(sample["active"]))
        return latents[:count], len(latents) >= count
    removed = sample[f"removed_{which}"]
    return latents[: count_to_reach(removed, target)], max(removed, default=0) >= target


def find_target(sample: dict, which: str, k: str) -> float | None:
    """What masking the baseline's first K latents takes away; None for rankings that are not matched to it."""
    if f"target_{which}" not in sample:
        return None
    first = sample[f"target_{which}"][: count_masked(k, len(sample["active"]))]
    return first[-1] if first else 0.0


def find_removed(sample: dict, which: str, count: int) -> float | None:
    """What masking the first `count` latents of a list takes away; None where the file does not say it."""
    if f"removed_{which}" not in sample:
        return None
    return sample[f"removed_{which}"][count - 1] if count else 0.0


def misses_target(sample: dict, which: str, k: str) -> bool:
    """Whether a question's matched latents remove more or less than the baseline's by over half of that."""
    target = find_target(sample, which, k)
    if target is None:
        return False
    latents, _ = pick_latents(sample, which, k)
    return abs(find_removed(sample, which, len(latents)) - target) > target / 2


def count_masked(k, active):
    return active * int(k[:-1]) // 100 if k.endswith("%") else int(k)


def count_to_reach(removed: list[float], target: float) -> int:
    """The smallest number of a list's latents that remove no less than `target`, 0 for nothing; all where none do."""
    if target <= 0:
        return 0
    return next((n for n, value in enumerate(removed, 1) if value >= target), len(removed))
