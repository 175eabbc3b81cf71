"""The comparison on a terminal, 100 columns wide: a block per metric, rankings down, K across."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from experiment.masks import DRAWN
from experiment.records.entries import Entry, MaskedEntry
from experiment.report import blocks, cells, metrics, sentences
from experiment.report.blocks import Line, Setting
from experiment.report.metrics import Metric

WIDTH = 100
HEIGHT = 40  # lines up to which blocks stand apart
FEWEST_DIGITS = 2  # of nats per token, where three do not fit
Block = list[str]
"""Lines of text."""


@dataclass(frozen=True)
class SmallBlock:
    """Means without intervals, of which several stand beside each other."""

    title: str
    metric: Metric
    lines: list[Line]


def to_text(entries: Sequence[Entry]) -> str:
    """For each setting what was found, the unmasked levels, and its blocks.

    Of the first mask EM and the answer's log probability with their intervals, and how much more EM it costs than its
    control; without intervals what it removes, named and format, and EM under the other masks. These blocks stand
    apart where the whole stays within `HEIGHT` lines for it.
    """
    text = write_all(entries, gap=[""])
    if text.count("\n") < HEIGHT:
        return text
    return write_all(entries, gap=[])


def write_all(entries: Sequence[Entry], gap: Block) -> str:
    """`to_text`. gap: between the blocks of the first mask."""
    parts = []
    for setting in blocks.split_settings(entries):
        head: Block = []
        for line in [sentences.tell_finding(setting.told), *cells.write_levels(setting)]:
            head += textwrap.wrap(line, WIDTH)
        parts.append(head)
        parts += write_blocks(setting, gap)
    texts = ["\n".join(part) for part in parts]
    lines = "\n\n".join(texts).splitlines()
    notes = " ".join(list_notes(lines))
    return "\n".join([*lines, *textwrap.wrap(notes, WIDTH)])


def list_notes(lines: Sequence[str]) -> list[str]:
    """What signs in the lines mean."""
    words: list[str] = []
    for line in lines:
        words += line.split()
    notes = cells.list_notes(words)
    if notes:
        notes.insert(0, cells.UNITS)
    if any(cells.PAPERS_EM in line for line in lines):
        notes.append(cells.PAPER)
    return notes


def write_blocks(setting: Setting, gap: Block) -> list[Block]:
    """The blocks of a setting: those with intervals, then the small ones. gap: between those of the first mask."""
    written: list[Block] = []
    small: list[SmallBlock] = []
    for number, mask in enumerate(setting.masks):
        lines = [line for line in setting.of(mask) if line.control is None]
        if number == 0 and not setting.keep_only:
            written.append(write_main(setting, mask, lines, gap))
            small += list_small(lines)
        else:
            small.append(SmallBlock(f"{mask}: EM", metrics.EM, lines))
    for metric in metrics.RESTORED:
        written += write_block(setting, metric, setting.lines, metric.title)
    return written + write_side_by_side(setting, small)


def write_main(setting: Setting, mask: str, lines: Sequence[Line], gap: Block) -> Block:
    """EM, how much more than its control a mask costs, and the answer's log probability, below each other."""
    metric = metrics.EM
    title = f"{mask}: EM drop"
    if not setting.has(metric):
        metric = metrics.EM_LEVEL
        title = f"{mask}: EM, %"
    paper = blocks.find_papers(setting, lines)
    parts = write_block(setting, metric, lines, title, paper)
    for control in setting.controls:
        if control == "matched" and control != setting.controls[0]:
            continue  # the baseline's second control
        beyond = metrics.make_excess(control, "em")
        ranked = [line for line in lines if line.ranking not in DRAWN]
        parts += write_block(setting, beyond, ranked, f"EM beyond {control}")
    parts += write_block(setting, metrics.ANSWER, lines, f"{mask}: answer")
    together: Block = []
    for part in parts:
        together += gap if together else []
        together += part
    return together


def list_small(lines: list[Line]) -> list[SmallBlock]:
    """What is shown of the first mask without intervals."""
    return [
        SmallBlock("removed, %", metrics.REMOVED, lines),
        SmallBlock("named", metrics.NAMED, lines),
        SmallBlock("format", metrics.FORMAT, lines),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# A block with intervals


def write_block(
    setting: Setting,
    metric: Metric,
    lines: Sequence[Line],
    title: str,
    paper: dict[str, dict[str, float]] | None = None,
) -> list[Block]:
    """A block, in parts where its K do not fit beside each other; none where there is no figure.

    paper: {ranking: {K: EM}}, written below the ranking's own.
    """
    shown = [line for line in lines if line.has(metric)]
    if not shown:
        return []
    ks = setting.list_ks(metric, shown)
    digits = cells.find_digits(metric)
    parts = write_with_digits(metric, shown, ks, title, paper or {}, digits)
    if len(parts) > 1 and digits > FEWEST_DIGITS:
        parts = write_with_digits(metric, shown, ks, title, paper or {}, FEWEST_DIGITS)
    return parts


def write_with_digits(
    metric: Metric,
    lines: Sequence[Line],
    ks: dict[str, str],
    title: str,
    paper: dict[str, dict[str, float]],
    digits: int,
) -> list[Block]:
    names = []
    rows = []
    for line in lines:
        names.append(cells.shorten(line.ranking))
        rows.append(cells.write_row(metric, line, ks, digits))
        if line.ranking in paper:
            names.append(f"  {cells.PAPERS_EM}")
            rows.append(cells.write_published(paper[line.ranking], ks))
    columns = []
    for label, texts in zip(ks.values(), zip(*rows)):
        columns.append(pad([f"K = {label}", *align_intervals(texts)]))
    return lay_out(pad([title, *names]), columns)


def align_intervals(texts: Sequence[str]) -> list[str]:
    """Means flush right, their intervals beside them flush left."""
    pairs = [text.partition(" ") for text in texts]
    width = max(len(mean) for mean, _, _ in pairs)
    aligned = []
    for mean, space, interval in pairs:
        aligned.append(f"{mean.rjust(width)}{space}{interval}")
    return aligned


# ---------------------------------------------------------------------------------------------------------------------
# Small blocks


def write_side_by_side(setting: Setting, small: Sequence[SmallBlock]) -> list[Block]:
    """The small blocks, as many beside each other as fit."""
    rankings: dict[str, None] = {}
    for block in small:
        rankings.update(dict.fromkeys(line.ranking for line in block.lines))
    columns = []
    for block in small:
        ks = setting.list_ks(block.metric, block.lines)
        if ks:
            columns.append(write_small(block, list(rankings), ks))
    names = [cells.shorten(ranking) for ranking in rankings]
    return lay_out(pad(["", "", *names]), columns)


def write_small(block: SmallBlock, rankings: Sequence[str], ks: Iterable[str]) -> Block:
    """A title, K, and a row of means for each ranking, empty where it has none."""
    by_ranking = {line.ranking: line for line in block.lines}
    columns = []
    for k in ks:
        texts = [k]
        for ranking in rankings:
            line = by_ranking.get(ranking)
            entry = line.by_k.get(k) if line else None
            texts.append(write_mean(block.metric, entry))
        width = max(map(len, texts))
        columns.append([text.rjust(width) for text in texts])
    rows = [" ".join(texts) for texts in zip(*columns)]
    return pad([block.title, *rows])


def write_mean(metric: Metric, entry: MaskedEntry | None) -> str:
    """A mean and its mark."""
    cell = metric.read(entry) if entry else None
    if cell is None:
        return ""
    digits = min(FEWEST_DIGITS, cells.find_digits(metric))
    return cells.write_number(cell.value, digits) + cell.mark


# ---------------------------------------------------------------------------------------------------------------------
# Columns beside each other


def lay_out(names: Block, columns: Sequence[Block]) -> list[Block]:
    """The columns beside the names; where they do not fit into 100 columns of text, in parts below each other."""
    parts: list[Block] = []
    rows = names
    for column in columns:
        longer = join_lines(rows, column)
        if len(longer[0]) > WIDTH and rows is not names:
            parts.append(rows)
            longer = join_lines(names, column)
        rows = longer
    if columns:
        parts.append(rows)
    return [[row.rstrip() for row in part] for part in parts]


def join_lines(left: Block, right: Block) -> Block:
    return [f"{one}  {other}" for one, other in zip(left, right)]


def pad(texts: Sequence[str]) -> Block:
    """The texts as wide as the widest."""
    width = max(map(len, texts))
    return [text.ljust(width) for text in texts]
