"""The files a round leaves: journal, activations, results. Written safely, read strictly; knows nothing of models."""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import filelock

from experiment import UserError, streams

# What changes a result by design. Versions, device and batch size are in `run` too, for readers, and not compared.
COMPARED = (
    *("model", "sae_release", "sae_id", "hook_name", "d_sae", "ranking", "dtype", "sae_dtype", "dataset", "split"),
    *("exclude_special_tokens", "questions", "prompt_template", "max_new_tokens"),
)
# What also makes a journal or a results entry another one; rounds 2 and 3 may mask a part of what round 1 ranked.
SELECTED = ("limit", "sample", "seed", "ranking_seed", "splice", "answers", "masked", "k", "activations")


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def differences(found, wanted, fields):
    """Names each of `fields` in which two runs differ, with both values, the found one first. A field one lacks counts
    only where the other's is not None; hook_name and d_sae, known late, only where both have them."""
    names = []
    for field in fields:
        late = field in ("hook_name", "d_sae") and not (field in found and field in wanted)
        if not late and found.get(field) != wanted.get(field):
            names.append(f"{field} {_short(found.get(field))}, now {_short(wanted.get(field))}")
    return "; ".join(names)


def _short(value):
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}"


def replaceable(path, found, wanted, overwrite, notify):
    """Whether the files of the run `found` make way for those of `wanted`. False: it is the same run, to go on with.

    A demo run's files always make way for another run's, which `notify` is told; others only with overwrite.
    """
    named = differences(found, wanted, COMPARED) or differences(found, wanted, SELECTED)
    if overwrite or not named:
        return overwrite
    if found.get("demo"):
        notify(f"{path.parent}: the files of a demo run are replaced ({named})")
        return True
    raise UserError(f"{path}: is of another run ({named}): repeat its options, or give --output-dir or --overwrite")


def lock(folder):
    """Refuses a second writer in the same folder. The kernel releases the lock when this process ends, however it does.

    Returns a context manager that releases it too.
    """
    try:
        return filelock.FileLock(folder / ".lock").acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"{folder}: another round is writing here: wait for it, or give another --output-dir") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None


# ---------------------------------------------------------------------------------------------------------------------
# Whole files


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


# ---------------------------------------------------------------------------------------------------------------------
# Journals


class Journal:
    """A round's records on disk, one JSON object a line, the first line {"run": ...}.

    Appended to and synced a batch at a time, so that what was finished survives whatever ends the process. Only ids
    and offsets are kept in memory. The file appears with its first batch: until then an older one stays.

    Where several processes work on a round, each appends to a part of its own, and the first one absorbs the parts.
    """

    def __init__(self, path, run, overwrite=False, notify=print):
        self.path, self.run, self._notify = path, run, notify
        self._forget()
        if path.exists():
            found = self._scan()
            if replaceable(path, found, run, overwrite, notify):
                self._forget()
            else:
                self.run = found
                if self._torn:
                    notify(f"{path}: its last line was cut off while it was written; that question is asked again")
                    os.truncate(path, self._end)
                self._file = open(path, "r+b")
                self._file.seek(0, os.SEEK_END)

    def _forget(self):
        self._offsets = {}  # id -> where its line begins, in bytes
        self._put_off = set()  # ids whose answers are long, to be asked again when all others are done
        self._order = []  # what the lines are: ids, and tuples of ids that were put off
        self._file = None

    def reload(self):
        """Reads again what another process has written meanwhile."""
        self._forget()
        self._scan()

    def part(self, number):
        """The journal that process `number` appends to."""
        return Journal(self.path.with_suffix(f".process{number}.jsonl"), self.run, notify=self._notify)

    def absorb_parts(self, overwrite=False):
        """Takes over what processes left in their parts, and removes these."""
        for path in sorted(self.path.parent.glob(f"{self.path.stem}.process*.jsonl")):
            part = Journal(path, self.run, overwrite, self._notify)
            if len(part) or part._put_off:
                if not self._order:
                    self.run = part.run
                self.append(part.read(list(part._offsets)), [i for i in part._order if isinstance(i, tuple)])
            path.unlink()

    def arrange(self, first, second):
        """Puts the lines in the order in which one process that is never interrupted writes them.

        first, second: the batches, lists of ids, of those not put off and of those that were.
        """
        order = []
        for batch in first:
            order += [question_id for question_id in batch if question_id not in self._put_off]
            if late := tuple(question_id for question_id in batch if question_id in self._put_off):
                order.append(late)
        order += [question_id for batch in second for question_id in batch]
        if order == self._order:
            return
        with write_whole(self.path, "wb") as file:
            file.write(_line({"run": self.run}))
            for entry in order:
                record = {"put_off": entry} if isinstance(entry, tuple) else next(self.read([entry]))
                file.write(_line(record))
        self._file.close()
        self.reload()

    def __contains__(self, question_id):
        return question_id in self._offsets

    def __len__(self):
        return len(self._offsets)

    def put_off(self, question_id):
        return question_id in self._put_off

    def _scan(self):
        """Reads the file once: its run, where each record stands, and whether its last line is torn."""
        run, self._end, self._torn = None, 0, False
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    self._torn = True
                    break
                try:
                    entry = json.loads(line)
                    if number == 1:
                        run = dict(entry["run"])
                    elif "put_off" in entry:
                        self._put_off.update(entry["put_off"])
                        self._order.append(tuple(entry["put_off"]))
                    else:
                        self._offsets[_check_record(entry, self._offsets)] = self._end
                        self._order.append(entry["id"])
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise UserError(
                        f"{self.path}, line {number}: is damaged ({error}): remove that line, or --overwrite"
                    ) from None
                self._end += len(line)
        if run is None:
            raise UserError(f"{self.path}, line 1: names no run: this is no journal; remove it, or --overwrite")
        return run

    def append(self, records, put_off=()):
        """Writes the records, and the lists of ids put off, that are not there yet, and syncs them to disk."""
        fresh = [(record["id"], _line(record)) for record in records if record["id"] not in self]
        for ids in put_off:
            if ids := tuple(question_id for question_id in ids if not self.put_off(question_id)):
                fresh.append((ids, _line({"put_off": ids})))
        try:
            appears = self._file is None
            beside = self.path.with_name(self.path.name + ".part")
            if appears:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(beside, "w+b")
                self._file.write(_line({"run": self.run}))
            place = self._file.tell()
            self._file.write(b"".join(line for _, line in fresh))
            self._file.flush()
            os.fsync(self._file.fileno())
            if appears:
                os.replace(beside, self.path)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None
        for entry, line in fresh:
            self._order.append(entry)
            if isinstance(entry, tuple):
                self._put_off.update(entry)
            else:
                self._offsets[entry] = place
            place += len(line)

    def read(self, question_ids):
        """Yields the records of these ids, in this order."""
        question_ids = list(question_ids)
        if not question_ids:  # there may be no file either
            return
        with open(self.path, "rb") as file:
            for question_id in question_ids:
                file.seek(self._offsets[question_id])
                yield json.loads(file.readline())


def _check_record(entry, known):
    """The id of a journal's record; ValueError, KeyError or TypeError for anything that a round does not write."""
    if not all(isinstance(entry[name], str) for name in ("id", "text", "answer")) or entry["id"] in known:
        raise ValueError("id, text and answer must be strings, and an id stand once")
    if not all(isinstance(entry[name], float) and 0 <= entry[name] <= 1 for name in ("em", "f1", "accuracy")):
        raise ValueError("em, f1 and accuracy must be from 0.0 to 1.0")
    if "topk" in entry and not all(_are_latents(entry[name]) for name in ("tokens", "active", "topk", "bottomk")):
        raise ValueError("tokens, active, topk and bottomk must be lists of ids")
    return entry["id"]


def _are_latents(value):
    return isinstance(value, list) and all(type(latent) is int and latent >= 0 for latent in value)


def _line(entry):
    return (json.dumps(entry, ensure_ascii=False) + "\n").encode()


# ---------------------------------------------------------------------------------------------------------------------
# Activations


def write_activations(path, run, samples):
    """One JSON object, a line a sample, so that it can be read by people and diffed; `samples` may be a generator."""
    with write_whole(path) as file:
        file.write('{"run": ' + json.dumps(run, ensure_ascii=False) + ',\n"samples": [')
        for number, sample in enumerate(samples):
            file.write((",\n" if number else "\n") + json.dumps(sample, ensure_ascii=False))
        file.write("\n]}\n")


def read_activations(path):
    """The run (None in the authors' published form) and a list, on disk, of samples: id (theirs: prompt), topk, ...

    Of what else a sample holds only the answer is kept.
    """
    samples, seen, run, key = streams.Spool(), set(), None, None
    try:
        for number, (key, value) in enumerate(streams.pieces(path), 1):
            if key is None:
                for sample in _published(value, f"{path}, entry {number}"):
                    samples.append(_check_sample(sample, ("prompt",), f"{path}, sample {len(samples) + 1}"))
            elif key == "run":
                run = value
            elif key == "samples":
                where = f"{path}, sample {len(samples) + 1}"
                samples.append(_check_sample(value, ("id", "answer"), where))
                if value["id"] in seen:
                    raise UserError(f"{where}: the id {value['id']!r} stands twice")
                seen.add(value["id"])
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file: run baseline.py first, or give --activations") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if key is not None and not isinstance(run, dict):
        raise UserError(f"{path}: names no run: it is not round 1's file")
    if not len(samples):
        raise UserError(f"{path}: holds no sample: it is not round 1's file, or round 1 kept no question")
    return run, samples


def _check_sample(sample, texts, where):
    """What a sample needs, and no more. texts: the names of what must be strings."""
    if not isinstance(sample, dict) or not all(isinstance(sample.get(name), str) for name in texts):
        raise UserError(f"{where}: lacks {' or '.join(texts)}")
    for name in ("active", "topk", "bottomk"):
        if not _are_latents(sample.get(name)):
            raise UserError(f"{where}: {name} is not a list of latents")
    return {name: sample[name] for name in (*texts, "active", "topk", "bottomk")}


def _published(entry, where):
    """Yields the samples of an entry of the authors' form: {prompt: {"original", "have_gradient", "no_gradient"}}."""
    if not isinstance(entry, dict) or not all(isinstance(latents, dict) for latents in entry.values()):
        raise UserError(f"{where}: is not of the authors' published form {{prompt: latents}}")
    for prompt, latents in entry.items():
        # "have_gradient" is what they call the TopK of the mean activation, "no_gradient" its BottomK.
        names = {"active": "original", "topk": "have_gradient", "bottomk": "no_gradient"}
        yield {"prompt": prompt} | {ours: latents.get(theirs) for ours, theirs in names.items()}


def digest(samples, *fields):
    """A hash of these fields of all samples: it ties a journal to what it was made from."""
    sha = hashlib.sha256()
    for sample in samples:
        sha.update(json.dumps([sample[field] for field in fields]).encode())
    return sha.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Results


def read_results(path, run, overwrite, notify):
    """The entries of results.json that belong with `run`; those of another run make way as `replaceable` says."""
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error})") from None
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("run"), dict) and {"round", "k"} <= e.keys() for e in entries
    ):
        raise UserError(f"{path}: is not a file of results: move it away")
    fields = [field for field in COMPARED if field != "ranking"]  # rankings stand side by side
    keep, shared = [], {field: run[field] for field in fields if field in run}
    for entry in entries:
        found = {field: entry["run"][field] for field in (*fields, "demo") if field in entry["run"]}
        if not differences(found, shared, COMPARED):
            keep.append(entry)
        else:
            replaceable(path, found, shared, overwrite, notify)
    return keep


def write_results(path, entries):
    with write_whole(path) as file:
        json.dump(entries, file, indent=1, ensure_ascii=False)
        file.write("\n")


def write_figure(path, draw):
    """draw(file) writes the picture's bytes."""
    with write_whole(path, "wb") as file:
        draw(file)


def folder(path):
    """The output folder, made where it is missing; one line where that cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {path}: cannot be made ({error.strerror})") from None
    return Path(path)
