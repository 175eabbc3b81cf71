"""Activations and results on disk, with the run that made them: written whole, read strictly. Knows nothing of models.

A run is a dict that says what made a file. A file that is damaged, or of another run, is a UserError that names it.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import filelock

from experiment import UserError

# What changes a result by design. Versions, device and batch size are in a run too, for readers, and not compared.
COMPARED = (
    *("model", "sae_release", "sae_id", "hook_name", "d_sae", "ranking", "dtype", "sae_dtype", "error_term", "dataset"),
    *("split", "exclude_special_tokens", "questions", "prompt_template", "max_new_tokens"),
)
# What else makes a journal another one; of activations, rounds 2 and 3 may mask a part of what round 1 ranked.
SELECTED = ("limit", "sample", "seed", "ranking_seed", "masked", "k", "activations")
WHERE_BOTH = ("hook_name", "d_sae", "ranking_seed")  # compared where both runs have them; two come with the SAE
DEFAULTS = {"error_term": "drop"}  # of files older than the field

METRICS = ("em", "f1", "accuracy")  # every results entry has these, with intervals


def differences(found, wanted, fields):
    """Names each of `fields` in which two runs differ, with both values; an empty text where they agree."""
    named = []
    for field in fields:
        old, new = (run.get(field, DEFAULTS.get(field)) for run in (found, wanted))
        if old != new and not (field in WHERE_BOTH and None in (old, new)):
            named.append(f"{field} {_shorten(old)}, now {_shorten(new)}")
    return "; ".join(named)


def _shorten(value):
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}"


def refuse_other_run(path, found, wanted, fields):
    """Raises UserError where the run `found` in a file differs in `fields` from the one that is wanted now."""
    if named := differences(found, wanted, fields):
        raise UserError(f"{path}: is of another run ({named}): repeat its options, or give --output-dir or --overwrite")


def make_folder(path):
    """Makes the output folder where it is missing, and returns it."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {path}: cannot be made ({error.strerror})") from None
    return Path(path)


def lock(folder):
    """Refuses a second writer in the same folder. Returns a context manager that releases the lock.

    The kernel releases it too when this process ends, however it does.
    """
    try:
        return filelock.FileLock(Path(folder) / ".lock").acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"{folder}: another round is writing here: wait for it, or give another --output-dir") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None


@contextlib.contextmanager
def write_whole(path, mode="w"):
    """A file that appears at `path` whole when the block ends, or not at all: written beside, synced, moved."""
    beside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
        with open(beside, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        raise


def load_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()  # half a character (\ud800) could not be written again
        return content
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _is_score(value):
    return type(value) is float and 0 <= value <= 1


def _are_ids(values):
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _are_floats(values):
    return isinstance(values, list) and all(type(value) is float for value in values)


FIELDS = {  # of a sample, and of a journal's record
    **dict.fromkeys(("em", "f1", "accuracy", "named"), (_is_score, "a number from 0.0 to 1.0")),
    **dict.fromkeys(("active", "topk", "bottomk"), (_are_ids, "a list of latents")),
    "tokens": (_are_ids, "a list of tokens"),
    **dict.fromkeys(("log_probs", "removed_topk", "removed_bottomk"), (_are_floats, "a list of numbers")),
}


def find_wrong_field(entry, needed):
    """Says which of FIELDS is not what it must be in `entry`, or is needed and missing; None if all are right."""
    for name, (is_right, kind) in FIELDS.items():
        if (name in entry or name in needed) and not is_right(entry.get(name)):
            return f"{name} is not {kind}"
    return None


def write_activations(path, run, samples):
    """One JSON object, a line a sample, so that it can be read by people and diffed; `samples` may be a generator."""
    with write_whole(path) as file:
        file.write('{"run": ' + json.dumps(run, ensure_ascii=False) + ',\n"samples": [')
        for number, sample in enumerate(samples):
            file.write((",\n" if number else "\n") + json.dumps(sample, ensure_ascii=False))
        file.write("\n]}\n")


def read_activations(path):
    """The run, None in the authors' published form, and the samples: dicts of FIELDS, with id and answer, or (theirs)
    with the prompt."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file: run baseline.py first, or give --activations")
    content = load_json(path)
    if isinstance(content, list):
        run, names, entries = None, ("prompt",), _published_samples(path, content)
    else:
        content = content if isinstance(content, dict) else {}
        run, names, entries = content.get("run"), ("id", "answer"), content.get("samples")
        if not isinstance(run, dict):
            raise UserError(f"{path}: names no run: it is not round 1's file")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: holds no sample: it is not round 1's file, or round 1 kept no question")
    samples, seen = [], set()
    for number, entry in enumerate(entries, 1):
        where = f"{path}, sample {number}"
        samples.append(_check_sample(entry, names, where))
        if "id" in names and entry["id"] in seen:
            raise UserError(f"{where}: the id {entry['id']!r} stands twice")
        seen.add(entry.get("id"))
    return run, samples


def _published_samples(path, content):
    """Samples from the authors' form: a list of {prompt: {"original", "have_gradient", "no_gradient"}}."""
    # "have_gradient" is what they call the TopK of the mean activation, "no_gradient" its BottomK.
    names = {"active": "original", "topk": "have_gradient", "bottomk": "no_gradient"}
    samples = []
    for number, entry in enumerate(content, 1):
        if not isinstance(entry, dict) or not all(isinstance(latents, dict) for latents in entry.values()):
            raise UserError(f"{path}, entry {number}: is not of the authors' published form {{prompt: latents}}")
        for prompt, latents in entry.items():
            samples.append({"prompt": prompt} | {ours: latents.get(theirs) for ours, theirs in names.items()})
    return samples


def _check_sample(sample, names, where):
    """What a sample needs, and no more. names: those of what must be strings."""
    if not isinstance(sample, dict) or not all(isinstance(sample.get(name), str) for name in names):
        raise UserError(f"{where}: lacks {' or '.join(names)}")
    if wrong := find_wrong_field(sample, ("active", "topk", "bottomk")):
        raise UserError(f"{where}: {wrong}")
    return {name: sample[name] for name in (*names, *FIELDS) if name in sample}


def digest(samples, *fields):
    """A hash of these fields of all samples: it ties a journal to what it was made from."""
    sha = hashlib.sha256()
    for sample in samples:
        sha.update(json.dumps([sample[field] for field in fields]).encode())
    return sha.hexdigest()


def write_results(path, entries):
    with write_whole(path) as file:
        json.dump(entries, file, indent=1, ensure_ascii=False)
        file.write("\n")


def read_results(path, run, overwrite):
    """The entries of results.json, of any ranking. Those of another run are refused, or left out if `overwrite`.

    Each has what a table needs: round, k (None in round 1), run with its ranking, and EM, F1 and accuracy with n and
    intervals, as have `all`, `clean` and `drop` where they are there; with `masked` there is mean_k.
    """
    entries, kept = load_json(path) if path.exists() else [], []
    fields = [field for field in COMPARED if field != "ranking"]
    if not isinstance(entries, list) or not all(_is_entry(entry) for entry in entries):
        raise UserError(f"{path}: is not a file of results: move it away")
    for number, entry in enumerate(entries, 1):
        if not overwrite:
            refuse_other_run(path, entry["run"], run, fields)
        elif differences(entry["run"], run, fields):
            continue
        if problem := _find_problem(entry):
            raise UserError(f"{path}, entry {number}: is damaged ({problem}): move the file away")
        kept.append(entry)
    return kept


def _is_entry(entry):
    return isinstance(entry, dict) and isinstance(entry.get("run"), dict) and {"round", "k"} <= entry.keys()


def _find_problem(entry):
    texts = entry["round"], entry["run"].get("ranking"), "" if entry["k"] is None else entry["k"]
    if not all(isinstance(text, str) for text in texts):
        return "round, ranking and k must be texts"
    if "masked" in entry and not (entry["masked"] in ("topk", "bottomk") and _is_number(entry.get("mean_k"))):
        return "masked must be topk or bottomk, with a mean_k"
    parts = {name: entry[name] for name in ("all", "clean", "drop") if entry.get(name) is not None}
    for name, part in {"the entry": entry, **parts}.items():
        if not _are_estimates(part, counted=name != "drop"):
            return f"{name} lacks n, or a metric with its interval"
    return None


def _are_estimates(part, counted):
    """Whether METRICS, and whatever else has an interval, are numbers with [low, high], or None; and n, if counted."""
    intervals = part.get("intervals") if isinstance(part, dict) else None
    if not isinstance(intervals, dict) or not {*METRICS} <= intervals.keys() <= part.keys():
        return False
    if counted and type(part.get("n")) is not int:
        return False
    return all(part[name] is None or all(map(_is_number, [part[name], *_pair(intervals[name])])) for name in intervals)


def _pair(value):
    return value if isinstance(value, list) and len(value) == 2 else [None]


def _is_number(value):
    return type(value) in (int, float) and abs(value) < 1e300  # neither infinite nor NaN
