"""A round's records on disk, so that what was answered survives whatever ends the process. Knows nothing of models."""

import glob
import itertools
import json
import os

from experiment import UserError, results, say

SCORES = ("em", "f1", "accuracy", "named")


class Journal:
    """A round's records, one JSON object a line, the first line {"run": ...}; in memory a dict, id -> record.

    Written and synced a batch at a time. The file appears with its first batch: until then an older one stays.

    Where several processes share a round, process 0 writes `path`, and each other one a part of its own beside it
    (predictions_true.part1.jsonl). All are read on opening, so any number of processes can go on where any number
    were interrupted. All of them open the journal before the first one appends, and have appended their last when
    process 0 calls finish().
    """

    def __init__(self, path, run, process=0, overwrite=False):
        """run: what makes these records. `self.run` is that of the files that are there, if any: it is the same but
        for what is not compared. overwrite: starts again, and reads nothing.

        Raises UserError for files that are damaged or of another run.
        """
        self.path, self.run, self.records = path, dict(run), {}
        self._own = path if process == 0 else path.with_name(f"{path.stem}.part{process}{path.suffix}")
        self._own_end = None  # where its last whole record ends, in bytes; None: the next batch makes the file (anew)
        if not overwrite:
            for torn in self._read([path, *self._find_parts(path.suffix)]):
                say(f"{torn}: its last line was cut off while it was written; that question is asked again")
        elif process == 0:
            self._remove_parts()

    def __contains__(self, question_id):
        return question_id in self.records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, question_id):
        return self.records[question_id]

    def append(self, records):
        """Writes the records that are not there yet, and syncs them to disk."""
        fresh = {record["id"]: record for record in records if record["id"] not in self}
        if fresh and self._own_end is None:
            self._write_own(fresh)
        elif fresh:
            try:
                with open(self._own, "r+b") as file:
                    file.seek(self._own_end)
                    file.truncate()  # a line that was cut off
                    file.writelines(map(_to_line, fresh.values()))
                    file.flush()
                    os.fsync(file.fileno())
                    self._own_end = file.tell()
            except OSError as error:
                raise UserError(f"{self._own}: cannot be written ({error.strerror})") from None
        self.records |= fresh

    def finish(self, ids):
        """Makes one file of what all processes wrote, in the order of `ids`, and removes their parts.

        For process 0. The file has the same bytes however the work was interrupted or shared. Raises UserError where
        a record is missing.
        """
        self.reload()
        if missing := [question_id for question_id in ids if question_id not in self]:
            raise UserError(f"{self.path}: lacks {len(missing)} records ({missing[0]!r}): the same command goes on")
        self.records = {question_id: self[question_id] for question_id in ids}
        if not self._is_written():
            self._write_own(self.records)
        self._remove_parts()

    def reload(self):
        """Reads again what all processes have written. For those other than process 0, once it has called finish()."""
        self.records = {}
        # A file at `path` that process 0 has not begun is of an earlier run, to be overwritten.
        stale = self._own == self.path and self._own_end is None
        self._read([*([] if stale else [self.path]), *self._find_parts(self.path.suffix)])

    def _find_parts(self, ending):
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.stem)}.part[0-9]*{ending}"))

    def _remove_parts(self):
        for path in self._find_parts(""):  # and what write_whole() left beside a part when it was killed
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f"{path}: cannot be removed ({error.strerror})") from None

    def _read(self, files):
        """Takes over the records of these files, of which the first one counts most. Returns those with a torn line."""
        wanted, torn = self.run, []
        for path in reversed(files):
            try:
                run, records, end, is_torn = _read_file(path)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror})") from None
            for fields in (results.COMPARED, results.SELECTED):
                results.refuse_other_run(path, run, wanted, fields)
            self.run = run
            self.records |= records
            if path == self._own:
                self._own_end = end
            torn += [path] if is_torn else []
        return torn

    def _to_lines(self, records):
        yield _to_line({"run": self.run})
        yield from map(_to_line, records.values())

    def _write_own(self, records):
        with results.write_whole(self._own, "wb") as file:
            file.writelines(self._to_lines(records))
            end = file.tell()
        self._own_end = end

    def _is_written(self):
        if self._own_end is None:
            return False
        with open(self.path, "rb") as file:
            return all(old == new for old, new in itertools.zip_longest(file, self._to_lines(self.records)))


def _to_line(entry):
    return (json.dumps(entry, ensure_ascii=False) + "\n").encode()


def _read_file(path):
    """A file's run, its records by id, where the last whole line ends in bytes, and whether a torn one follows."""
    run, records, end, is_torn = None, {}, 0, False
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            is_torn = not line.endswith(b"\n")
            if is_torn:
                break
            try:
                entry = json.loads(line)
                if number == 1:
                    run = dict(entry["run"])
                else:
                    _check_record(entry, records)
                    records[entry["id"]] = entry
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(
                    f"{path}, line {number}: is damaged ({error}): remove that line, or --overwrite"
                ) from None
            end += len(line)
    if run is None:
        raise UserError(f"{path}, line 1: names no run: this is no journal; remove it, or --overwrite")
    return run, records, end, is_torn


def _check_record(entry, known):
    """Raises one of several errors, caught above, for anything that a round does not write."""
    texts = [entry[name] for name in ("id", "text", "answer")]
    if not all(isinstance(text, str) for text in texts) or entry["id"] in known:
        raise ValueError("id, text and answer must be strings, and an id stand once")
    "".join(texts).encode()  # half a character (\ud800), which could not be written again, is a ValueError
    needed = (*SCORES, "tokens", "active") if "latents" in entry else SCORES
    by_ranking = entry.get("latents", {}).values()
    for part, names in [(entry, needed), *((ranking, ("topk", "bottomk")) for ranking in by_ranking)]:
        if wrong := results.find_wrong_field(part, names):
            raise ValueError(wrong)
