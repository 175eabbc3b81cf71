"""The page: results.html, one file without network, to look at single questions. Knows nothing of models.

page.html, page.css and page.js are its parts; the searchable table is DataTables, which itables brings along.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import jinja2

from experiment import catalogue
from experiment.demo import bundled
from experiment.questions import Question
from experiment.records.entries import Entry, MaskedEntry, UnmaskedEntry
from experiment.records.journal import Journal
from experiment.records.schema import RankedQuestion, Record
from experiment.report import estimates, tables
from experiment.report.cells import write_cells
from experiment.report.folders import Folder, find_masked_latents

RIGHT_F1 = 0.9  # from which on an answer counts as parsed right, as in round 1
LONGEST = 100  # latents of a list that are shown
# Neuronpedia's issue 123. Not known of other models.
CAVEATS = {"gemma-2-9b-it": "Neuronpedia's pages on gemma-2-9b-it were made with a wrongly placed BOS token."}
FACTS = {
    "model": "model",
    "SAE": "sae_release",
    "SAE id": "sae_id",
    "place": "hook_name",
    "latents": "d_sae",
    "error term": "error_term",
    "data set": "dataset",
    "split": "split",
    "configuration": "dataset_config",
    "precision": "dtype",
    "SAE's precision": "sae_dtype",
    "device": "device",
    "longest answer, tokens": "max_new_tokens",
}


ShownAnswer = tuple[str, str, int, float, int]  # answer, text, em, f1, named


def write_page(file: IO[str], folders: list[Folder], entries: list[Entry], svg: str) -> None:
    """Writes the page of these Folders to a text file.

    entries: of all of them, for the table.  svg: the figure; empty where nothing was masked.
    """
    from itables.utils import find_package_file  # brings in pandas, which only the end of a round needs

    cells, notes = write_cells(tables.build_table(entries))
    models = [name_model(folder) for folder in folders]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    bundle = find_package_file("html", "dt_bundle.js")
    template = environment.get_template("page.html")
    stream = template.stream(
        facts=[list_facts(folder, len(folders) > 1) for folder in folders],
        heads=list(cells),
        rows=cells.values.tolist(),
        texts=cells.columns.get_loc("n"),  # columns of texts, before those of numbers
        notes=notes,
        svg=svg[svg.index("<svg") :] if svg else None,
        data=collect(folders),
        caveats=sorted({CAVEATS[model] for model in models if model in CAVEATS}),
        style=bundle.with_suffix(".css").read_text(encoding="utf-8"),
        library=base64.b64encode(bundle.read_bytes()).decode(),
    )
    file.writelines(stream)


# ---------------------------------------------------------------------------------------------------------------------
# What was run


def list_facts(folder: Folder, is_named: bool) -> dict[str, str]:
    """{what: text} of what was run in a folder. is_named: with its path, where there are several; a round's files do
    not depend on where they lie."""
    made = folder.provenance
    facts = {}
    if is_named:
        facts["folder"] = str(folder.path)
    facts["questions kept"] = tell_kept(folder)
    left_out = list_left_out(folder.entries)
    if left_out:
        facts["left out, too long for the model's context"] = f"{len(left_out)}: {', '.join(left_out)}"
    for name, field in FACTS.items():
        value = getattr(made, field)
        if value not in (None, ""):
            facts[name] = str(value)
    versions = (made.versions or {}).items()
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in versions)
    return facts


def tell_kept(folder: Folder) -> str:
    """How many questions were kept, and where round 1 says it, of how many."""
    for entry in folder.entries:
        if isinstance(entry, UnmaskedEntry) and entry.asked is not None:
            return f"{entry.kept} of {entry.asked} asked"
    return str(len(folder.kept))


def list_left_out(entries: list[Entry]) -> list[str]:
    """The ids of the questions that do not fit the model's context."""
    ids: dict[str, None] = {}
    for entry in entries:
        ids.update(dict.fromkeys(entry.left_out))
    return list(ids)


def name_model(folder: Folder) -> str:
    """Without the organization that it is of."""
    return (folder.provenance.model or "").split("/")[-1]


def link_neuronpedia(folder: Folder) -> str | None:
    """The beginning of the addresses of a folder's latents."""
    made = folder.provenance
    return catalogue.neuronpedia_page(bundled(made.sae_release or ""), made.sae_id or "", "")


# ---------------------------------------------------------------------------------------------------------------------
# What page.js shows


@dataclass(frozen=True)
class Mask:
    """A masked round. folder, latents: the numbers of its folder and of the list that its masks are beginnings of."""

    folder: int
    latents: int
    entry: MaskedEntry
    records: Journal


def collect(folders: list[Folder]) -> dict[str, Any]:
    """What page.js shows, as compact as it can be read: each context once, what is as unmasked not again.

    contexts: texts.  folders: {name, page}, page the beginning of its latents' addresses on Neuronpedia.
    masks: {folder, ranking, masked, k, list} of the masked rounds, folder and list numbers.
    lists: {folder, name} of the lists of latents that these masks are beginnings of.
    questions: {id, context (number or null), question, truths, unmasked, masked, counts, latents}; unmasked an answer
    or null for each folder, masked an answer, 0 (as unmasked) or null (not asked) and counts the number of latents
    masked for each mask, latents the ids for each list. An answer is [answer, text, em, f1, named].
    """
    masks, lists = list_masks(folders)
    contexts: dict[str, int] = {}  # numbers
    shown: dict[tuple[str | None, str], dict[str, Any]] = {}
    for folder in folders:
        data_set = folder.provenance.questions
        for question_id in folder.kept:
            if (data_set, question_id) not in shown:
                question = describe_question(folders, masks, len(lists), data_set, question_id, contexts)
                shown[data_set, question_id] = question
    described = []
    for mask in masks:
        described.append(
            {
                "folder": mask.folder,
                "ranking": mask.entry.provenance.ranking,
                "masked": tables.name_mask(mask.entry),
                "k": mask.entry.k,
                "list": mask.latents,
            }
        )
    is_named = len(folders) > 1
    named = []
    for folder in folders:
        named.append({"name": str(folder.path) if is_named else "", "page": link_neuronpedia(folder)})
    return {
        "right": RIGHT_F1,
        "contexts": list(contexts),
        "folders": named,
        "masks": described,
        "lists": lists,
        "questions": list(shown.values()),
    }


def list_masks(folders: list[Folder]) -> tuple[list[Mask], list[dict[str, Any]]]:
    """The masked rounds, and {folder, name} of each list of latents that their masks are beginnings of."""
    masks = []
    keys: list[tuple] = []
    lists = []
    for number, folder in enumerate(folders):
        for entry, records in folder.masked:
            ranking = entry.provenance.ranking
            key = (number, ranking, entry.masked, entry.latents)
            if key not in keys:
                keys.append(key)
                lists.append({"folder": number, "name": f"{ranking} {estimates.MASKS[entry.masked]}"})
            masks.append(Mask(number, keys.index(key), entry, records))
    return masks, lists


def describe_question(
    folders: list[Folder],
    masks: list[Mask],
    lists: int,
    data_set: str | None,
    question_id: str,
    contexts: dict[str, int],
) -> dict[str, Any]:
    """One of `collect`'s questions. data_set: its hash.  lists: how many there are.  contexts: numbers, added to."""
    question: Question | None = None
    unmasked: list[ShownAnswer | None] = []
    for folder in folders:
        record = None
        if folder.provenance.questions == data_set:
            record = folder.answers.get(question_id)
            question = question or folder.questions.get(question_id)
        unmasked.append(show_answer(record) if record else None)
    masked: list[ShownAnswer | int | None] = []
    counts: list[int] = []
    latents: list[list[int]] = [[] for _ in range(lists)]
    for mask in masks:
        folder = folders[mask.folder]
        record = mask.records.get(question_id) if folder.provenance.questions == data_set else None
        answer = show_answer(record) if record else None
        is_as_unmasked = answer is not None and answer == unmasked[mask.folder]
        masked.append(0 if is_as_unmasked else answer)
        ids = find_masked_latents(folder, mask.entry, question_id) if record else []
        counts.append(len(ids))
        latents[mask.latents] = max(latents[mask.latents], ids[:LONGEST], key=len)
    return {
        "id": question_id,
        "context": contexts.setdefault(question.context, len(contexts)) if question else None,
        "question": question.question if question else question_id,
        "truths": list(dict.fromkeys(question.truths)) if question else [],
        "unmasked": unmasked,
        "masked": masked,
        "counts": counts,
        "latents": latents,
    }


def show_answer(record: Record | RankedQuestion) -> ShownAnswer:
    """An answer as page.js takes it; of a file of activations, which has no text, the answer stands for it."""
    assert record.em is not None and record.f1 is not None  # every version has written them
    text = record.text if isinstance(record, Record) else record.answer
    named = record.em if record.named is None else record.named
    return record.answer, text, int(record.em), round(record.f1, 3), int(named)
