"""Activations and results on disk, with the run that made them: written whole, read strictly. Knows nothing of models.

A file that is damaged, or of another run, is a UserError that names it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import filelock

from experiment import UserError, os_errors, parse_json
from experiment.records.entries import Entry, parse_entry
from experiment.records.provenance import SETTINGS, differences, refuse_other_run
from experiment.records.schema import (
    FieldMissing,
    Means,
    Provenance,
    PublishedQuestion,
    RankedLatents,
    RankedQuestion,
    parse_stored,
    tell_version,
    to_json,
)

Ranked = TypeVar("Ranked", bound=RankedLatents)


class Activations(NamedTuple):
    """What made a file of activations, and its ranked questions."""

    provenance: Provenance
    ranked: list[RankedQuestion]


class PublishedActivations(NamedTuple):
    """The same of the authors' published file, which does not say what made it."""

    provenance: None
    ranked: list[PublishedQuestion]


def lock(folder: Path) -> contextlib.AbstractContextManager:
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
def write_whole(path: Path, mode: str = "w") -> Iterator[IO]:
    """A file that appears at `path` whole when the block ends, or not at all: written beside, synced, moved."""
    beside = path.with_name(path.name + ".part")
    is_binary = "b" in mode
    encoding = None if is_binary else "utf-8"
    newline = None if is_binary else "\n"
    try:
        with os_errors(f"{path}: cannot be written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(beside, mode, encoding=encoding, newline=newline) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def load_json(path: Path) -> Any:
    """The value in a JSON file."""
    with os_errors(f"{path}: cannot be read"):
        return parse_json(path.read_bytes(), path)


def write_activations(path: Path, provenance: Provenance, ranked: Iterable[RankedLatents]) -> None:
    """One JSON object, a line for each question, so that it can be read by people and diffed."""
    with write_whole(path) as file:
        file.write('{"run": ' + to_json(provenance) + ',\n"samples": [\n')
        file.write(",\n".join(map(to_json, ranked)) + "\n]}\n")


def read_activations(path: Path) -> Activations | PublishedActivations:
    """A file of activations, in the form that round 1 writes or in the authors'."""
    content = load_json(path)
    if isinstance(content, list):
        renamed = _rename_published(path, content)
        return PublishedActivations(None, _parse_ranked(path, PublishedQuestion, renamed))
    if not isinstance(content, dict) or not isinstance(content.get("run"), dict):
        raise UserError(f"{path}: names no run: it is not round 1's file")
    try:
        stored = parse_stored(Provenance, content["run"])
    except ValueError as error:
        raise UserError(f"{path}: its run is damaged ({error})") from None
    ranked = _parse_ranked(path, RankedQuestion, content.get("samples"))
    ids = set()
    for number, question in enumerate(ranked, 1):
        if question.id in ids:
            raise UserError(f"{path}, sample {number}: the id {question.id!r} stands twice")
        ids.add(question.id)
    return Activations(stored, ranked)


def _parse_ranked(path: Path, kind: type[Ranked], values: object) -> list[Ranked]:
    if not isinstance(values, list) or not values:
        raise UserError(f"{path}: holds no sample: it is not round 1's file, or round 1 kept no question")
    ranked = []
    for number, value in enumerate(values, 1):
        try:
            ranked.append(parse_stored(kind, value))
        except ValueError as error:
            if isinstance(error, FieldMissing) and kind is RankedQuestion:
                problem = tell_version(error, "run round 1 again with --overwrite")
                raise UserError(f"{path}, sample {number}: {problem}") from None
            raise UserError(f"{path}, sample {number}: {error}") from None
    return ranked


def _rename_published(path: Path, content: list[Any]) -> list[dict[str, Any]]:
    """Questions of the authors' form, a list of {prompt: {"original", "have_gradient", "no_gradient"}}, in our words.

    "have_gradient" is what they call the TopK of the mean activation, "no_gradient" its BottomK.
    """
    names = {"original": "active", "have_gradient": "topk", "no_gradient": "bottomk"}
    renamed = []
    try:
        for group in content:
            for prompt, latents in group.items():
                lists = {names[name]: ids for name, ids in latents.items() if name in names}
                renamed.append({"prompt": prompt, **lists})
    except AttributeError:
        raise UserError(f"{path}: is not of the authors' published form {{prompt: latents}}") from None
    return renamed


def name_mean_file(path: Path) -> Path:
    """The file beside a ranking's activations, with the same lists and what mean ablation of them changes."""
    return path.with_name(f"{path.stem}_mean{path.suffix}")


def write_means(path: Path, means: Means) -> None:
    with write_whole(path) as file:
        file.write(to_json(means, ensure_ascii=True))


def read_means(path: Path) -> Means:
    try:
        return parse_stored(Means, load_json(path))
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error}): move it away") from None


def write_results(path: Path, entries: list[Entry]) -> None:
    with write_whole(path) as file:
        file.write(to_json(entries, indent=1) + "\n")


def read_results(path: Path) -> list[Entry]:
    """The entries of results.json; none where there is no such file."""
    content = load_json(path) if path.exists() else []
    if not isinstance(content, list):
        raise UserError(f"{path}: is not a file of results: move it away")
    entries = []
    for number, value in enumerate(content, 1):
        try:
            entries.append(parse_entry(value))
        except ValueError as error:
            damaged = f"entry {number} is damaged, or of another version ({error})"
            raise UserError(f"{path}: {damaged}: move the file away, or repeat its rounds") from None
    return entries


def read_results_of(path: Path, provenance: Provenance, overwrite: bool) -> list[Entry]:
    """The entries of results.json, of any ranking. Those of another run are refused, or left out if `overwrite`."""
    entries = read_results(path)
    if not overwrite:
        for entry in entries:
            refuse_other_run(path, entry.provenance, provenance, SETTINGS)
    return [entry for entry in entries if not differences(entry.provenance, provenance, SETTINGS)]
