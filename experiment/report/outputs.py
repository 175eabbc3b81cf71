"""The files that are made of results.json. Knows nothing of models."""

from pathlib import Path
from typing import Any

from experiment.records import files
from experiment.report import figure, page, tables
from experiment.report.folders import Folder


def write(path: Path, folders: list[Folder], entries: list[dict[str, Any]]) -> None:
    """Writes results.csv, .tex, .html and, where something was masked, .png and .pdf to the folder `path`.

    folders: those that the page shows.  entries: of all of them.
    """
    table = tables.frame(entries)
    drawn = figure.draw(entries)
    svg = drawn.pop("svg", b"").decode()
    contents = drawn | {"csv": tables.to_csv(table).encode(), "tex": tables.to_latex(table).encode()}
    for ending, content in contents.items():
        with files.write_whole(path / f"results.{ending}", "wb") as file:
            file.write(content)
    with files.write_whole(path / "results.html") as file:
        page.write(file, folders, entries, svg)
