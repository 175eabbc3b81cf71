"""Figures as texts, for terminal, LaTeX and page: cells of a table, what stands above it, and what its signs mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from experiment.records.entries import Figures
from experiment.report import metrics
from experiment.report.blocks import Line, Setting
from experiment.report.metrics import Cell, Metric
from experiment.report.sentences import MANY

DIGITS = {metrics.POINTS: 1, metrics.PERCENT: 1, metrics.COUNT: 1, metrics.NATS: 3, metrics.SHARE: 2}
LONGEST_NAME = 24  # of a ranking
PAPERS_EM = "the paper's EM"
PAPER = "The paper: GradSAE, arXiv 2505.08080, EM in percent of its kept questions."
UNITS = "Drops: points of EM and named, nats per token of answer and format."
INTERVALS = "[ ]: 95% interval over contexts."
NEIGHBOURS = "other masks the latents of another question on the same context: questions without one are left out."
MARKS = {
    metrics.MISSED: "not matched: over half more or less removed than by baseline, for over a tenth of the questions.",
    metrics.CROWD: f"matched takes more than {MANY} times as many latents as K says.",
    metrics.FEWER: "for some questions the list is shorter than K.",
}


def write_cell(cell: Cell | None, digits: int) -> str:
    """A mean, its interval where it has one, and its mark; an empty text for no cell."""
    if cell is None:
        return ""
    text = write_number(cell.value, digits)
    if cell.low is not None and cell.high is not None:
        low = write_number(cell.low, digits)
        high = write_number(cell.high, digits)
        text += f" [{low}, {high}]"
    return text + cell.mark


def write_number(value: float, digits: int) -> str:
    return f"{value:z.{digits}f}"  # z: no -0.0


def write_row(metric: Metric, line: Line, ks: Iterable[str], digits: int) -> list[str]:
    """A line's figures for each K, empty where it has none."""
    texts = []
    for k in ks:
        entry = line.by_k.get(k)
        cell = metric.read(entry) if entry else None
        texts.append(write_cell(cell, digits))
    return texts


def write_published(published: dict[str, float], ks: Iterable[str]) -> list[str]:
    """The paper's figures for each K, empty where it has none."""
    texts = []
    for k in ks:
        text = f"{published[k]:.2f}" if k in published else ""
        texts.append(text)
    return texts


def find_digits(metric: Metric) -> int:
    """How many digits stand behind the point."""
    return DIGITS[metric.unit]


def shorten(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."


# ---------------------------------------------------------------------------------------------------------------------
# Above and below a table


def write_levels(setting: Setting) -> list[str]:
    """What a table is of, how many questions, and their unmasked scores; what masking nothing changes."""
    lines = [f"{setting.title}; {tell_questions(setting)}."]
    if setting.is_of_neighbours:
        lines.append(NEIGHBOURS)
    levels = []
    if setting.clean is not None:
        levels.append(f"Unmasked EM / F1 / named, %: {write_scores(setting.clean)}")
    if setting.unmasked:
        levels[-1] += f" (all asked {write_scores(setting.unmasked[0].all)})"
    nothing = setting.nothing
    if nothing is not None and nothing.drop is not None and nothing.drop.em is not None:
        levels.append(f"K = 0: EM drop {write_number(nothing.drop.em, 1)}")
    if levels:
        lines.append(f"{'. '.join(levels)}.")
    return lines


def tell_questions(setting: Setting) -> str:
    """How many questions were kept, of how many asked, and how many were too long for the model."""
    first = setting.unmasked[0] if setting.unmasked else None
    if first is not None and first.asked is not None:
        text = f"{first.kept} questions kept of {first.asked} asked"
    else:
        figures = setting.clean or setting.entries[0]
        text = f"{figures.n} questions"
    left_out: set[str] = set()
    for entry in [*setting.unmasked, *setting.entries]:
        left_out.update(entry.left_out)
    return f"{text}, {len(left_out)} left out as too long" if left_out else text


def write_scores(figures: Figures) -> str:
    """EM, F1 and named."""
    texts = []
    for metric in ("em", "f1", "named"):
        value = figures.mean_of(metric)
        texts.append("-" if value is None else write_number(value, 1))
    return "/".join(texts)


def list_notes(cells: Sequence[str]) -> list[str]:
    """What signs in the cells mean, as far as they are there."""
    notes = []
    if any("[" in text for text in cells):
        notes.append(INTERVALS)
    return notes + list_marks(cells)


def list_marks(cells: Sequence[str]) -> list[str]:
    """What the marks in the cells mean, as far as they are there."""
    notes = []
    for mark, note in MARKS.items():
        if any(text.endswith(mark) for text in cells):
            notes.append(f"{mark}: {note}")
    return notes
