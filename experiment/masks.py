"""Which side of a ranking a mask takes, how many latents of it, and which rankings are of a kind of their own. Knows
nothing of files or models."""

from typing import Literal

Side = Literal["topk", "bottomk"]
SIDES: tuple[Side, Side] = ("topk", "bottomk")
ROUND_NAMES: dict[Side, str] = {"topk": "false", "bottomk": "true"}  # the authors' names of rounds 2 and 3
EFFECT = "effect"  # the ranking by what masking each latent alone does
DRAWN = ("matched", "random")  # rankings whose lists are drawn, --draws times
OTHERS = ("other", "other-context")  # rankings that are another question's: the baseline's lists of it


def count_masked(k: str, active: int) -> int:
    """How many latents K is: a number, or a percentage (rounded down) of the latents that are active."""
    if not k.endswith("%"):
        return int(k)
    percent = int(k[:-1])
    return active * percent // 100


def count_to_reach(removed: list[float], target: float) -> int:
    """The smallest number of a list's latents that remove no less than `target`, 0 for nothing; all where none do."""
    if target <= 0:
        return 0
    for count, share in enumerate(removed, 1):
        if share >= target:
            return count
    return len(removed)
