"""What the page's scripts show: every question that was asked, its answers, and the latents that were masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiment import catalogue
from experiment.demo import bundled
from experiment.records.entries import MaskedEntry
from experiment.records.journal import Journal
from experiment.records.schema import RankedQuestion, Record
from experiment.report import blocks, cells, metrics, page_latents
from experiment.report.folders import Folder
from experiment.report.metrics import Cell

RIGHT_F1 = 0.9  # from which on an answer counts as right, as in round 1
LONGEST_ANSWER = 200  # characters

ShownAnswer = tuple[str, str, int, float, int]  # answer, text, em, f1, named


@dataclass(frozen=True)
class Mask:
    """A masked round. draws: the journals of its draws, of one where nothing is drawn several times.  of_list: the
    number of the list that its latents are a beginning of.  repeats: whether it is the same as a mask before it."""

    entry: MaskedEntry
    draws: list[Journal]
    of_list: int
    repeats: bool


def collect(folder: Folder) -> dict[str, Any]:
    """What the page's scripts show, as compact as it can be read: each context once, each answer to a question once.

    contexts: texts.  neuronpedia: the beginning of the latents' addresses, or null.
    masks: of `describe_mask`, those of the masked rounds but K = 0.  lists: of `page_latents.describe_list`.
    latents: [latent, mean activation or null, mean effect alone or null, numbers of the questions in which it matters
    most, its effects alone there] of each that is in a list.  matters: by what that is told, "effect alone" or
    "place in NAME".
    questions: {id, context (number or null), question, truths, answers: the unmasked one or null, then each other one},
    and of kept ones, for each mask, masked: the number of its answer, drops: of the answer's log probability, counts:
    latents of its list; latents, and where they are known scores, for each list; effects: {latent: alone}.
    An answer is [answer, text, em, f1, named]. Of a mask that was drawn several times, the number and the drop are
    lists, an item per draw; they are null where it was not asked, or not measured.
    """
    shown = list_shown(folder)
    by_key = page_latents.collect_lists(folder, shown)
    lists = list(by_key.values())
    masks = list_masks(shown, list(by_key))
    effects = page_latents.find_effects(folder)
    questions = describe_questions(folder, masks, lists, effects)
    numbers = {described["id"]: number for number, described in enumerate(questions)}
    weights, matters = page_latents.weigh(effects, lists, folder.kept)
    foremost = page_latents.find_foremost(weights, numbers)
    latents = page_latents.list_all(lists)
    provenance = folder.provenance
    release = bundled(provenance.sae_release or "")
    return {
        "right": RIGHT_F1,
        "contexts": list_contexts(folder),
        "neuronpedia": catalogue.neuronpedia_page(release, provenance.sae_id or "", ""),
        "masks": [describe_mask(mask) for mask in masks],
        "lists": [page_latents.describe_list(of_list, latents) for of_list in lists],
        "latents": page_latents.describe_all(folder, latents, effects, foremost),
        "matters": matters,
        "questions": questions,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def list_shown(folder: Folder) -> list[tuple[MaskedEntry, list[Journal]]]:
    """The masked rounds but K = 0, the baseline first and what chance does last."""
    shown = [(entry, draws) for entry, draws in folder.masked if not entry.masks_nothing]
    return sorted(shown, key=lambda pair: blocks.order_ranking(pair[0].provenance.ranking or ""))


def list_masks(shown: Sequence[tuple[MaskedEntry, list[Journal]]], keys: Sequence[page_latents.Key]) -> list[Mask]:
    """keys: of the lists."""
    masks = []
    keep_nothing: set[str] = set()  # by ablation: what keeps nothing is the same of all rankings
    for entry, draws in shown:
        ablation = entry.provenance.ablation
        number = keys.index(page_latents.key_of(entry))
        masks.append(Mask(entry, draws, number, repeats=entry.k == "0" and ablation in keep_nothing))
        if entry.k == "0":
            keep_nothing.add(ablation)
    return masks


def describe_mask(mask: Mask) -> dict[str, Any]:
    """journal, ranking, mask, k, list: what it is.  name: of the ranking, in words.  draws: how many.

    control, keeps, repeats: whether it is a control, masks everything but its latents, or is the same as one before.
    drop: {metric: text}, latents: masked per question, removed: percent of the norm or null, for the figure.
    """
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
        "name": line.words,
        "mask": name,
        "k": entry.k,
        "list": mask.of_list,
        "draws": len(mask.draws),
        "control": entry.control is not None,
        "keeps": bool(entry.keep_only),
        "repeats": mask.repeats,
        "drop": drops,
        "latents": round(entry.mean_k, 1),
        "removed": None if entry.removed is None else round(entry.removed, 1),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Questions


def list_contexts(folder: Folder) -> list[str]:
    """Those of the questions that were asked, each once."""
    contexts: dict[str, None] = {}
    for question_id in list_asked(folder):
        question = folder.questions.get(question_id)
        if question is not None:
            contexts[question.context] = None
    return list(contexts)


def list_asked(folder: Folder) -> list[str]:
    """The ids of the questions that are shown."""
    return list(dict.fromkeys([*folder.answers, *folder.kept]))


def describe_questions(
    folder: Folder,
    masks: Sequence[Mask],
    lists: Sequence[page_latents.LatentList],
    effects: page_latents.ByQuestion,
) -> list[dict[str, Any]]:
    """All that were asked, with what masks did to those that were kept."""
    contexts = {context: number for number, context in enumerate(list_contexts(folder))}
    kept = set(folder.kept)
    questions = []
    for question_id in list_asked(folder):
        described = describe_question(folder, question_id, contexts)
        if question_id in kept:
            described |= describe_masks(folder, masks, question_id)
            described["counts"] = [lists[mask.of_list].count(mask.entry.k, question_id) for mask in masks]
            described |= page_latents.describe_question(folder, lists, question_id, effects.get(question_id, {}))
        questions.append(described)
    return questions


def describe_question(folder: Folder, question_id: str, contexts: Mapping[str, int]) -> dict[str, Any]:
    """What is known of it without any mask. contexts: numbers."""
    question = folder.questions.get(question_id)
    record = folder.answers.get(question_id)
    described: dict[str, Any] = {"id": question_id, "answers": [show_answer(record) if record else None]}
    if question is None:
        return described | {"context": None, "question": question_id, "truths": []}
    return described | {
        "context": contexts[question.context],
        "question": question.question,
        "truths": list(dict.fromkeys(question.truths)),
    }


def describe_masks(folder: Folder, masks: Sequence[Mask], question_id: str) -> dict[str, Any]:
    """Its answers, which of them stands under each mask, and what the unmasked answer's tokens lost there."""
    before = folder.answers.get(question_id)
    numbers: dict[ShownAnswer | None, int] = {show_answer(before) if before else None: 0}
    masked: list[int | list[int] | None] = []
    drops: list[float | None | list[float | None]] = []
    for mask in masks:
        ranked = folder.ranked.get(mask.entry.latents or "", {}).get(question_id)
        records = [journal[question_id] for journal in mask.draws if question_id in journal]
        of_mask = [numbers.setdefault(show_answer(record), len(numbers)) for record in records]
        lost = [find_drop(ranked, record) for record in records]
        if not records:
            masked.append(None)
            drops.append(None)
        elif len(mask.draws) == 1:
            masked.append(of_mask[0])
            drops.append(lost[0])
        else:
            masked.append(of_mask)
            drops.append(lost)
    return {"answers": list(numbers), "masked": masked, "drops": drops}


def show_answer(record: Record | RankedQuestion) -> ShownAnswer:
    """An answer as the page's scripts take it."""
    assert record.em is not None and record.f1 is not None  # every version has written them
    named = record.em if record.named is None else record.named
    return shorten(record.answer), find_text(record), int(record.em), round(record.f1, 3), int(named)


def find_text(record: Record | RankedQuestion) -> str:
    """What was generated; of a file of activations, which has no text, the answer stands for it."""
    return record.text if isinstance(record, Record) else record.answer


def shorten(answer: str) -> str:
    """An answer that a row has room for: where nothing was parsed from a text, the answer is all of it."""
    if len(answer) <= LONGEST_ANSWER:
        return answer
    return f"{answer[:LONGEST_ANSWER]}..."


def find_drop(ranked: RankedQuestion | None, record: Record) -> float | None:
    """By how much the unmasked answer's tokens inside its brackets became less likely: nats per token, a mean."""
    if ranked is None or ranked.log_probs is None or record.log_probs is None or not ranked.inside:
        return None
    lost = [ranked.log_probs[position] - record.log_probs[position] for position in ranked.inside]
    return round(sum(lost) / len(lost), 3)
