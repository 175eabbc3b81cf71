"""A round's records on disk, so that what was answered survives whatever ends the process. Knows nothing of models."""

import json
import os

from experiment import UserError, own_mistakes, results, say


class Journal(dict):
    """A round's records, id -> record; on disk one JSON object a line, the first line {"run": ...}.

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
        super().__init__()
        self.path, self.run = path, dict(run)
        self._own = path if process == 0 else path.with_name(f"{path.stem}.part{process}{path.suffix}")
        self._own_end = None  # where its last whole record ends, in bytes; None: the next batch makes the file (anew)
        if not overwrite:
            for file in filter(os.path.exists, [path, *self._find_parts()]):
                if self._read(file):
                    say(f"{file}: its last line was cut off while it was written; that question is asked again")
        elif process == 0:
            self._remove_parts()

    @own_mistakes()
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
        self.update(fresh)

    def finish(self, ids):
        """Makes one file of what all processes wrote, in the order of `ids`, and removes their parts.

        For process 0. The file has the same bytes however the work was interrupted or shared. Raises UserError where
        a record is missing.
        """
        parts, order = self._find_parts(), list(self)
        for part in parts:
            self._read(part)
        if missing := [question_id for question_id in ids if question_id not in self]:
            raise UserError(f"{self.path}: lacks {len(missing)} records ({missing[0]!r}): the same command goes on")
        records = {question_id: self[question_id] for question_id in ids}
        self.clear()
        self.update(records)
        if parts or order != list(self) or self._own_end is None or self._own_end < self.path.stat().st_size:
            self._write_own(self)
        self._remove_parts()

    def reload(self):
        """Reads what all processes have written. For those other than process 0, once it has called finish()."""
        self.clear()
        self._read(self.path)

    def _find_parts(self, ending=".jsonl"):
        return sorted(self.path.parent.glob(f"{self.path.stem}.part[0-9]*{ending}"))

    def _remove_parts(self):
        for path in self._find_parts(""):  # and what write_whole() left beside a part when it was killed
            path.unlink(missing_ok=True)

    def _write_own(self, records):
        with results.write_whole(self._own, "wb") as file:
            file.writelines(map(_to_line, [{"run": self.run}, *records.values()]))
            end = file.tell()
        self._own_end = end

    def _read(self, path):
        """Takes over a file's records, where none before it had them. Returns whether its last line was cut off."""
        run, records, end = None, {}, 0
        try:
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.endswith(b"\n"):
                        break
                    if number == 1:
                        run = _parse(line, {"run": results.OBJECT})["run"]
                    else:
                        record = _parse(line, results.RECORD)
                        if records.setdefault(record["id"], record) is not record:
                            raise ValueError("its id stands twice")
                    end += len(line)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: is damaged ({error}): remove that line, or --overwrite") from None
        if run is None:
            raise UserError(f"{path}, line 1: names no run: this is no journal; remove it, or --overwrite")
        results.refuse_other_run(path, run, self.run, (*results.COMPARED, *results.SELECTED))
        if not self:
            self.run = run
        if path == self._own:
            self._own_end = end
        self.update({**records, **self})
        return not line.endswith(b"\n")


def is_begun(path, run):
    """Whether the file at `path` is a journal of this run."""
    try:
        with open(path, "rb") as file:
            found = json.loads(file.readline())["run"]
        return not results.differences(found, run, (*results.COMPARED, *results.SELECTED))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _to_line(entry):
    return (json.dumps(entry, ensure_ascii=False) + "\n").encode()


def _parse(line, form):
    entry = json.loads(line)
    if problem := results.find_problem(entry, form):
        raise ValueError(problem)
    return entry
