"""A round's output folder read again, without a model: its results, what was answered, which latents were masked."""

from dataclasses import dataclass
from pathlib import Path

from experiment import UserError, questions, say
from experiment.options import ROOT, bundled
from experiment.records import files, lists, provenance
from experiment.records.journal import Journal, read_run
from experiment.report import tables


@dataclass(frozen=True)
class Folder:
    """entries: of results.json, with the runs that made them; those that are of what lies in the folder.

    questions: {id: Question}, empty where the data set cannot be read.
    answers: {id: unmasked record}: of all questions that round 1 asked; without it, of those in a file of activations.
    kept: ids of the questions that round 1 kept; without it, of those that were masked.
    masked: (entry, {id: record}) of each masked round, in the table's order.
    samples: {file of activations: {id: its lists of latents}} of masked rounds.
    """

    path: Path
    entries: list[dict]
    questions: dict[str, questions.Question]
    answers: dict[str, dict]
    kept: list[str]
    masked: list[tuple[dict, dict]]
    samples: dict[str, dict[str, dict]]


def read(path: Path, entries: list[dict] | None = None, known: list[questions.Question] | None = None) -> Folder:
    """The Folder at `path`. What in it is damaged or of another run, but for results.json, is left out, with a line.

    entries: those of its results.json, where the caller has them.  known: its questions, likewise; else they are read.
    """
    entries = read_entries(path / "results.json") if entries is None else entries
    journals = _read_journals(path, entries)
    samples = _read_samples(path, entries)
    entries = [entry for entry in entries if _is_of(path, entry, journals, samples)]
    if not entries:
        raise UserError(f"{path}: none of its results is of what lies in it: repeat its rounds")
    unmasked = [entry for entry in entries if "masked" not in entry]
    answered = []
    for entry in unmasked + tables.sort_masked(entries):
        journal = journals.get(entry.get("journal"))
        if journal is not None and _is_whole(journal, entry):
            answered.append((entry, journal))
    round_1 = [journal for entry, journal in answered if "masked" not in entry]
    answers = next(iter(round_1 or samples.values()), {})
    others = _find_other_answers(samples, answers)
    masked = [pair for pair in answered if "masked" in pair[0] and pair[0].get("latents") not in others]
    if round_1:
        kept = [name for name, record in answers.items() if "active" in record]
    else:
        kept = list(dict.fromkeys(name for _, records in masked for name in records))
    if known is None:
        known = _load_questions(entries[0]["run"]) if answered else []
    return Folder(path, entries, {question.id: question for question in known}, answers, kept, masked, samples)


def _is_of(path: Path, entry: dict, journals: dict[str, Journal], samples: dict[str, dict[str, dict]]) -> bool:
    """Whether an entry is of what lies in the folder now; a line where it is not."""
    reason = _find_other_run(entry, journals) or _find_other_latents(entry, journals, samples)
    reason = reason or _find_other_means(path, entry)
    if reason:
        name = entry["run"]["ranking"]
        if "masked" in entry:
            name += f" {tables.name_mask(entry)} at K = {entry['k']}"
        say(f"{path / 'results.json'}: {name} is left out: {reason}")
    return not reason


def _find_other_run(entry: dict, journals: dict[str, Journal]) -> str:
    """Says in what the journal that an entry names is of another run; an empty text where it is of the same."""
    journal = journals.get(entry.get("journal"))
    if journal is None:
        return ""
    named = provenance.differences(entry["run"], journal.run, provenance.ALL)
    return f"{journal.path.name} is of another run ({named})" if named else ""


def _find_other_latents(entry: dict, journals: dict[str, Journal], samples: dict[str, dict[str, dict]]) -> str:
    """Says where round 1 has other latents, or unmasked answers, than those that an entry is of."""
    journal = journals.get(entry.get("journal"))
    of_file = samples.get(entry.get("latents"))
    if journal is None or of_file is None or len(journal) != entry["n"]:
        return ""  # it cannot be told which questions they are of
    same = provenance.digest_samples(of_file, entry["masked"], journal) == entry["run"].get("activations")
    return "" if same else f"{entry['latents']} has other latents or answers now"


def _find_other_means(path: Path, entry: dict) -> str:
    """Says where the means are not those that an entry is of."""
    file = path / "means.json"
    if "means" not in entry["run"] or not file.exists():
        return ""
    content = files.load_json(file)
    is_damaged = files.find_problem(content, files.MEANS)
    if is_damaged or provenance.digest_numbers(content["means"]) != entry["run"]["means"]:
        return f"{file.name} has other means now"
    return ""


def _find_other_answers(samples: dict[str, dict[str, dict]], answers: dict[str, dict]) -> list[str]:
    """The files of activations of other unmasked answers than those that the page shows; a line for each."""
    others = []
    for name, of_file in samples.items():
        both = [question_id for question_id in of_file if question_id in answers]
        differ = [i for i in both if not provenance.same_answer(of_file[i], answers[i])]
        if differ:
            others.append(name)
            say(f"{name}: is of other unmasked answers ({len(differ)} of {len(both)}): its masks are not on the page")
    return others


def read_entries(path):
    """The entries of a results.json, all of them such that the table can be made of them."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file: give folders that rounds have written")
    entries = files.load_json(path)
    try:
        if tables.frame(entries).empty:
            raise ValueError("it holds no entry")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: is damaged, or of another version ({error!r}): repeat its rounds") from None
    return entries


def _is_whole(journal, entry):
    """Whether a journal has as many records as results.json counts: one that was begun again may not."""
    number = entry.get("asked", entry["n"])
    if len(journal) != number:
        say(f"{journal.path}: holds {len(journal)} of {number} questions: it is left out")
    return len(journal) == number


def _read_journals(path: Path, entries: list[dict]) -> dict[str, Journal]:
    """{name: Journal} of the journals that the entries name, as far as they are there and can be read."""
    journals = {}
    for name in dict.fromkeys(entry["journal"] for entry in entries if "journal" in entry):
        file = path / name
        if not file.exists():
            continue
        try:
            journals[name] = Journal(file, read_run(file) or {})
        except UserError as error:
            say(f"{name} is left out: {error}")
    return journals


def _read_samples(path: Path, entries: list[dict]) -> dict[str, dict[str, dict]]:
    """{name: {id: sample}} of the files of activations that the entries name: the folder's, or one that ships."""
    samples = {}
    for name in dict.fromkeys(entry["latents"] for entry in entries if "latents" in entry):
        file = next((file for file in (path / name, ROOT / name) if file.exists()), None)
        if file is None:
            continue
        try:
            made, found = files.read_activations(file)
        except UserError as error:
            say(f"{error}: it is left out")
            continue
        if made:  # the authors' samples have no ids
            samples[name] = {sample["id"]: sample for sample in found}
    return samples


def _load_questions(run):
    try:
        known, _, digest = questions.load(bundled(run["dataset"]), run["split"], run.get("dataset_config"))
        if digest == run["questions"]:
            return known
        reason = "is not what it was when the answers were made"
    except (UserError, OSError, ValueError, KeyError) as error:
        reason = f"cannot be read ({error})"
    say(f"{run.get('dataset')}: {reason}: no contexts on the page")
    return []


def join(folders):
    """The entries of several folders. Raises UserError where these cannot stand in one table.

    That is for a folder that has neither model, SAE nor questions in common with any other, and for the same ranking,
    mask and K of the same settings in two of them.
    """
    runs = [provenance.depends_on(folder.entries[0]["run"]) for folder in folders]
    for folder, run in zip(folders, runs):
        others = [other for other in runs if other is not run]
        alike = [name for name in tables.NAMES if any(run[name] == other[name] for other in others)]
        if not alike:
            raise UserError(f"{folder.path}: has neither model, SAE nor questions in common with the other folders")
    entries = [entry for folder in folders for entry in folder.entries]
    if (tables.frame(entries).masked != "none").sum() < sum("masked" in e and e["k"] != "0" for e in entries):
        raise UserError("the folders hold the same ranking, mask and K of the same settings: they cannot be told apart")
    return entries


def masked_latents(folder: Folder, entry: dict, question_id: str) -> list[int]:
    """The latents of a question that the entry's round masked, first those that are masked first; [] where unknown."""
    sample, which = folder.samples.get(entry.get("latents"), {}).get(question_id, {}), entry["masked"]
    return lists.pick_latents(sample, which, entry["k"])[0] if which in sample else []
