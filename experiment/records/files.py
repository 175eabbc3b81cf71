"""Activations and results on disk, with the run that made them: written whole, read strictly. Knows nothing of models.

A file that is damaged, or of another run, is a UserError that names it.
"""

import contextlib
import json
import math
import os
import re
from pathlib import Path

import filelock

from experiment import UserError, os_errors
from experiment.records import provenance


def lock(folder):
    """Makes the folder, and refuses a second writer in it. Returns a context manager that releases the lock.

    The kernel releases it too when this process ends, however it does.
    """
    with os_errors(f"--output-dir {folder}: cannot be written"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        try:
            return filelock.FileLock(Path(folder) / ".lock").acquire(timeout=0)
        except filelock.Timeout:
            says = f"{folder}: another round is writing here: wait for it, or give another --output-dir"
            raise UserError(says) from None


@contextlib.contextmanager
def write_whole(path, mode="w"):
    """A file that appears at `path` whole when the block ends, or not at all: written beside, synced, moved."""
    beside = path.with_name(path.name + ".part")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with os_errors(f"{path}: cannot be written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(beside, mode, **text) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def load_json(path):
    with os_errors(f"{path}: cannot be read"):
        return parse_json(path.read_bytes(), path)


def parse_json(text, where):
    """The value in a JSON text, or in its bytes. where: what names it if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON ({error})") from None


# What the files hold: {field: (a test of its value, what it is a test for)}. A field with a ? may be missing.
TEXT = (lambda x: isinstance(x, str) and not re.search("[\ud800-\udfff]", x), "a text")  # nor half a character
SCORE = (lambda x: type(x) is float and 0 <= x <= 1, "a number from 0.0 to 1.0")
MEAN = (lambda x: x is None or type(x) in (int, float), "a number")  # None: no question counts
OBJECT = (lambda x: isinstance(x, dict), "an object")
LATENTS = (lambda x: isinstance(x, list) and all(type(i) is int and 0 <= i < 2**63 for i in x), "a list of latents")
TOKENS = (LATENTS[0], "a list of tokens")
PLACES = (LATENTS[0], "a list of places")
NUMBERS = (lambda x: isinstance(x, list) and all(type(number) is float for number in x), "a list of numbers")
SCORES = ("em", "f1", "accuracy", "named")

LISTS = {"topk": LATENTS, "bottomk": LATENTS, "removed_topk?": NUMBERS, "removed_bottomk?": NUMBERS}
LISTS |= {"target_topk?": NUMBERS, "target_bottomk?": NUMBERS}  # of the matched ranking
SAMPLE = {"id": TEXT, "answer": TEXT, "active": LATENTS, "tokens?": TOKENS, "inside?": PLACES, "log_probs?": NUMBERS}
SAMPLE |= LISTS
SAMPLE |= {f"{name}?": SCORE for name in SCORES}
PUBLISHED = {"prompt": TEXT, "active": LATENTS, "topk": LATENTS, "bottomk": LATENTS}  # a sample of the authors' file
RECORD = dict.fromkeys(("id", "text", "answer"), TEXT) | dict.fromkeys(SCORES, SCORE) | {"log_probs?": NUMBERS}
RECORD |= {f"{name.rstrip('?')}?": form for name, form in SAMPLE.items() if name not in RECORD}  # of kept questions
COUNT = (lambda x: x is None or type(x) is int, "a whole number")
SELECTION = dict.fromkeys(("limit?", "sample?", "seed?"), COUNT)
MEANS = {  # of means.json
    "run": (lambda x: not find_problem(x, SELECTION), "an object with a selection"),
    "means": (lambda x: NUMBERS[0](x) and all(map(math.isfinite, x)), "a list of numbers"),
}
RUN = (lambda x: not find_problem(x, {"ranking": TEXT}), "an object with a ranking")
ENTRY = {"round": TEXT, "run": RUN, "population": TEXT, "intervals": OBJECT}  # of results.json
ENTRY |= {"journal?": TEXT, "latents?": TEXT}  # the names of the files that it is of
ENTRY |= dict.fromkeys(("n", "em", "f1", "accuracy"), MEAN)


def find_problem(value, form):
    """Says what in a value is not of one of these forms; None if all is. Other fields may stand beside."""
    if not isinstance(value, dict):
        return "it is not an object"
    for field, (is_right, kind) in form.items():
        name = field.rstrip("?")
        if (name in value or name == field) and not is_right(value.get(name, ...)):  # ...: none of JSON's values
            return f"{name} is not {kind}"
    return None


def write_activations(path, run, samples):
    """One JSON object, a line a sample, so that it can be read by people and diffed; `samples` may be a generator."""
    with write_whole(path) as file:
        file.write('{"run": ' + json.dumps(run, ensure_ascii=False) + ',\n"samples": [\n')
        file.write(",\n".join(json.dumps(sample, ensure_ascii=False) for sample in samples) + "\n]}\n")


def read_activations(path):
    """The run, None in the authors' published form, and the samples: each a SAMPLE, or (theirs) a PUBLISHED."""
    content = load_json(path)
    if isinstance(content, list):
        content = {"run": None, "samples": _published_samples(path, content)}
    elif find_problem(content, {"run": OBJECT}):
        raise UserError(f"{path}: names no run: it is not round 1's file")
    run, samples, ids = content["run"], content.get("samples"), set()
    if problem := find_problem(run or {}, SELECTION):
        raise UserError(f"{path}: its run is damaged ({problem})")
    if not isinstance(samples, list) or not samples:
        raise UserError(f"{path}: holds no sample: it is not round 1's file, or round 1 kept no question")
    for number, sample in enumerate(samples, 1):
        if problem := find_problem(sample, PUBLISHED if run is None else SAMPLE):
            raise UserError(f"{path}, sample {number}: {problem}")
        for which in ("topk", "bottomk"):
            if len(sample.get(f"removed_{which}", sample[which])) != len(sample[which]):
                raise UserError(f"{path}, sample {number}: removed_{which} is not as long as {which}")
        if sample.get("id", number) in ids:
            raise UserError(f"{path}, sample {number}: the id {sample['id']!r} stands twice")
        ids.add(sample.get("id", number))
    return run, samples


def _published_samples(path, content):
    """Samples of the authors' form, a list of {prompt: {"original", "have_gradient", "no_gradient"}}."""
    # "have_gradient" is what they call the TopK of the mean activation, "no_gradient" its BottomK.
    names = {"active": "original", "topk": "have_gradient", "bottomk": "no_gradient"}
    try:
        pairs = [pair for entry in content for pair in entry.items()]
        return [{"prompt": prompt} | {ours: latents.get(names[ours]) for ours in names} for prompt, latents in pairs]
    except AttributeError:
        raise UserError(f"{path}: is not of the authors' published form {{prompt: latents}}") from None


def name_mean_file(path: Path) -> Path:
    """The file beside a ranking's activations, with the same lists and what mean ablation of them changes."""
    return path.with_name(f"{path.stem}_mean{path.suffix}")


def write_results(path, entries):
    with write_whole(path) as file:
        json.dump(entries, file, indent=1, ensure_ascii=False)
        file.write("\n")


def read_results(path: Path, run: dict, overwrite: bool) -> list[dict]:
    """The entries of results.json, of any ranking. Those of another run are refused, or left out if `overwrite`."""
    entries = load_json(path) if path.exists() else []
    if not isinstance(entries, list):
        raise UserError(f"{path}: is not a file of results: move it away")
    for entry in entries:
        if problem := find_problem(entry, ENTRY):
            raise UserError(f"{path}: holds an entry that is damaged ({problem}): move the file away")
        if not overwrite:
            provenance.refuse_other_run(path, entry["run"], run, provenance.SETTINGS)
    return [entry for entry in entries if not provenance.differences(entry["run"], run, provenance.SETTINGS)]
