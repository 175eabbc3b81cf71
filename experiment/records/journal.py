"""A round's records on disk, so that what was answered survives whatever ends the process. Knows nothing of models."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from experiment import UserError, os_errors, own_mistakes, say
from experiment.records import files, provenance


class Journal(dict):
    """A round's records, id -> record; on disk one JSON object a line, the first line {"run": ...}.

    Written and synced a batch at a time. The file appears with its first batch: until then an older one stays.

    Where several processes share a round, process 0 writes `path`, and each other one a part of its own beside it
    (predictions_true.part1.jsonl). All are read on opening, so any number of processes can go on where any number
    were interrupted. All of them open the journal before the first one appends, and have appended their last when
    process 0 calls finish().
    """

    def __init__(
        self,
        path: Path,
        run: dict,
        process: int = 0,
        overwrite: bool = False,
        find_wanted: Callable[[dict], dict] | None = None,
    ):
        """run: what makes these records. `self.run` is that of the files that are there, if any: it is the same but
        for what is not compared. overwrite: starts again, and reads nothing.

        find_wanted: for the run in a file, the one that it has to be of, so that a journal of fewer questions can go
        on as one of more; without it, that is `run`.

        Raises UserError for files that are damaged or of another run.
        """
        super().__init__()
        self.path, self.run = path, dict(run)
        self._wanted, self._find_wanted = dict(run), find_wanted or (lambda made: run)
        self._own = path if process == 0 else path.with_name(f"{path.stem}.part{process}{path.suffix}")
        self._is_whole = False  # whether our own file ends with a whole line that was written here
        if overwrite and process == 0:
            self._remove_parts()
        for file in [] if overwrite else filter(os.path.exists, [path, *self._find_parts()]):
            if self._read(file):
                say(f"{file}: its last line was cut off while it was written; that question is asked again")

    @own_mistakes()
    def append(self, records):
        """Writes the records that are not there yet, and syncs them to disk."""
        fresh = {record["id"]: record for record in records if record["id"] not in self}
        if not fresh:
            return
        if self._is_whole:
            self._is_whole = False
            with os_errors(f"{self._own}: cannot be written"), open(self._own, "ab") as file:
                file.writelines(map(_to_line, fresh.values()))
                file.flush()
                os.fsync(file.fileno())
        else:  # anew, with all that is known: what is there is another run's, or its last line is cut off
            self._write_own({**self, **fresh})
        self._is_whole = True
        self.update(fresh)

    def finish(self, ids):
        """Makes one file of what all processes wrote, in the order of `ids`, removes their parts, and returns the
        records. For process 0.

        The file has the same bytes however the work was interrupted or shared. Raises UserError where a record is
        missing.
        """
        for part in self._find_parts():
            self._read(part)
        ids = list(ids)
        if missing := [question_id for question_id in ids if question_id not in self]:
            raise UserError(f"{self.path}: lacks {len(missing)} records ({missing[0]!r}): the same command goes on")
        records = {question_id: self[question_id] for question_id in ids}
        self.clear()
        self.update(records)
        if not self.path.exists() or self.path.read_bytes() != self._to_bytes(self):
            self._write_own(self)
        self._remove_parts()
        return list(self.values())

    def _find_parts(self, ending=".jsonl"):
        return sorted(self.path.parent.glob(f"{self.path.stem}.part[0-9]*{ending}"))

    def _remove_parts(self):
        for path in self._find_parts(""):  # and what write_whole() left beside a part when it was killed
            path.unlink(missing_ok=True)

    def _to_bytes(self, records):
        return b"".join(map(_to_line, [{"run": self.run}, *records.values()]))

    def _write_own(self, records):
        with files.write_whole(self._own, "wb") as file:
            file.write(self._to_bytes(records))

    def _read(self, path):
        """Takes over a file's records, where none before it had them. Returns whether its last line was cut off."""
        records, number = {}, 1
        try:
            with os_errors(f"{path}: cannot be read"):
                *lines, cut_off = path.read_bytes().split(b"\n")
            run = _parse(lines[0] if lines else b"{}", {"run": files.OBJECT})["run"]
            for line in lines[1:]:
                number += 1
                record = _parse(line, files.RECORD)
                if records.setdefault(record["id"], record) is not record:
                    raise ValueError("its id stands twice")
        except (ValueError, RecursionError) as error:
            damaged = "that line" if number > 1 else "the file"
            raise UserError(f"{path}, line {number}: is damaged ({error}): remove {damaged}, or --overwrite") from None
        provenance.refuse_other_run(path, run, self._find_wanted(run), provenance.ALL)
        if not self:
            # Of all that is asked now: the file may be of fewer questions.
            named = (*provenance.SELECTION, "activations")
            self.run = run | {name: self._wanted[name] for name in named if name in self._wanted}
        self.update({**records, **self})
        return bool(cut_off)


def read_run(path: Path) -> dict | None:
    """The run of a journal; None where there is none that can be read."""
    try:
        with open(path, "rb") as file:
            return _parse(file.readline(), {"run": files.OBJECT})["run"]
    except (OSError, ValueError, RecursionError):
        return None


def _to_line(entry):
    return (json.dumps(entry, ensure_ascii=False) + "\n").encode()


def _parse(line, form):
    entry = json.loads(line)
    if problem := files.find_problem(entry, form):
        raise ValueError(problem)
    return entry
