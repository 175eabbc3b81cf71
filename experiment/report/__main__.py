"""The files of a folder again, from what lies there, or the results of several folders side by side.

python -m experiment.report runs/demo                              # its files again
python -m experiment.report runs/A runs/B --output-dir runs/both   # layers, widths or models side by side
python -m experiment.report runs/demo --rankings baseline matched --k 10 50%
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import NoReturn

from experiment import UserError, guard, options
from experiment.records import files
from experiment.report import blocks, folders, outputs, terminal


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser("python -m experiment.report", description=__doc__, formatter_class=raw)
    parser.add_argument("folders", nargs="+", type=options.to_folder, metavar="FOLDER", help="that rounds have written")
    parser.add_argument(
        "--output-dir", type=options.to_folder, help="for the files (default: the one folder, or runs/together)"
    )
    parser.add_argument("--rankings", nargs="+", default=[], help="for tables and figure (default: all)")
    parser.add_argument("--k", nargs="+", default=[], help="likewise; results.json and results.csv hold all")
    chosen = parser.parse_args()
    paths = list(dict.fromkeys(chosen.folders))
    if chosen.output_dir:
        path = chosen.output_dir
    else:
        path = paths[0] if len(paths) == 1 else Path("runs", "together")
    # Before anything is read: a round that ends meanwhile would be lost. Where there is no folder yet, none is running.
    with files.lock(path) if path.is_dir() else contextlib.nullcontext():
        given = [folders.read_folder(given_path) for given_path in paths]
        entries = folders.join_entries(given) if len(given) > 1 else given[0].entries
        shown = blocks.choose(entries, chosen.rankings, chosen.k)
        files.write_results(path / "results.json", entries)
        outputs.write_report(path, given, entries, shown)
    print(f"{terminal.to_text(shown)}\n")
    if len(given) > 1:
        for folder in given:
            print(f"Its questions: {folder.path / 'results.html'}")
    print(f"All files: {path}")


if __name__ == "__main__":
    sys.exit(guard(main))
