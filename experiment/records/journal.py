"""A round's records on disk, so that what was answered survives whatever ends the process. Knows nothing of models."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from experiment import UserError, os_errors, own_mistakes, say
from experiment.masks import ROUND_NAMES
from experiment.records import files
from experiment.records.provenance import ALL, SELECTION, refuse_other_run
from experiment.records.schema import (
    FieldMissing,
    JournalHead,
    Provenance,
    Record,
    parse_record,
    parse_stored,
    tell_version,
    to_json,
)


class Journal(dict[str, Record]):
    """A round's records, id -> record; on disk one JSON object per line, the first line {"run": ...}.

    Written and synced a group of batches at a time. The file appears with the first group: until then an older one
    stays.

    Where several processes share a round, process 0 writes `path`, and each other one a part of its own beside it
    (predictions_true.part1.jsonl). All are read on opening, so any number of processes can go on where any number
    were interrupted. All of them open the journal before the first one appends, and have appended their last when
    process 0 calls finish().
    """

    def __init__(
        self,
        path: Path,
        provenance: Provenance,
        process: int = 0,
        overwrite: bool = False,
        adopt_selection: Callable[[Provenance], Provenance] | None = None,
        only: Collection[str] | None = None,
    ):
        """provenance: what makes these records. `self.provenance` is that of the files that are there, if any: it
        differs in nothing that is compared. overwrite: starts again, and reads nothing.

        adopt_selection: from the provenance that a file has, the one that it has to have, so that a journal of fewer
        questions can go on as one of more; None: that is `provenance`.

        only: the ids of the questions that it is of, where these are not all that the round asks.

        Raises UserError for files that are damaged or of another run.
        """
        super().__init__()
        self.path = path
        self.provenance = provenance
        self._provenance_now = provenance
        self._only = only
        self._adopt_selection = adopt_selection or (lambda stored: provenance)
        self._own = path if process == 0 else path.with_name(f"{path.stem}.part{process}{path.suffix}")
        self._is_whole = False  # whether our own file ends with a whole line that was written here
        if overwrite:
            if process == 0:
                self._remove_parts()
            return
        for file in [path, *self._find_parts()]:
            if not os.path.exists(file):
                continue
            if self._read(file):
                say(f"{file}: its last line was cut off while it was written; that question is asked again")

    @classmethod
    def read_as_is(cls, path: Path) -> Journal:
        """A journal as it is on disk, whatever made it."""
        return cls(path, read_provenance(path) or Provenance())

    def lacks(self, question_id: str) -> bool:
        """Whether the record of a question of the round is not there yet, and belongs here."""
        return question_id not in self and (self._only is None or question_id in self._only)

    @own_mistakes()
    def append(self, records: Iterable[Record]) -> None:
        """Writes the records that are not there yet and belong here, and syncs them to disk."""
        fresh = {}
        for record in records:
            if self.lacks(record.id):
                fresh[record.id] = record
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

    def finish(self, ids: Iterable[str]) -> list[Record]:
        """Makes one file of what all processes wrote, in the order of `ids`, removes their parts, and returns the
        records. For process 0.

        The file has the same bytes however the work was interrupted or shared. Raises UserError where a record is
        missing.
        """
        for part in self._find_parts():
            self._read(part)
        records = {}
        missing = []
        for question_id in ids:
            if question_id in self:
                records[question_id] = self[question_id]
            else:
                missing.append(question_id)
        if missing:
            raise UserError(f"{self.path}: lacks {len(missing)} records ({missing[0]!r}): the same command goes on")
        self.clear()
        self.update(records)
        if not self.path.exists() or self.path.read_bytes() != self._to_bytes(self):
            self._write_own(self)
        self._remove_parts()
        return list(self.values())

    def _find_parts(self, ending: str = ".jsonl") -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.stem}.part[0-9]*{ending}"))

    def _remove_parts(self) -> None:
        for path in self._find_parts(""):  # and what write_whole() left beside a part when it was killed
            path.unlink(missing_ok=True)

    def _to_bytes(self, records: Mapping[str, Record]) -> bytes:
        lines = [{"run": self.provenance}, *records.values()]
        return b"".join(map(_to_line, lines))

    def _write_own(self, records: Mapping[str, Record]) -> None:
        with files.write_whole(self._own, "wb") as file:
            file.write(self._to_bytes(records))

    def _read(self, path: Path) -> bool:
        """Takes over a file's records, where none before it had them. Returns whether its last line was cut off."""
        with os_errors(f"{path}: cannot be read"):
            *lines, cut_off = path.read_bytes().split(b"\n")
        number = 1
        records: dict[str, Record] = {}
        try:
            stored = parse_stored(JournalHead, json.loads(lines[0] if lines else b"{}")).provenance
            for line in lines[1:]:
                number += 1
                record = parse_record(json.loads(line))
                if record.id in records:
                    raise ValueError("its id stands twice")
                records[record.id] = record
        except (ValueError, RecursionError) as error:
            where = f"{path}, line {number}"
            if isinstance(error, FieldMissing) and number > 1:
                raise UserError(f"{where}: {tell_version(error, 'give --output-dir or --overwrite')}") from None
            damaged = "that line" if number > 1 else "the file"
            raise UserError(f"{where}: is damaged ({error}): remove {damaged}, or --overwrite") from None
        refuse_other_run(path, stored, self._adopt_selection(stored), ALL)
        if not self:
            self.provenance = self._widen(stored)
        self.update({**records, **self})
        return bool(cut_off)

    def _widen(self, stored: Provenance) -> Provenance:
        """A file's provenance, but of all that is asked now: the file may be of fewer questions."""
        now = self._provenance_now.fields()
        of_questions = {name: now[name] for name in (*SELECTION, "activations") if name in now}
        return stored.with_fields(**of_questions)


def name_unmasked(provenance: Provenance) -> str:
    """The name of a ranking's journal of round 1."""
    return f"predictions_{provenance.ranking}.jsonl"


def name_masked(provenance: Provenance) -> str:
    """The name of a masked round's journal: what is not the default is in it."""
    assert provenance.ranking is not None and provenance.masked is not None and provenance.k is not None
    names = []
    if provenance.ranking != "baseline":
        names.append(provenance.ranking)
    names.append("keep" if provenance.keep_only else ROUND_NAMES[provenance.masked])
    if provenance.ablation != "zero":
        names.append(provenance.ablation)
    if provenance.k != "50%":
        names.append(f"k{provenance.k.replace('%', 'pct')}")
    if provenance.control is not None:
        names.append(provenance.control)
    if provenance.draw is not None:
        names.append(f"draw{provenance.draw}")
    return f"predictions_{'_'.join(names)}.jsonl"


def read_provenance(path: Path) -> Provenance | None:
    """What made a journal; None where there is none that can be read."""
    try:
        with open(path, "rb") as file:
            return parse_stored(JournalHead, json.loads(file.readline())).provenance
    except (OSError, ValueError, RecursionError):
        return None


def _to_line(value: object) -> bytes:
    return (to_json(value) + "\n").encode()
