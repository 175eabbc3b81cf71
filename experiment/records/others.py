"""Another question's lists: each kept question masked by what was ranked for another one. Knows nothing of models."""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from experiment.records.schema import Provenance, RankedLatents

Ranked = TypeVar("Ranked", bound=RankedLatents)
# Of the other question's latents; what they take away in this one is not known.
LISTS = ("active", "topk", "bottomk")
UNKNOWN = ("removed_topk", "removed_bottomk", "target_topk", "target_bottomk")


def take_from_others(
    provenance: Provenance, ranked: Mapping[str, Ranked], contexts: Mapping[str, Hashable]
) -> dict[str, Ranked]:
    """The ranked questions, each with the lists of another one; those for which there is none are left out.

    provenance: of the masked round; its ranking says which other one.  ranked: by id.  contexts: of each question of
    the data set, by id, in the data set's order.
    """
    ids = [question_id for question_id in contexts if question_id in ranked]
    if provenance.ranking == "other":
        sources = find_next_on_context(ids, contexts)
    else:
        sources = draw_from_other_contexts(ids, contexts, provenance.ranking_seed)
    swapped = {}
    for question_id, source in sources.items():
        swapped[question_id] = _take_lists(ranked[question_id], ranked[source])
    return swapped


def find_next_on_context(ids: Sequence[str], contexts: Mapping[str, Hashable]) -> dict[str, str]:
    """{id: that of the next question on the same context}, behind the last one the first; none for a single one."""
    on_context: dict[Hashable, list[str]] = {}
    for question_id in ids:
        on_context.setdefault(contexts[question_id], []).append(question_id)
    sources = {}
    for question_id in ids:
        alike = on_context[contexts[question_id]]
        following = alike[(alike.index(question_id) + 1) % len(alike)]
        if following != question_id:
            sources[question_id] = following
    return sources


def draw_from_other_contexts(ids: Sequence[str], contexts: Mapping[str, Hashable], seed: int | None) -> dict[str, str]:
    """{id: that of a question on another context}, drawn for each; none where all are on one context."""
    if len({contexts[question_id] for question_id in ids}) < 2:
        return {}
    sources = {}
    for question_id in ids:
        draw = random.Random(f"{seed} {question_id}")
        source = question_id
        while contexts[source] == contexts[question_id]:
            source = draw.choice(ids)
        sources[question_id] = source
    return sources


def _take_lists(question: Ranked, other: RankedLatents) -> Ranked:
    """A question with another one's lists, and the other one's active latents, of whose number K is a share."""
    fields = {name: value for name, value in question.fields().items() if name not in UNKNOWN}
    for name in LISTS:
        fields[name] = getattr(other, name)
    return type(question).model_validate(fields)
