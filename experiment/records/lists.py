"""Which of a ranked question's latents a K masks, and what that takes away. Knows nothing of models.

A sample is a kept question's record: `active`, `topk`, `bottomk`, and beside a list what masking its first 1, 2, ...
latents removes (`removed_topk`), and what that of the baseline's removes (`target_topk`, of the matched ranking).
"""

SIDES = ("topk", "bottomk")


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


def count_masked(k: str, active: int) -> int:
    """How many latents K is: a number, or a percentage (rounded down) of the latents that are active."""
    return active * int(k[:-1]) // 100 if k.endswith("%") else int(k)


def count_to_reach(removed: list[float], target: float) -> int:
    """The smallest number of a list's latents that remove no less than `target`, 0 for nothing; all where none do."""
    if target <= 0:
        return 0
    return next((n for n, value in enumerate(removed, 1) if value >= target), len(removed))
