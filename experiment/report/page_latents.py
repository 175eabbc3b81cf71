"""The latents of the page: the lists that masks take them from, how often they are masked, where they matter."""

from __future__ import annotations

import collections
import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiment.masks import DRAWN
from experiment.records.entries import MaskedEntry
from experiment.records.journal import Journal
from experiment.records.schema import KeptRecord, RankedQuestion
from experiment.report.estimates import MASKS
from experiment.report.folders import Folder, find_masked_latents

MOST_LATENTS = 40  # of a list that are shown
MOST_EFFECTS = 10  # latents of a question, by what masking them alone costs, that are shown whether in a list or not
MOST_QUESTIONS = 3  # in which a latent matters most

Key = tuple[str, str, str]  # ranking, side, file of activations: what tells LatentLists apart
ByQuestion = Mapping[str, Mapping[int, float]]  # {question id: {latent: a figure}}


@dataclass(frozen=True)
class LatentList:
    """The lists that a ranking's TopK or BottomK are beginnings of; of a ranking that draws, the first draw's.

    name: ranking and side.  file: of activations, as in Folder.ranked.  of_k: {K: {question id: the latents}}.
    """

    name: str
    file: str
    of_k: dict[str, dict[str, list[int]]] = field(default_factory=dict)

    def find(self, question_id: str) -> list[int]:
        """A question's list, as long as the largest K takes it."""
        lists = [of_question.get(question_id, []) for of_question in self.of_k.values()]
        return max(lists, key=len)

    def count(self, k: str, question_id: str) -> int:
        """How many of a question's latents K takes."""
        return len(self.of_k[k].get(question_id, []))


def key_of(entry: MaskedEntry) -> Key:
    """That of the list which an entry's mask takes its latents from."""
    return entry.provenance.ranking or "", entry.masked, entry.latents or ""


def collect_lists(folder: Folder, masked: Iterable[tuple[MaskedEntry, list[Journal]]]) -> dict[Key, LatentList]:
    """The lists that masks take their latents from, in their order. masked: as in a Folder."""
    lists: dict[Key, LatentList] = {}
    for entry, (first, *_) in masked:
        key = key_of(entry)
        if key not in lists:
            lists[key] = LatentList(name_list(entry), entry.latents or "")
        of_k = lists[key].of_k
        if entry.k in of_k:  # a control, and what is kept alone, take the same
            continue
        of_k[entry.k] = {}
        for question_id in first:
            of_k[entry.k][question_id] = find_masked_latents(folder, entry, question_id)
    return lists


def name_list(entry: MaskedEntry) -> str:
    """Ranking and side; of lists that were drawn several times, which draw."""
    ranking = entry.provenance.ranking or ""
    name = f"{ranking} {MASKS[entry.masked]}"
    is_drawn = ranking in DRAWN and entry.draws is not None
    return f"{name}, first draw" if is_drawn else name


def list_all(lists: Iterable[LatentList]) -> list[int]:
    """The latents in any question's list, ascending."""
    found: set[int] = set()
    for of_list in lists:
        for of_question in of_list.of_k.values():
            for latents in of_question.values():
                found.update(latents)
    return sorted(found)


def describe_list(of_list: LatentList, latents: Sequence[int]) -> dict[str, Any]:
    """name; often: {K: for each of the latents the number of questions in which that K masks it}."""
    often = {}
    for k, of_question in of_list.of_k.items():
        counts: collections.Counter[int] = collections.Counter()
        for masked in of_question.values():
            counts.update(masked)
        often[k] = [counts[latent] for latent in latents]
    return {"name": of_list.name, "often": often}


# ---------------------------------------------------------------------------------------------------------------------
# All latents


def describe_all(
    folder: Folder, latents: Iterable[int], effects: ByQuestion, foremost: Mapping[int, list[tuple[int, float]]]
) -> list[tuple[int, float | None, float | None, list[int], list[float]]]:
    """(latent, mean activation, mean effect alone, questions in which it matters most, effects alone there) of each.

    A mean is over the questions in which the figure was measured; None where it was in none. Without effects alone the
    last list is empty.
    """
    activations = average(find_activations(folder))
    alone = average(effects)
    rows = []
    for latent in latents:
        questions = []
        costs = []
        for number, weight in foremost.get(latent, []):
            questions.append(number)
            if effects:
                costs.append(weight)
        activation = activations.get(latent)
        effect = alone.get(latent)
        rows.append((latent, activation, effect, questions, costs))
    return rows


def find_activations(folder: Folder) -> ByQuestion:
    """Mean activations, which are the baseline's scores, where its file of activations has them."""
    for entry, _ in folder.masked:
        if entry.provenance.ranking == "baseline":
            of_file = folder.ranked.get(entry.latents or "", {})
            return {question_id: find_scores(ranked) for question_id, ranked in of_file.items()}
    return {}


def average(figures: ByQuestion) -> dict[int, float]:
    """{latent: mean over the questions that have a figure of it}"""
    of_latents: dict[int, list[float]] = {}
    for of_question in figures.values():
        for latent, figure in of_question.items():
            of_latents.setdefault(latent, []).append(figure)
    means = {}
    for latent, measured in of_latents.items():
        mean = sum(measured) / len(measured)
        means[latent] = round_figure(mean)
    return means


def weigh(effects: ByQuestion, lists: Sequence[LatentList], ids: Iterable[str]) -> tuple[ByQuestion, str]:
    """How much latents matter in each question, and by what that is told: their effects, else places in a list."""
    if effects:
        return effects, "effect alone"
    if not lists:
        return {}, ""
    first = lists[0]
    weights = {}
    for question_id in ids:
        latents = first.find(question_id)
        weights[question_id] = {latent: 1 / (1 + place) for place, latent in enumerate(latents)}
    return weights, f"place in {first.name}"


def find_foremost(weights: ByQuestion, numbers: Mapping[str, int]) -> dict[int, list[tuple[int, float]]]:
    """{latent: (number, weight) of the questions in which it matters most, the first one most}; none where it costs
    nothing.

    numbers: of questions, by id.
    """
    weighed: dict[int, list[tuple[float, int]]] = {}  # {latent: [(-weight, number of a question)]}: smallest first
    for question_id, of_question in weights.items():
        number = numbers.get(question_id)
        if number is None:
            continue
        for latent, weight in of_question.items():
            if weight > 0:
                of_latent = weighed.setdefault(latent, [])
                of_latent.append((-weight, number))
    foremost = {}
    for latent, of_latent in weighed.items():
        first = heapq.nsmallest(MOST_QUESTIONS, of_latent)
        foremost[latent] = [(number, -weight) for weight, number in first]
    return foremost


# ---------------------------------------------------------------------------------------------------------------------
# A question's latents


def describe_question(
    folder: Folder, lists: Sequence[LatentList], question_id: str, effects: Mapping[int, float]
) -> dict[str, Any]:
    """latents: those of each list, and where they are known their scores; effects: {latent: alone} of those, and of
    the others that cost most."""
    latents = []
    scores: list[list[float | None]] = []
    shown = set(find_costliest(effects))
    for of_list in lists:
        of_question = of_list.find(question_id)[:MOST_LATENTS]
        latents.append(of_question)
        shown.update(of_question)
        known = find_scores(folder.ranked.get(of_list.file, {}).get(question_id))
        scores.append([known.get(latent) for latent in of_question] if known else [])
    described: dict[str, Any] = {"latents": latents}
    if any(scores):
        described["scores"] = scores
    if effects:
        described["effects"] = {latent: effects[latent] for latent in sorted(shown) if latent in effects}
    return described


def find_costliest(effects: Mapping[int, float]) -> list[int]:
    """The latents whose masking alone costs the answer most, the costliest first."""
    return heapq.nlargest(MOST_EFFECTS, effects, key=lambda latent: effects[latent])


def find_scores(ranked: RankedQuestion | None) -> dict[int, float]:
    """{latent: its ranking's score} of those that a file of activations has the scores of."""
    if ranked is None or ranked.measured is None or ranked.scores is None:
        return {}
    return {latent: round_figure(score) for latent, score in zip(ranked.measured, ranked.scores)}


def find_effects(folder: Folder) -> dict[str, dict[int, float]]:
    """{question id: {latent: what masking it alone costs the answer, nats per token}}, where round 1 measured it."""
    effects: dict[str, dict[int, float]] = {}
    for journal in folder.unmasked.values():
        for record in journal.values():
            if not isinstance(record, KeptRecord) or record.measured is None or record.effects is None:
                continue
            rounded = [round_figure(effect) for effect in record.effects]
            effects[record.id] = dict(zip(record.measured, rounded))
    return effects


def round_figure(value: float) -> float:
    """To three digits."""
    return float(f"{value:.3g}")
