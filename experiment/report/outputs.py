"""The files that are made of results.json. Knows nothing of models."""

from __future__ import annotations

from pathlib import Path

from experiment.records import files
from experiment.records.entries import Entry
from experiment.report import cells, figure, page, tables
from experiment.report.folders import Folder


def write_report(path: Path, folders: list[Folder], entries: list[Entry]) -> None:
    """Writes results.csv, .tex, .html and, where something was masked, .png and .pdf to the folder `path`.

    folders: those that the page shows.  entries: of all of them.
    """
    table = tables.build_table(entries)
    contents = figure.draw(entries)
    svg = contents.pop("svg", b"").decode()
    contents["csv"] = cells.to_csv(table).encode()
    contents["tex"] = cells.to_latex(table).encode()
    for ending, content in contents.items():
        with files.write_whole(path / f"results.{ending}", "wb") as file:
            file.write(content)
    with files.write_whole(path / "results.html") as file:
        page.write_page(file, folders, entries, svg)
