"""What page.js shows: every question that was asked, its answers, and the latents that were masked."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiment import catalogue
from experiment.demo import bundled
from experiment.records.entries import MaskedEntry
from experiment.records.journal import Journal
from experiment.records.schema import KeptRecord, RankedQuestion, Record
from experiment.report import blocks, cells, metrics
from experiment.report.estimates import MASKS
from experiment.report.folders import Folder, find_masked_latents
from experiment.report.metrics import Cell

RIGHT_F1 = 0.9  # from which on an answer counts as right, as in round 1
LONGEST_ANSWER = 200  # characters
MOST_LATENTS = 40  # of a list that are shown
MOST_QUESTIONS = 3  # in which a latent matters most

ShownAnswer = tuple[str, str, int, float, int]  # answer, text, em, f1, named
ByQuestion = Mapping[str, Mapping[int, float]]  # {question id: {latent: a figure}}


@dataclass(frozen=True)
class Mask:
    """A masked round. latents: the number of the list that its masks are beginnings of; none of a control."""

    entry: MaskedEntry
    records: Journal
    latents: int | None


@dataclass(frozen=True)
class LatentList:
    """The lists that a ranking's TopK or BottomK are beginnings of: those that its largest K masks, by question."""

    name: str
    k: str
    of_question: dict[str, list[int]]


def collect(folder: Folder) -> dict[str, Any]:
    """What page.js shows, as compact as it can be read: each context once, what is as unmasked not again.

    contexts: texts.  neuronpedia: the beginning of the latents' addresses, or null.
    masks: {journal, ranking, mask, k, list, drop: {metric: text}, removed} of the masked rounds but K = 0.
    lists: {name, k, often} of latents; often: {latent: number of questions whose list holds it}.
    latents: [latent, mean activation or null, mean effect alone or null, numbers of the questions in which it matters
    most] of each that is in a list.  matters: by what that is told, "effect alone" or "place in NAME".
    questions: {id, context (number or null), question, truths, unmasked: an answer or null}, and of kept ones masked:
    an answer, 0 (as unmasked) or null (not asked), drops: of the answer's log probability or null, and counts: latents
    masked, for each mask; latents, and where they are known scores, for each list; effects: {latent: alone}.
    An answer is [answer, text, em, f1, named].
    """
    lists: list[LatentList] = []
    masks = list_masks(folder, lists)
    effects = find_effects(folder)
    contexts: dict[str, int] = {}  # numbers
    kept = set(folder.kept)
    questions = []
    for question_id in dict.fromkeys([*folder.answers, *folder.kept]):
        described = describe_question(folder, question_id, contexts)
        if question_id in kept:
            described |= describe_masks(folder, masks, question_id)
            described |= describe_latents(folder, masks, lists, question_id, effects.get(question_id, {}))
        questions.append(described)
    weights, matters = weigh_latents(effects, lists)
    numbers = {described["id"]: number for number, described in enumerate(questions)}
    provenance = folder.provenance
    release = bundled(provenance.sae_release or "")
    return {
        "right": RIGHT_F1,
        "contexts": list(contexts),
        "neuronpedia": catalogue.neuronpedia_page(release, provenance.sae_id or "", ""),
        "masks": [describe_mask(mask) for mask in masks],
        "lists": [describe_list(of_list) for of_list in lists],
        "latents": describe_all_latents(folder, lists, effects, find_foremost(weights, numbers)),
        "matters": matters,
        "questions": questions,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Masks and lists


def list_masks(folder: Folder, lists: list[LatentList]) -> list[Mask]:
    """The masked rounds but K = 0, in the table's order. lists: added to."""
    masks = []
    numbers: dict[tuple, int] = {}
    for entry, records in sorted(
        folder.masked, key=lambda pair: blocks.order_ranking(pair[0].provenance.ranking or "")
    ):
        if entry.masks_nothing:
            continue
        if entry.control is not None:
            masks.append(Mask(entry, records, None))
            continue
        key = (entry.provenance.ranking, entry.masked, entry.latents)
        number = numbers.setdefault(key, len(numbers))
        found = {question_id: find_masked_latents(folder, entry, question_id) for question_id in records}
        of_mask = LatentList(f"{entry.provenance.ranking} {MASKS[entry.masked]}", entry.k, found)
        if number == len(lists):
            lists.append(of_mask)
        elif count_all(of_mask) > count_all(lists[number]):
            lists[number] = of_mask
        masks.append(Mask(entry, records, number))
    return masks


def count_all(of_list: LatentList) -> int:
    return sum(map(len, of_list.of_question.values()))


def describe_mask(mask: Mask) -> dict[str, Any]:
    entry = mask.entry
    (line,) = blocks.make_lines([entry])
    drops = {}
    for metric in metrics.DROPS:
        cell = metric.read(entry)
        if cell is not None:
            unmarked = Cell(cell.value, cell.low, cell.high)
            text = cells.write_cell(unmarked, cells.find_digits(metric))
            drops[metric.name] = f"{metric.title} {text} {metric.unit}"
    name = line.mask if entry.provenance.ablation == "zero" else f"{line.mask}, {entry.provenance.ablation}"
    return {
        "journal": entry.journal,
        "ranking": line.name,
        "mask": name,
        "k": entry.k,
        "list": mask.latents,
        "drop": drops,
        "latents": round(entry.mean_k, 1),
        "removed": None if entry.removed is None else round(entry.removed, 1),
    }


def describe_list(of_list: LatentList) -> dict[str, Any]:
    often: collections.Counter[int] = collections.Counter()
    for latents in of_list.of_question.values():
        often.update(latents)
    return {"name": of_list.name, "k": of_list.k, "often": dict(sorted(often.items()))}


# ---------------------------------------------------------------------------------------------------------------------
# All latents


def describe_all_latents(
    folder: Folder, lists: Sequence[LatentList], effects: ByQuestion, foremost: Mapping[int, list[int]]
) -> list[tuple[int, float | None, float | None, list[int]]]:
    """(latent, mean activation, mean effect alone, questions in which it matters most) of those in any list.

    A mean is over the questions in which the figure was measured; None where it was in none.
    """
    listed: set[int] = set()
    for of_list in lists:
        for latents in of_list.of_question.values():
            listed.update(latents)
    activations = average(find_activations(folder))
    alone = average(effects)
    return [(n, activations.get(n), alone.get(n), foremost.get(n, [])) for n in sorted(listed)]


def find_activations(folder: Folder) -> ByQuestion:
    """Mean activations, which are the baseline's scores, where its file of activations has them."""
    for entry, _ in folder.masked:
        if entry.provenance.ranking == "baseline":
            of_file = folder.ranked.get(entry.latents or "", {})
            return {question_id: find_scores(ranked) for question_id, ranked in of_file.items()}
    return {}


def average(figures: ByQuestion) -> dict[int, float]:
    """{latent: mean over the questions that have a figure of it}"""
    totals: dict[int, float] = {}
    counts: collections.Counter[int] = collections.Counter()
    for of_question in figures.values():
        for latent, figure in of_question.items():
            totals[latent] = totals.get(latent, 0.0) + figure
            counts[latent] += 1
    return {latent: round_figure(total / counts[latent]) for latent, total in totals.items()}


def weigh_latents(effects: ByQuestion, lists: Sequence[LatentList]) -> tuple[ByQuestion, str]:
    """How much latents matter in each question, and by what that is told: their effects, else places in a list."""
    if effects:
        return effects, "effect alone"
    if not lists:
        return {}, ""
    first = lists[0]
    weights = {}
    for question_id, latents in first.of_question.items():
        weights[question_id] = {latent: 1 / (1 + place) for place, latent in enumerate(latents)}
    return weights, f"place in {first.name}"


def find_foremost(weights: ByQuestion, numbers: Mapping[str, int]) -> dict[int, list[int]]:
    """{latent: the numbers of the questions in which it matters most}, the first one most; none where it costs nothing.

    numbers: of questions, by id.
    """
    foremost: dict[int, list[tuple[float, int]]] = {}
    for question_id, of_question in weights.items():
        for latent, weight in of_question.items():
            if weight > 0 and question_id in numbers:
                found = foremost.setdefault(latent, [])
                found.append((-weight, numbers[question_id]))
                found.sort()
                del found[MOST_QUESTIONS:]
    return {latent: [number for _, number in found] for latent, found in foremost.items()}


# ---------------------------------------------------------------------------------------------------------------------
# A question


def describe_question(folder: Folder, question_id: str, contexts: dict[str, int]) -> dict[str, Any]:
    """What is known of it without any mask. contexts: numbers, added to."""
    question = folder.questions.get(question_id)
    record = folder.answers.get(question_id)
    described: dict[str, Any] = {"id": question_id, "unmasked": show_answer(record) if record else None}
    if question is None:
        return described | {"context": None, "question": question_id, "truths": []}
    number = contexts.setdefault(question.context, len(contexts))
    return described | {
        "context": number,
        "question": question.question,
        "truths": list(dict.fromkeys(question.truths)),
    }


def describe_masks(folder: Folder, masks: Sequence[Mask], question_id: str) -> dict[str, Any]:
    """Its answer under each mask, and what the unmasked answer's tokens lost in log probability."""
    before = folder.answers.get(question_id)
    unmasked = show_answer(before) if before else None
    answers: list[ShownAnswer | int | None] = []
    drops: list[float | None] = []
    for mask in masks:
        record = mask.records.get(question_id)
        answer = show_answer(record) if record else None
        is_as_unmasked = answer is not None and answer == unmasked
        answers.append(0 if is_as_unmasked else answer)
        ranked = (folder.ranked.get(mask.entry.latents or "") or {}).get(question_id)
        drops.append(find_drop(ranked, record) if ranked and record else None)
    return {"masked": answers, "drops": drops}


def show_answer(record: Record | RankedQuestion) -> ShownAnswer:
    """An answer as page.js takes it; of a file of activations, which has no text, the answer stands for it."""
    assert record.em is not None and record.f1 is not None  # every version has written them
    text = record.text if isinstance(record, Record) else record.answer
    named = record.em if record.named is None else record.named
    answer = record.answer
    if len(answer) > LONGEST_ANSWER:  # nothing was parsed from it: the text says the rest
        answer = f"{answer[:LONGEST_ANSWER]}..."
    return answer, text, int(record.em), round(record.f1, 3), int(named)


def find_drop(ranked: RankedQuestion, record: Record) -> float | None:
    """By how much the unmasked answer's tokens inside its brackets became less likely: nats per token, a mean."""
    before = ranked.log_probs
    after = record.log_probs
    if before is None or after is None or not ranked.inside:
        return None
    lost = [before[position] - after[position] for position in ranked.inside]
    return round(sum(lost) / len(lost), 3)


def describe_latents(
    folder: Folder,
    masks: Sequence[Mask],
    lists: Sequence[LatentList],
    question_id: str,
    effects: Mapping[int, float],
) -> dict[str, Any]:
    """The latents of each list, with the scores that are known, and the effects alone of those that are shown."""
    counts = []
    files = {}  # {number of a list: its file of activations}
    for mask in masks:
        if mask.latents is None:
            counts.append(0)
            continue
        counts.append(len(find_masked_latents(folder, mask.entry, question_id)))
        files[mask.latents] = mask.entry.latents or ""
    latents = []
    scores: list[list[float | None]] = []
    shown: set[int] = set()
    for number, of_list in enumerate(lists):
        of_question = of_list.of_question.get(question_id, [])[:MOST_LATENTS]
        latents.append(of_question)
        shown.update(of_question)
        known = find_scores(folder.ranked.get(files[number], {}).get(question_id))
        scores.append([known.get(latent) for latent in of_question] if known else [])
    described: dict[str, Any] = {"counts": counts, "latents": latents}
    if any(scores):
        described["scores"] = scores
    if effects:
        described["effects"] = {latent: effects[latent] for latent in sorted(shown) if latent in effects}
    return described


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
