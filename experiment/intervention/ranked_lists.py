"""TopK and BottomK by the scores of rankings, and what masking them takes away. Knows nothing of files or SQuAD."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from experiment import UserError
from experiment.intervention import effects
from experiment.intervention.effects import Candidates
from experiment.intervention.forward import SplicedModel
from experiment.intervention.rankings import (
    Scores,
    mean,
    score_latents,
    top_and_bottom,
)
from experiment.intervention.removed import removed_shares, round_to_four
from experiment.intervention.sequences import Sequences
from experiment.intervention.splice import Splice
from experiment.masks import DRAWN, EFFECT, SIDES, count_to_reach

STORED = 100  # latents of a list at least, so that --k 30 and --k 100 mean what they say
LONGEST = 1000  # of the lists of the matched ranking, which takes as many latents as remove enough


@dataclass(frozen=True)
class RankedLists:
    """The lists of a sequence, and what is known of them. Names as in files; None: not there.

    removed: what masking the first 1, 2, ... of a list takes away (`removed_share`).  target: of the matched ranking,
    what the baseline's take away.  measured: the latents whose single effect was measured.  effects: of each of them,
    in nats per token; of the ranking by effects alone.  scores: this ranking's own of each of them.  unmeasured: active
    latents without a measured effect.  more_draws: the lists of further draws.
    """

    topk: list[int]
    bottomk: list[int]
    removed_topk: list[float] | None = None
    removed_bottomk: list[float] | None = None
    target_topk: list[float] | None = None
    target_bottomk: list[float] | None = None
    measured: list[int] | None = None
    effects: list[float] | None = None
    scores: list[float] | None = None
    unmeasured: int | None = None
    more_draws: "list[RankedLists] | None" = None

    def latents(self, side: str) -> list[int]:
        """The list of this side, topk or bottomk."""
        return getattr(self, side)

    def removed(self, side: str) -> list[float]:
        """What masking the first 1, 2, ... of this side's list takes away."""
        removed = getattr(self, f"removed_{side}")
        assert removed is not None  # they are asked for where the SAE tells them
        return removed

    def fields(self) -> dict[str, Any]:
        """{name: value} of what is there, as a record has it."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                values[field.name] = value
        if self.more_draws is not None:
            values["more_draws"] = [draw.fields() for draw in self.more_draws]
        return values


@dataclass(frozen=True)
class Settings:
    """How rankings are made.

    seed: of those that draw.  batch_tokens: of a pass in which single latents are masked.  effects: how many latents of
    a sequence are masked alone, at most.  draws: lists that a ranking that draws makes for each sequence.
    """

    seed: int
    batch_tokens: int
    effects: int
    draws: int = 1


def rank_all(
    model: SplicedModel,
    names: Collection[str],
    sequences: Sequences,
    settings: Settings,
    given: Collection[str] = (),
    on_measured: Callable[[int], None] = lambda count: None,
) -> dict[str, list[RankedLists]]:
    """{name: the lists of each sequence by this ranking}.

    names, given: as --ranking takes them. given: all rankings of the command, where `names` are those still to be made.
    With the ranking by effects among them each ranking's lists also have its scores of the latents that are measured.
    on_measured: called with 1 once a sequence's effects are there.  Errors: as of `rank`.
    """
    is_measured = EFFECT in names or EFFECT in given
    scored = [*names]
    if is_measured:  # which latents are measured hangs on the scores of all rankings
        scored += given
    scores: dict[str, Scores] = {}
    for name in scored:
        if name != EFFECT and name not in scores:
            scores[name] = score_latents(model, name, sequences, settings.seed)
    lists = {}
    for name in names:
        if name != EFFECT:
            lists[name] = _rank_by(model, name, sequences, scores[name], settings.seed, settings.draws)
    if not is_measured:
        return lists
    candidates = effects.find_candidates(model, sequences, scores.values(), settings.effects)
    for name, of_ranking in lists.items():
        lists[name] = add_scores(of_ranking, candidates, scores[name])
    if EFFECT in names:
        measured = effects.measure(model, sequences, candidates, settings.batch_tokens, on_measured)
        lists[EFFECT] = rank_by_effects(model, sequences, candidates, measured)
    return lists


def rank(
    model: SplicedModel,
    name: str,
    sequences: Sequences,
    seed: int,
    draws: int = 1,
) -> list[RankedLists]:
    """The lists of each sequence by one ranking, but for that by effects, with what masking them takes away.

    name: as --ranking takes it.  draws: how many lists a ranking that draws makes for each sequence.
    The lists hold 100 latents, or half of those active at the last position where that is more. Those of the matched
    ranking go on until they remove as much as the baseline's.
    Raises UserError for scores of another shape, or a score that is NaN.
    """
    scores = score_latents(model, name, sequences, seed)
    return _rank_by(model, name, sequences, scores, seed, draws)


def _rank_by(
    model: SplicedModel,
    name: str,
    sequences: Sequences,
    scores: Scores,
    seed: int,
    draws: int,
) -> list[RankedLists]:
    """`rank`, where the scores of the first draw are there."""
    first = _rank_once(model, name, sequences, scores)
    if draws == 1 or name not in DRAWN:
        return first
    others = []
    for draw in range(2, draws + 1):
        drawn = score_latents(model, name, sequences, f"{seed} {draw}")
        of_draw = _rank_once(model, name, sequences, drawn)
        others.append(of_draw)
    return add_draws(first, others)


def _rank_once(
    model: SplicedModel,
    name: str,
    sequences: Sequences,
    scores: Scores,
) -> list[RankedLists]:
    """The lists of a single draw."""
    length = LONGEST if name == "matched" else None
    lists = cut_lists(scores, sequences, length)
    lists = add_removed(model, sequences, lists)
    if name != "matched":
        return lists
    lists = add_targets(model, sequences, lists)
    return [cut_matched(ranked) for ranked in lists]


def refuse_unmeasurable(name: str, splice: Splice) -> None:
    """Raises UserError for a ranking that needs to know what latents remove, with an SAE that does not tell."""
    if name == "matched" and not splice.writes_rows:
        how = splice.sae.cfg.normalize_activations
        raise UserError(
            "--ranking matched: what a latent of this SAE removes is not known, for decoding does more than add up the "
            f"latents' rows (normalize_activations: {how}): leave matched out"
        )


def cut_lists(scores: Scores, sequences: Sequences, length: int | None = None) -> list[RankedLists]:
    """topk and bottomk of each sequence. length: of each of them, in latents; None: as of `count_stored`."""
    lists = []
    for row, active in zip(scores, sequences.active):
        k = length or count_stored(active)
        topk, bottomk = top_and_bottom(row, k)
        lists.append(RankedLists(topk, bottomk))
    return lists


def count_stored(active: list[int]) -> int:
    """How many latents a list holds. active: those at the last position."""
    half = len(active) // 2
    return max(STORED, half)


def rank_by_effects(
    model: SplicedModel,
    sequences: Sequences,
    candidates: list[Candidates],
    measured: list[list[float]],
) -> list[RankedLists]:
    """The lists by the effects of those latents that were measured; the others are in none.

    TopK are those without which the answer is least likely. BottomK are the lowest: with a negative effect, those
    without which it is likelier.
    """
    lists = []
    for active, of_sequence, found in zip(sequences.active, candidates, measured):
        scores = torch.zeros(model.splice.d_sae, dtype=torch.float64)
        scores[of_sequence.latents] = scores.new_tensor(found)
        topk, bottomk = top_and_bottom(scores, count_stored(active), of_sequence.latents)
        ranked = RankedLists(
            topk,
            bottomk,
            measured=of_sequence.latents,
            effects=[round_to_four(effect) for effect in found],
            unmeasured=of_sequence.left_out,
        )
        lists.append(ranked)
    return add_removed(model, sequences, lists)


def add_scores(
    lists: list[RankedLists],
    candidates: list[Candidates],
    scores: Scores,
) -> list[RankedLists]:
    """A ranking's lists with its own scores of the latents whose effect is measured."""
    measured = []
    own = []
    for of_sequence, row in zip(candidates, scores):
        of_latents = row[of_sequence.latents].tolist()
        measured.append(of_sequence.latents)
        own.append([round_to_four(score) for score in of_latents])
    return _add_fields(lists, measured=measured, scores=own)


def add_removed(
    model: SplicedModel,
    sequences: Sequences,
    lists: Sequence[RankedLists],
    means: Float[Tensor, "d_sae"] | None = None,
) -> list[RankedLists]:
    """The lists, with what masking the first 1, 2, ... latents of each takes away (`removed.removed_share`).

    means: what masked latents are set to, None for zero.  Without these numbers where the SAE does not tell them.
    """
    if not model.splice.writes_rows:
        return list(lists)
    latents = sequences.take_ordinary()
    topk = removed_shares(model.splice, latents, [ranked.topk for ranked in lists], means)
    bottomk = removed_shares(model.splice, latents, [ranked.bottomk for ranked in lists], means)
    return _add_fields(lists, removed_topk=topk, removed_bottomk=bottomk)


def measure_again(
    model: SplicedModel,
    name: str,
    sequences: Sequences,
    lists: Sequence[RankedLists],
    means: Float[Tensor, "d_sae"],
) -> list[RankedLists]:
    """Lists that were made before, with what setting their latents to these means changes (`add_removed`).

    name: of the ranking that made them; matched has what that changes of the baseline's as its target.
    """
    measured = add_removed(model, sequences, lists, means)
    if name == "matched":
        measured = add_targets(model, sequences, measured, means)
    more_draws = [ranked.more_draws or [] for ranked in lists]  # [sequence][draw]
    draws = []
    for of_draw in zip(*more_draws):
        draws.append(add_removed(model, sequences, of_draw, means))
    return add_draws(measured, draws)


def add_draws(lists: list[RankedLists], draws: list[list[RankedLists]]) -> list[RankedLists]:
    """The lists of a first draw with those of further ones: [draw][sequence]. Targets stand with the first alone."""
    if not draws:
        return lists
    more_draws: list[list[RankedLists]] = [[] for _ in lists]  # [sequence][draw]
    for of_draw in draws:
        for more, drawn in zip(more_draws, of_draw):
            without_targets = dataclasses.replace(drawn, target_topk=None, target_bottomk=None)
            more.append(without_targets)
    return _add_fields(lists, more_draws=more_draws)


def add_targets(
    model: SplicedModel,
    sequences: Sequences,
    lists: list[RankedLists],
    means: Float[Tensor, "d_sae"] | None = None,
) -> list[RankedLists]:
    """The matched ranking's lists, with what the baseline's take away. means: as of `add_removed`."""
    scores = mean(model, sequences.ranked)
    baseline = cut_lists(scores, sequences)
    baseline = add_removed(model, sequences, baseline, means)
    topk = [theirs.removed_topk for theirs in baseline]
    bottomk = [theirs.removed_bottomk for theirs in baseline]
    return _add_fields(lists, target_topk=topk, target_bottomk=bottomk)


def cut_matched(ranked: RankedLists) -> RankedLists:
    """The matched ranking's lists, as long as it takes to remove as much as any beginning of the baseline's."""
    shorter: dict[str, Any] = {}
    for side in SIDES:
        latents = ranked.latents(side)
        removed = ranked.removed(side)
        target = getattr(ranked, f"target_{side}")
        most = max(target, default=0)
        enough = count_to_reach(removed, most)
        length = max(STORED, enough)
        shorter[side] = latents[:length]
        shorter[f"removed_{side}"] = removed[:length]
    return dataclasses.replace(ranked, **shorter)


def _add_fields(lists: Sequence[RankedLists], **columns: Sequence[object]) -> list[RankedLists]:
    """The lists with other values of some fields. columns: {field: its value for each sequence}."""
    changed = []
    for number, ranked in enumerate(lists):
        values: dict[str, Any] = {name: column[number] for name, column in columns.items()}
        changed.append(dataclasses.replace(ranked, **values))
    return changed
