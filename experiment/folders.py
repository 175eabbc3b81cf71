"""A round's output folder read again, without a model: its results, what was answered, which latents were masked."""

import json
from dataclasses import dataclass
from pathlib import Path

from experiment import UserError, estimates, questions, rankings, report, results, say
from experiment.journal import FIELDS, Journal
from experiment.options import ROOT, bundled


@dataclass(frozen=True)
class Folder:
    """entries: of results.json, with the runs that made them.

    questions: {id: Question}, empty where the data set cannot be read.
    answers: {id: unmasked record}: of all questions that round 1 asked; without it, of those in a file of activations.
    kept: ids of the questions that round 1 kept; without it, of those that were masked.
    masked: (entry, {id: record}) of each masked round, in the table's order.
    samples: {ranking: {id: its lists of latents}} of the rankings of masked rounds.
    mean_samples: the same of those with mean ablation, where round 1 measured what that changes.
    """

    path: Path
    entries: list[dict]
    questions: dict[str, questions.Question]
    answers: dict[str, dict]
    kept: list[str]
    masked: list[tuple[dict, dict]]
    samples: dict[str, dict[str, dict]]
    mean_samples: dict[str, dict[str, dict]]


def read(path, known=None, activations=None):
    """The Folder at `path`. What in it is damaged or of another run, but for results.json, is left out, with a line.

    known: its questions, where the caller has them; else they are read again.  activations: round 1's file, where it
    does not lie in the folder.
    """
    entries = read_entries(path / "results.json")
    journals = list(_read_journals(path))
    answered = [
        (entry, journal)
        for entry in [entry for entry in entries if "masked" not in entry] + report.sort_masked(entries)
        for journal in journals
        if not results.differences(journal.run, entry["run"], FIELDS) and _is_whole(journal, entry)
    ]
    round_1 = {entry["run"]["ranking"]: journal for entry, journal in answered if "masked" not in entry}
    masked = [(entry, journal) for entry, journal in answered if "masked" in entry]
    runs = {entry["run"]["ranking"]: entry["run"] for entry, _ in masked}
    samples = {}
    for name, run in runs.items():
        samples[name] = round_1.get(name) or _read_samples(path, run | {"ablation": "zero"}, activations)
    mean_runs = {entry["run"]["ranking"]: entry["run"] for entry, _ in masked if is_mean(entry)}
    mean_samples = {name: _read_samples(path, run, activations) for name, run in mean_runs.items()}
    answers = next(iter((round_1 or samples).values()), {})
    if round_1:
        kept = [name for name, record in answers.items() if "active" in record]
    else:
        kept = list(dict.fromkeys(name for _, records in masked for name in records))
    if known is None:
        known = _load_questions(entries[0]["run"]) if answered else []
    return Folder(
        path, entries, {question.id: question for question in known}, answers, kept, masked, samples, mean_samples
    )


def read_entries(path):
    """The entries of a results.json, all of them such that the table can be made of them."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file: give folders that rounds have written")
    entries = results.load_json(path)
    try:
        if report.frame(entries).empty:
            raise ValueError("it holds no entry")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: is damaged, or of another version ({error!r}): repeat its rounds") from None
    return entries


def is_mean(entry: dict) -> bool:
    """Whether an entry's round set latents to their mean."""
    return entry["run"].get("ablation") == "mean"


def _is_whole(journal, entry):
    """Whether a journal has as many records as results.json counts: one that was begun again may not."""
    number = entry.get("asked", entry["n"])
    if len(journal) != number:
        say(f"{journal.path}: holds {len(journal)} of {number} questions: it is left out")
    return len(journal) == number


def _read_journals(path):
    for file in sorted(path.glob("predictions_*.jsonl")):
        if ".part" in file.name:  # the Journal reads it
            continue
        try:
            with open(file, "rb") as lines:
                run = json.loads(lines.readline())["run"]
            yield Journal(file, run)
        except (UserError, OSError, ValueError, LookupError, TypeError) as error:
            say(f"{file.name} is left out: {error}")


def _read_samples(path, run, activations):
    """{id: sample} of the ranking of `run`, from a file of activations: the folder's, or the one that ships. With mean
    ablation from the file beside it."""
    name = f"activations_{run['ranking']}.json"
    for file in filter(None, (activations, path / name, ROOT / name)):
        file = results.name_mean_file(file) if run.get("ablation") == "mean" else file
        if file.exists():
            try:
                made, samples = results.read_activations(file)
            except UserError as error:
                say(f"{error}: it is left out")
                continue
            if made and not results.differences(made, run, results.COMPARED):
                return {sample["id"]: sample for sample in samples}
    return {}


def _load_questions(run):
    try:
        known, _, digest = questions.load(bundled(run["dataset"]), run["split"], run.get("dataset_config"))
        if digest == run["questions"]:
            return known
        reason = "is not what it was when the answers were made"
    except (UserError, OSError, ValueError, KeyError) as error:
        reason = f"cannot be read ({error})"
    say(f"{run.get('dataset')}: {reason}: no contexts on the page, and no answer is scored again")
    return []


def join(folders):
    """The entries of several folders. Raises UserError where these cannot stand in one table.

    That is for a folder that has neither model, SAE nor questions in common with any other, and for the same ranking,
    mask and K of the same settings in two of them.
    """
    names = ("model", "sae_release", "questions")
    runs = [folder.entries[0]["run"] for folder in folders]
    for folder, run in zip(folders, runs):
        others = [other for other in runs if other is not run]
        if not any(run.get(name) == other.get(name) for other in others for name in names):
            raise UserError(f"{folder.path}: has neither model, SAE nor questions in common with the other folders")
    entries = [entry for folder in folders for entry in folder.entries]
    if (report.frame(entries).masked != "none").sum() < sum("masked" in e and e["k"] != "0" for e in entries):
        raise UserError("the folders hold the same ranking, mask and K of the same settings: they cannot be told apart")
    return entries


def masked_latents(folder, entry, question_id):
    """The latents of a question that the entry's round masked, first those that are masked first; [] where unknown."""
    ranking, which = entry["run"]["ranking"], entry["masked"]
    samples = folder.mean_samples.get(ranking) if is_mean(entry) else None
    sample = (samples or folder.samples[ranking]).get(question_id, {})
    return rankings.pick_latents(sample, which, entry["k"])[0] if which in sample else []


def rescore(folder):
    """Scores all answers again, in place, and returns the entries with the new figures.

    Which questions are kept stays as it was, for only these were masked, and so do the log probabilities.
    """
    for records in (folder.answers, *(records for _, records in folder.masked)):
        for question_id, record in records.items():
            text = record.get("text", record["answer"])  # a file of activations has the answer alone
            scores = questions.score(record["answer"], text, folder.questions[question_id].truths)
            record.update(scores if "text" in record else scores | {"named": record.get("named", scores["named"])})
    return [entry | _figures(folder, entry) for entry in folder.entries]


def _figures(folder, entry):
    """The figures of an entry from the records' scores; none where the folder does not have the records."""
    records = next((records for masked, records in folder.masked if masked is entry), None)
    if entry.get("asked") == len(folder.answers):
        return _summarize(folder, folder.kept) | {"all": _summarize(folder, list(folder.answers))}
    if records is None or not entry["clean"] or not records.keys() <= folder.answers.keys():
        return {}
    columns = [_columns(folder.answers[name] for name in records), _columns(records.values())]
    figures = estimates.compare(*columns, [folder.questions[name].context for name in records])
    intervals = entry["drop"]["intervals"] | figures["drop"]["intervals"]
    return figures | {"drop": entry["drop"] | figures["drop"] | {"intervals": intervals}}


def _summarize(folder, ids):
    contexts = [folder.questions[name].context for name in ids]
    return estimates.summarize(_columns(folder.answers[name] for name in ids), contexts)


def _columns(records):
    records = list(records)
    return {metric: [record[metric] for record in records] for metric in results.SCORES}
