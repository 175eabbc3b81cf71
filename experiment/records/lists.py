"""What a masked round takes from a file of ranked latents: which of them a K masks, and what that takes away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiment.masks import Side, count_masked, count_to_reach
from experiment.records.provenance import digest_ranked
from experiment.records.schema import Provenance, RankedLatents


@dataclass(frozen=True)
class RankedFile:
    """The ranked latents of a file of activations, of which a round masks one side.

    provenance: of that round, or of one of its masks.  path: the file's.  name: the file's in results.json, without the
    folder where it is the output folder's own or ships.  questions: by question id.  missing: the questions that the
    data set lacks.  selection: round 1's --limit, --sample and --seed; None where the file does not say (the authors'):
    then it has no unmasked answers either.
    """

    provenance: Provenance
    path: Path
    name: str
    questions: Mapping[str, RankedLatents]
    side: Side
    missing: list[str]
    selection: dict[str, int | None] | None

    def digest_used(self, ids: Sequence[str]) -> dict[str, str]:
        """The field of a provenance that says what a round uses of the latents of these questions."""
        return {"activations": digest_ranked(self.questions, self.side, ids)}

    def with_digest(self, ids: Sequence[str]) -> RankedFile:
        """The same, with `digest_used` in its provenance."""
        provenance = self.provenance.with_fields(**self.digest_used(ids))
        return replace(self, provenance=provenance)

    def of_draw(self, draw: int, ids: Sequence[str]) -> RankedFile:
        """The same with the lists of another draw, the first of which is 1. ids: of the questions that are selected."""
        if draw == 1:
            return self
        questions = {question_id: question.of_draw(draw) for question_id, question in self.questions.items()}
        return replace(self, questions=questions).with_digest(ids)


def find_latents_to_mask(question: RankedLatents, side: Side, k: str) -> tuple[list[int], bool]:
    """The latents that a question has masked, and whether its list has as many as K asks for.

    K is a number, or a percentage (rounded down) of the latents active at the last position. Of the matched ranking
    as many are masked as it takes to remove no less than the baseline's first K.
    """
    latents = question.latents(side)
    target = find_target(question, side, k)
    if target is None:
        count = count_masked(k, len(question.active))
        is_enough = len(latents) >= count
    else:
        removed = question.removed(side) or []
        count = count_to_reach(removed, target)
        is_enough = max(removed, default=0) >= target
    return latents[:count], is_enough


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
