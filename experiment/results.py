"""Activations and results on disk, with the run that made them: written whole, read strictly. Knows nothing of models.

A run is a dict that says what made a file. A file that is damaged, or of another run, is a UserError that names it.
"""

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path

import filelock

from experiment import UserError, os_errors

# What changes a result by design. Versions, device and batch size are in a run too, for readers, and not compared.
COMPARED = (
    *("model", "sae_release", "sae_id", "hook_name", "d_sae", "ranking", "dtype", "sae_dtype", "error_term", "dataset"),
    *("split", "exclude_special_tokens", "questions", "prompt_template", "max_new_tokens"),
)
# What else makes a journal another one; of activations, rounds 2 and 3 may mask a part of what round 1 ranked.
SELECTED = ("limit", "sample", "seed", "ranking_seed", "masked", "k", "activations")
WHERE_BOTH = ("hook_name", "d_sae", "ranking_seed")  # compared where both runs have them; two come with the SAE
DEFAULTS = {"error_term": "drop"}  # of files older than the field


def differences(made, wanted, fields):
    """Names each of `fields` in which two runs differ, with both values; an empty text where they agree."""
    named = []
    for field in fields:
        old, new = (run.get(field, DEFAULTS.get(field)) for run in (made, wanted))
        if old != new and not (field in WHERE_BOTH and None in (old, new)):
            named.append(f"{field} {_shorten(old)}, now {_shorten(new)}")
    return "; ".join(named)


def _shorten(value):
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}"


def refuse_other_run(path, made, wanted, fields):
    """Raises UserError where the run `made` in a file differs in `fields` from the one that is wanted now."""
    if named := differences(made, wanted, fields):
        raise UserError(f"{path}: is of another run ({named}): repeat its options, or give --output-dir or --overwrite")


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
RUN = (lambda x: not find_problem(x, {"ranking": TEXT}), "an object with a ranking")
ENTRY = {"round": TEXT, "run": RUN, "population": TEXT, "intervals": OBJECT}  # of results.json
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
    if not path.exists():
        raise UserError(f"{path}: there is no such file: run baseline.py first, or give --activations")
    content = load_json(path)
    if isinstance(content, list):
        content = {"run": None, "samples": _published_samples(path, content)}
    elif find_problem(content, {"run": OBJECT}):
        raise UserError(f"{path}: names no run: it is not round 1's file")
    run, samples, ids = content["run"], content.get("samples"), set()
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


def digest(samples, *fields):
    """A hash of these fields of all samples: it ties a journal to what it was made from."""
    texts = (json.dumps([sample[field] for field in fields]) for sample in samples)
    return hashlib.sha256("".join(texts).encode()).hexdigest()


def write_results(path, entries):
    with write_whole(path) as file:
        json.dump(entries, file, indent=1, ensure_ascii=False)
        file.write("\n")


def read_results(path, run, overwrite):
    """The entries of results.json, of any ranking. Those of another run are refused, or left out if `overwrite`."""
    entries, fields = load_json(path) if path.exists() else [], [field for field in COMPARED if field != "ranking"]
    if not isinstance(entries, list):
        raise UserError(f"{path}: is not a file of results: move it away")
    for entry in entries:
        if problem := find_problem(entry, ENTRY):
            raise UserError(f"{path}: holds an entry that is damaged ({problem}): move the file away")
        if not overwrite:
            refuse_other_run(path, entry["run"], run, fields)
    return [entry for entry in entries if not differences(entry["run"], run, fields)]
