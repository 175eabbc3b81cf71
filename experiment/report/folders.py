"""A round's output folder read again, without a model: its results, what was answered, which latents were masked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from experiment import UserError, questions, say
from experiment.demo import ROOT, bundled
from experiment.masks import OTHERS
from experiment.questions import Question
from experiment.records import files
from experiment.records.entries import Entry, MaskedEntry, UnmaskedEntry
from experiment.records.journal import Journal, name_masked
from experiment.records.lists import find_latents_to_mask
from experiment.records.others import take_from_others
from experiment.records.provenance import (
    ALL,
    SETTINGS,
    depends_on,
    differences,
    digest_numbers,
    digest_ranked,
    same_answer,
)
from experiment.records.schema import KeptRecord, Provenance, RankedQuestion, Record
from experiment.report import relations, tables
from experiment.report.comparisons import Scores
from experiment.report.relations import Mask

Ranked = dict[str, dict[str, RankedQuestion]]
"""{file of activations: {id: its ranked question}}; with another question's lists under a name of their own"""
Journals = dict[str, Journal]
"""{its name: a journal}"""


@dataclass(frozen=True)
class Folder:
    """entries: of results.json, with the provenance of each; those that are of what lies in the folder.

    questions: by id, empty where the data set cannot be read.
    answers: unmasked, by id: of all questions that round 1 asked; without it, of those in a file of activations.
    kept: ids of the questions that round 1 kept; without it, of those that were masked.
    masked: (entry, the journals of its draws) of each masked round, in the table's order; of one draw, but for what is
    drawn several times.
    ranked: of the files of activations of masked rounds.
    unmasked: round 1's whole journals, by ranking.
    """

    path: Path
    entries: list[Entry]
    questions: dict[str, Question]
    answers: Mapping[str, Record | RankedQuestion]
    kept: list[str]
    masked: list[tuple[MaskedEntry, list[Journal]]]
    ranked: Ranked
    unmasked: Journals

    @property
    def provenance(self) -> Provenance:
        """That of its first entry: what all of them have in common is in it."""
        return self.entries[0].provenance


def read_folder(path: Path, entries: list[Entry] | None = None, known: list[Question] | None = None) -> Folder:
    """The Folder at `path`. What in it is damaged or of another run, but for results.json, is left out, with a line.

    entries: those of its results.json, where the caller has them.  known: its questions, likewise; else they are read.
    """
    if entries is None:
        entries = read_entries(path / "results.json")
    journals = _read_journals(path, entries)
    ranked = _read_ranked(path, entries)
    if known is None:
        known = _load_questions(entries[0].provenance) if journals else []
    contexts = {question.id: question.context for question in known}
    lists = ranked | _swap_lists(entries, ranked, contexts)
    entries = [entry for entry in entries if _is_of(path, entry, journals, lists)]
    if not entries:
        raise UserError(f"{path}: none of its results is of what lies in it: repeat its rounds")
    unmasked = _find_unmasked(entries, journals)
    round_1 = next(iter(unmasked.values()), None)
    answers = _find_answers(round_1, ranked)
    others = _find_other_answers(ranked, answers)
    masked = []
    for entry in tables.sort_masked(entries):
        journal = _find_whole(journals, entry)
        if journal is not None and entry.latents not in others:
            masked.append((entry, [journal, *_read_draws(path, entry)]))
    if contexts:
        scores = _score_masks(masked, lists)
        with_these_answers = [of_file for name, of_file in ranked.items() if name not in others]
        entries = relations.add_agreement(entries, unmasked, contexts)
        entries = relations.relate(entries, scores, relations.score_unmasked(with_these_answers), contexts)
    return Folder(
        path=path,
        entries=entries,
        questions={question.id: question for question in known},
        answers=answers,
        kept=_list_kept(round_1, masked),
        masked=masked,
        ranked=lists,
        unmasked=unmasked,
    )


def read_entries(path: Path) -> list[Entry]:
    """The entries of a results.json, of which there is at least one."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file: give folders that rounds have written")
    entries = files.read_results(path)
    if not entries:
        raise UserError(f"{path}: holds no entry: repeat its rounds")
    return entries


# ---------------------------------------------------------------------------------------------------------------------
# What is in a folder


def _read_journals(path: Path, entries: Iterable[Entry]) -> Journals:
    """The journals that the entries name, as far as they are there and can be read."""
    journals: Journals = {}
    for entry in entries:
        name = entry.journal
        if name is None or name in journals or not (path / name).exists():
            continue
        try:
            journals[name] = Journal.read_as_is(path / name)
        except UserError as error:
            say(f"{name} is left out: {error}")
    return journals


def _find_journal(journals: Journals, entry: Entry) -> Journal | None:
    """The journal that an entry names, where it names one that was read."""
    return None if entry.journal is None else journals.get(entry.journal)


def _read_ranked(path: Path, entries: Iterable[Entry]) -> Ranked:
    """The files of activations that the entries name: the folder's; where it has none, the one that ships, if that is
    of the same run."""
    made: dict[str, Provenance] = {}  # of the first entry that names a file
    for entry in entries:
        if isinstance(entry, MaskedEntry) and entry.latents is not None:
            made.setdefault(entry.latents, entry.provenance)
    ranked: Ranked = {}
    for name, provenance in made.items():
        own = path / name
        found = own if own.exists() else ROOT / name
        if not found.exists():
            continue
        try:
            read = files.read_activations(found)
        except UserError as error:
            say(f"{error}: it is left out")
            continue
        if read[0] is None:  # the authors' questions have no ids
            continue
        if found != own and differences(read[0], provenance, SETTINGS):
            say(f"{own} is not there: what it held is left out")
            continue
        ranked[name] = {question.id: question for question in read[1]}
    return ranked


def _find_ranked(ranked: Ranked, entry: MaskedEntry) -> dict[str, RankedQuestion] | None:
    """The file of activations that an entry names, where it names one that was read."""
    return ranked.get(_name_lists(entry))


def _name_lists(entry: MaskedEntry) -> str:
    """What the lists that an entry's round masked are called in Ranked."""
    provenance = entry.provenance
    name = entry.latents or ""
    return f"{name} {provenance.ranking} {provenance.ranking_seed}" if provenance.ranking in OTHERS else name


def _swap_lists(entries: Iterable[Entry], ranked: Ranked, contexts: Mapping[str, str]) -> Ranked:
    """The lists of the masked rounds that took another question's, where the data set is known. contexts: by id."""
    swapped: Ranked = {}
    for entry in entries:
        if not isinstance(entry, MaskedEntry) or entry.provenance.ranking not in OTHERS or not contexts:
            continue
        name = _name_lists(entry)
        if entry.latents in ranked and name not in swapped:
            swapped[name] = take_from_others(entry.provenance, ranked[entry.latents], contexts)
    return swapped


def _score_masks(masked: Iterable[tuple[MaskedEntry, list[Journal]]], lists: Ranked) -> dict[Mask, Scores]:
    """The scores of the answers under each mask of which all is there: journals, and the file of activations."""
    scores = {}
    for entry, draws in masked:
        of_file = _find_ranked(lists, entry)
        has_file = of_file is not None or entry.drop is None  # the authors' has no unmasked answers
        if has_file and len(draws) == (entry.draws or 1):
            scores[Mask.of(entry)] = relations.score_mask(draws, of_file or {})
    return scores


def _read_draws(path: Path, entry: MaskedEntry) -> list[Journal]:
    """The journals of an entry's second and further draws: those that are whole."""
    later = range(2, 1 + (entry.draws or 1))
    names = [name_masked(entry.provenance.with_fields(draw=draw)) for draw in later]
    journals = _read_journals(path, [entry.with_fields(journal=name) for name in names])
    return [journal for journal in journals.values() if len(journal) == entry.n]


def _find_unmasked(entries: Iterable[Entry], journals: Journals) -> Journals:
    """The whole journals of unmasked answers, by ranking."""
    unmasked = {}
    for entry in entries:
        journal = _find_whole(journals, entry) if isinstance(entry, UnmaskedEntry) else None
        if journal is not None:
            unmasked[str(entry.provenance.ranking)] = journal
    return unmasked


def _find_answers(round_1: Journal | None, ranked: Ranked) -> Mapping[str, Record | RankedQuestion]:
    """Round 1's unmasked answers; without it, those in the first file of activations."""
    if round_1 is not None:
        return round_1
    return next(iter(ranked.values()), {})


def _find_whole(journals: Journals, entry: Entry) -> Journal | None:
    """An entry's journal, if it has as many records as results.json counts: one that was begun again may not."""
    journal = _find_journal(journals, entry)
    if journal is None:
        return None
    number = entry.n
    if isinstance(entry, UnmaskedEntry) and entry.asked is not None:
        number = entry.asked
    if len(journal) != number:
        say(f"{journal.path}: holds {len(journal)} of {number} questions: it is left out")
        return None
    return journal


def _list_kept(round_1: Journal | None, masked: Iterable[tuple[MaskedEntry, list[Journal]]]) -> list[str]:
    """The ids of the questions that are shown."""
    if round_1 is not None:
        return [record.id for record in round_1.values() if isinstance(record, KeptRecord)]
    ids: dict[str, None] = {}
    for _, (first, *_) in masked:
        ids.update(dict.fromkeys(first))
    return list(ids)


def _load_questions(made: Provenance) -> list[Question]:
    """The data set that answers are of; none, with a line, where it is not there as it was."""
    if made.dataset is None:
        return []
    try:
        known, _, digest = questions.load(bundled(made.dataset), made.split, made.dataset_config)
    except (UserError, OSError, ValueError) as error:
        say(f"{made.dataset}: cannot be read ({error}): no contexts on the page")
        return []
    if digest != made.questions:
        say(f"{made.dataset}: is not what it was when the answers were made: no contexts on the page")
        return []
    return known


# ---------------------------------------------------------------------------------------------------------------------
# Whether it belongs together


def _is_of(path: Path, entry: Entry, journals: Journals, ranked: Ranked) -> bool:
    """Whether an entry is of what lies in the folder now; a line where it is not."""
    reason = _find_other_run(entry, journals)
    if not reason and isinstance(entry, MaskedEntry):
        reason = _find_other_latents(entry, journals, ranked) or _find_other_means(path, entry)
    if reason:
        name = entry.provenance.ranking
        assert name is not None  # without one no entry is read
        if isinstance(entry, MaskedEntry):
            name += f" {tables.name_mask(entry)} at K = {entry.k}"
        say(f"{path / 'results.json'}: {name} is left out: {reason}")
    return not reason


def _find_other_run(entry: Entry, journals: Journals) -> str:
    """Says in what the journal that an entry names is of another run; an empty text where it is of the same."""
    journal = _find_journal(journals, entry)
    if journal is None:
        return ""
    named = differences(entry.provenance, journal.provenance, ALL)
    return f"{journal.path.name} is of another run ({named})" if named else ""


def _find_other_latents(entry: MaskedEntry, journals: Journals, ranked: Ranked) -> str:
    """Says where round 1 has other latents, or unmasked answers, than those that an entry is of."""
    journal = _find_journal(journals, entry)
    of_file = _find_ranked(ranked, entry)
    if journal is None or of_file is None or len(journal) != entry.n:
        return ""  # it cannot be told which questions they are of
    if digest_ranked(of_file, entry.masked, journal) == entry.provenance.activations:
        return ""
    return f"{entry.latents} has other latents or answers now"


def _find_other_means(path: Path, entry: MaskedEntry) -> str:
    """Says where the means are not those that an entry is of."""
    file = path / "means.json"
    if entry.provenance.means is None or not file.exists():
        return ""
    try:
        if digest_numbers(files.read_means(file).means) == entry.provenance.means:
            return ""
    except UserError as error:
        return str(error)
    return f"{file.name} has other means now"


def _find_other_answers(ranked: Ranked, answers: Mapping[str, Record | RankedQuestion]) -> list[str]:
    """The files of activations of other unmasked answers than those that the page shows; a line for each."""
    others = []
    for name, of_file in ranked.items():
        both = [question_id for question_id in of_file if question_id in answers]
        differ = 0
        for question_id in both:
            differ += not same_answer(of_file[question_id], answers[question_id])
        if differ:
            others.append(name)
            say(f"{name}: is of other unmasked answers ({differ} of {len(both)}): its masks are not on the page")
    return others


# ---------------------------------------------------------------------------------------------------------------------
# What is asked of it


def join_entries(folders: list[Folder]) -> list[Entry]:
    """The entries of several folders. Raises UserError where these cannot stand in one table.

    That is for a folder that has neither model, SAE nor questions in common with any other, and for the same ranking,
    mask and K of the same settings in two of them.
    """
    values = [depends_on(folder.provenance) for folder in folders]
    entries: list[Entry] = []
    for folder, own in zip(folders, values):
        others = [other for other in values if other is not own]
        if not any(own[name] == other[name] for name in tables.NAMES for other in others):
            raise UserError(f"{folder.path}: has neither model, SAE nor questions in common with the other folders")
        entries += folder.entries
    table = tables.build_table(entries)
    masked = [entry for entry in entries if isinstance(entry, MaskedEntry) and not entry.masks_nothing]
    if (table.masked != "none").sum() < len(masked):
        raise UserError("the folders hold the same ranking, mask and K of the same settings: they cannot be told apart")
    return entries


def find_masked_latents(folder: Folder, entry: MaskedEntry, question_id: str) -> list[int]:
    """The latents of a question that the entry's round masked, first those that are masked first; [] where unknown."""
    of_file = _find_ranked(folder.ranked, entry)
    if of_file is None or question_id not in of_file:
        return []
    latents, _ = find_latents_to_mask(of_file[question_id], entry.masked, entry.k)
    return latents
