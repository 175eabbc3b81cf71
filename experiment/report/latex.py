"""The comparison for a paper: a table per metric, rankings down and K across, as wide as an article's text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from experiment.records.entries import Entry, Estimate, UnmaskedEntry
from experiment.report import blocks, cells, metrics
from experiment.report.blocks import Setting
from experiment.report.metrics import Cell, Metric

WIDTH = 345  # points: \textwidth of the article class in one column
GAP = 3  # points: \tabcolsep
# How wide a character of Computer Modern is, in points, on the safe side: in \scriptsize, where digits are 3.98, and in
# \tiny, where digits are 3.40, and brackets, points and commas 1.9.
SMALL = 4.0
TINY = 3.1
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SPECIAL |= {"<": r"$<$", ">": r"$>$", "*": r"$^*$"}
SPECIAL |= {character: f"\\{character}" for character in "&%$#_{}"}
NEEDS = f"% Needs \\usepackage{{booktabs}}. Each table fits a text width of {WIDTH} pt, as in the article class.\n"
LOST = "lost: unmasked minus masked, on the same questions"
CAPTIONS = {
    "em": f"Points of EM {LOST}",
    "f1": f"Points of F1 {LOST}",
    "named": f"Points of named (a ground truth stands somewhere in the text) {LOST}",
    "answer_log_prob": "Drop in log probability, nats per token, of the unmasked answer's tokens inside its brackets",
    "format_log_prob": "Drop in log probability, nats per token, of the unmasked answer's tokens around its brackets",
    "removed": "What masks remove, in percent of each position's norm, special tokens left out",
    "mean_k": "Latents masked per question",
    "faithfulness": "Faithfulness: what keeping TopK alone restores of the answer's log probability",
    "completeness": "Completeness: the same with TopK masked",
    "faithfulness_auc": "Area under faithfulness over log K",
    "completeness_auc": "Area under completeness over log K",
}
IN_BRACKETS = "In brackets: 95% intervals over resampled contexts."


@dataclass(frozen=True)
class Rows:
    """names: of the rows.  texts: [row][K].  masks: {number of the first row of a mask: the mask}."""

    names: list[str] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)
    masks: dict[int, str] = field(default_factory=dict)

    def add(self, name: str, texts: list[str]) -> None:
        self.names.append(name)
        self.texts.append(texts)


@dataclass(frozen=True)
class Column:
    """K's label, and a mean and its interval for each row."""

    head: str
    means: list[str]
    intervals: list[str]

    @property
    def points(self) -> float:
        """How wide it is at most."""
        mean = max(map(len, self.means)) * SMALL
        interval = max(map(len, self.intervals)) * TINY
        head = len(f"K == {self.head}%") * SMALL  # the signs are wider than digits
        return max(mean + interval + GAP, head) + 2 * GAP


def to_latex(entries: Sequence[Entry]) -> str:
    """A booktabs table for each metric and Setting, and of what round 1 knows of its rankings."""
    tables = [NEEDS]
    for setting in blocks.split_settings(entries):
        for metric in setting.list_metrics():
            tables.append(write_metric(setting, metric))
    unmasked = [entry for entry in entries if isinstance(entry, UnmaskedEntry)]
    tables += write_statistics(unmasked)
    tables += write_agreement(unmasked)
    return "\n".join(tables)


# ---------------------------------------------------------------------------------------------------------------------
# A metric


def write_metric(setting: Setting, metric: Metric) -> str:
    """One metric of a setting: TopK's rows, then BottomK's; in parts where K do not fit beside each other."""
    rows = collect_rows(setting, metric)
    columns = []
    ks = setting.list_ks(metric, setting.lines)
    for number, head in enumerate(ks.values()):
        columns.append(make_column(head, [texts[number] for texts in rows.texts]))
    parts = [write_part(rows, part) for part in split_columns(rows.names, columns)]
    written: list[str] = []
    for texts in rows.texts:
        written += texts
    return write_float(tell_caption(setting, metric, written), parts)


def collect_rows(setting: Setting, metric: Metric) -> Rows:
    """The figures of each line that has any, and below them the paper's and its control's."""
    rows = Rows()
    ks = setting.list_ks(metric, setting.lines)
    digits = cells.find_digits(metric)
    for mask in setting.masks:
        lines = [line for line in setting.of(mask) if line.has(metric)]
        if lines:
            rows.masks[len(rows.names)] = mask
        paper = blocks.find_papers(setting, lines, metric.name)
        for line in lines:
            is_below = line.control is not None and any(own.name == line.ranking for own in lines)
            name = f"  in a random {line.control}" if is_below else cells.shorten(line.name)
            rows.add(name, cells.write_row(metric, line, ks, digits))
            if line.ranking in paper and line.control is None:
                name = f"  the paper's {metrics.SHORT[metric.name]}"
                rows.add(name, cells.write_published(paper[line.ranking], ks))
    return rows


def make_column(head: str, texts: Sequence[str]) -> Column:
    """texts: a cell for each row. A mark stands behind the mean."""
    means = []
    intervals = []
    for text in texts:
        mean, bracket, interval = text.partition(" [")
        interval, end, mark = interval.partition("]")
        means.append(mean + mark)
        intervals.append(f"[{interval}]" if bracket else "")
    return Column(head, means, intervals)


def split_columns(names: Sequence[str], columns: Sequence[Column]) -> list[list[Column]]:
    """The columns in parts, each of which fits the text's width beside the names."""
    left = max(map(len, names)) * SMALL
    parts: list[list[Column]] = []
    width = left
    for column in columns:
        width += column.points
        if not parts or width > WIDTH:
            parts.append([])
            width = left + column.points
        parts[-1].append(column)
    return parts


def write_part(rows: Rows, columns: Sequence[Column]) -> str:
    """Some of the columns as a tabular."""
    heads = [""]
    for column in columns:
        heads.append(rf"\multicolumn{{2}}{{c}}{{$K$ = {escape(column.head)}}}")
    whole = 1 + 2 * len(columns)
    lines = [join_cells(heads)]
    for number, name in enumerate(rows.names):
        if number in rows.masks:
            lines.append(r"\midrule")
            lines.append(rf"\multicolumn{{{whole}}}{{@{{}}l}}{{{rows.masks[number]} masked}} \\")
        texts = [escape(name).replace("  ", r"\quad ")]
        for column in columns:
            interval = escape(column.intervals[number])
            texts.append(escape(column.means[number]))
            texts.append(f"{{\\tiny {interval}}}" if interval else "")
        lines.append(join_cells(texts))
    return write_tabular("l" + "r@{ }l" * len(columns), lines)


def tell_caption(setting: Setting, metric: Metric, texts: Sequence[str]) -> str:
    """What a table is of. texts: its cells."""
    questions = f"{setting.entries[0].n} questions"
    caption = f"{tell_metric(metric)}; {setting.title}; {questions}."
    clean = None
    if setting.clean is not None and metric.source == "drop":
        clean = setting.clean.mean_of(metric.name)
    if clean is not None:
        caption += f" Unmasked: {clean:.1f}."
    if "[" in "".join(texts):
        caption += f" {IN_BRACKETS}"
    for note in cells.list_marks(texts):
        caption += f" {note}"
    return caption


def tell_metric(metric: Metric) -> str:
    """What its figures are."""
    if metric.source == "level":
        return f"{metric.title} of the masked answers, percent"
    if metric.source == "excess":
        return f"{metric.title}, {metric.unit}: what masking costs more than its control"
    return CAPTIONS.get(metric.name, metric.title)


# ---------------------------------------------------------------------------------------------------------------------
# Rankings


def write_statistics(entries: Sequence[UnmaskedEntry]) -> list[str]:
    """The paper's table 3 for each ranking; nothing where no entry has it."""
    rows = []
    for entry in entries:
        of_ranking = entry.statistics
        if of_ranking is None or not of_ranking.n:
            continue
        same = of_ranking.same_context_percent
        texts = [entry.provenance.ranking or ""]
        for value in (of_ranking.active, of_ranking.k_at_half, same.topk, same.bottomk):
            texts.append("" if value is None else f"{value:.2f}")
        rows.append(texts)
    heads = ["ranking", "active latents", "K at 50%", "TopK shared, %", "BottomK shared, %"]
    caption = "Latents active at the last position; what lists of two questions on one context share, at K = 50%."
    return [write_plain(caption, heads, rows)] if rows else []


def write_agreement(entries: Sequence[UnmaskedEntry]) -> list[str]:
    """Whether each ranking's scores find what matters; nothing where no effects were measured."""
    rows = []
    for entry in entries:
        agreement = entry.agreement
        if agreement is None:
            continue
        texts = [entry.provenance.ranking or ""]
        for estimate in (agreement.spearman, agreement.share, agreement.found):
            texts.append(write_estimate(estimate))
        rows.append(texts)
    heads = ["ranking", "rank correlation", "share of effect in TopK", "found of the K that cost most"]
    caption = "Scores beside what masking each latent alone costs the answer's log probability, at K = 50%. "
    return [write_plain(caption + IN_BRACKETS, heads, rows)] if rows else []


def write_estimate(estimate: Estimate) -> str:
    if estimate.mean is None:
        return ""
    return cells.write_cell(Cell(estimate.mean, estimate.low, estimate.high), 2)


def write_plain(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts."""
    lines = [join_cells([escape(head) for head in heads]), r"\midrule"]
    for row in rows:
        lines.append(join_cells([escape(text) for text in row]))
    return write_float(caption, [write_tabular("l" + "r" * (len(heads) - 1), lines)])


# ---------------------------------------------------------------------------------------------------------------------
# LaTeX


def write_float(caption: str, tabulars: Sequence[str]) -> str:
    """A table with its caption, as wide as the text, in two columns, too; its parts stand below each other."""
    lines = [r"\begin{table*}", r"\centering", rf"\caption{{{escape(caption)}}}\smallskip"]
    lines.append(rf"\scriptsize\setlength{{\tabcolsep}}{{{GAP}pt}}")
    lines.append("\n\\par\\medskip\n".join(tabulars))
    lines.append("\\end{table*}\n")
    return "\n".join(lines)


def write_tabular(aligned: str, lines: Sequence[str]) -> str:
    begin = rf"\begin{{tabular}}{{@{{}}{aligned}@{{}}}}"
    return "\n".join([begin, r"\toprule", *lines, r"\bottomrule", r"\end{tabular}"])


def join_cells(texts: Sequence[str]) -> str:
    return f"{' & '.join(texts)} \\\\"


def escape(text: str) -> str:
    """A text as LaTeX shows it; a minus before a number is one."""
    escaped = "".join(SPECIAL.get(character, character) for character in text)
    return re.sub(r"(?<![\w.])-(?=\d)", "$-$", escaped)
