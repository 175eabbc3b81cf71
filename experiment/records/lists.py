"""Which of a ranked question's latents a K masks, and what that takes away. Knows nothing of models."""

from __future__ import annotations

from experiment.records.schema import RankedLatents, Side

SIDES: tuple[Side, Side] = ("topk", "bottomk")


def find_latents_to_mask(question: RankedLatents, side: Side, k: str) -> tuple[list[int], bool]:
    """The latents that a question has masked, and whether its list has as many as K asks for.

    K is a number, or a percentage (rounded down) of the latents active at the last position. Of the matched ranking
    as many are masked as it takes to remove no less than the baseline's first K.
    """
    latents = question.latents(side)
    target = find_target(question, side, k)
    if target is None:
        count = count_masked(k, len(question.active))
        return latents[:count], len(latents) >= count
    removed = question.removed(side) or []
    return latents[: count_to_reach(removed, target)], max(removed, default=0) >= target


def find_target(question: RankedLatents, side: Side, k: str) -> float | None:
    """What masking the baseline's first K latents takes away; None for rankings that are not matched to it."""
    target = question.target(side)
    if target is None:
        return None
    first = target[: count_masked(k, len(question.active))]
    return first[-1] if first else 0.0


def find_removed(question: RankedLatents, side: Side, count: int) -> float | None:
    """What masking the first `count` latents of a list takes away; None where the file does not say it."""
    removed = question.removed(side)
    if removed is None:
        return None
    return removed[count - 1] if count else 0.0


def misses_target(question: RankedLatents, side: Side, k: str) -> bool:
    """Whether a question's matched latents remove more or less than the baseline's by over half of that."""
    target = find_target(question, side, k)
    if target is None:
        return False
    latents, _ = find_latents_to_mask(question, side, k)
    removed = find_removed(question, side, len(latents))
    assert removed is not None  # activations.refuse_untold has seen to it
    return abs(removed - target) > target / 2


def count_masked(k: str, active: int) -> int:
    """How many latents K is: a number, or a percentage (rounded down) of the latents that are active."""
    return active * int(k[:-1]) // 100 if k.endswith("%") else int(k)


def count_to_reach(removed: list[float], target: float) -> int:
    """The smallest number of a list's latents that remove no less than `target`, 0 for nothing; all where none do."""
    if target <= 0:
        return 0
    return next((n for n, value in enumerate(removed, 1) if value >= target), len(removed))
