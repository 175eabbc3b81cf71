"""The files that are made of results.json. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiment.records import files
from experiment.records.entries import Entry
from experiment.report import figure, latex, page, tables
from experiment.report.folders import Folder


def write_report(path: Path, folders: Sequence[Folder], entries: Sequence[Entry], shown: Sequence[Entry]) -> None:
    """Writes results.csv, .tex, where something was masked .png and .pdf, and of a single folder .html to `path`.

    entries: of all folders, for results.csv.  shown: those of them that are in tables and figure.
    """
    contents = figure.draw(shown)
    contents["csv"] = tables.to_csv(entries).encode()
    contents["tex"] = latex.to_latex(shown).encode()
    for ending, content in contents.items():
        with files.write_whole(path / f"results.{ending}", "wb") as file:
            file.write(content)
    if len(folders) == 1:
        with files.write_whole(path / "results.html") as file:
            page.write_page(file, folders[0], shown)
