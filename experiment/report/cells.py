"""The table as people read it: on the terminal, as CSV and LaTeX, on the page. Knows nothing of models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiment.records.entries import LatentStatistics, SharedPercent
from experiment.report.tables import BOUNDS

if TYPE_CHECKING:
    from pandas import DataFrame, Series

SCORE_COLUMNS = {"EM": "em", "EM drop": "em_drop", "F1": "f1", "F1 drop": "f1_drop"}
OTHER_COLUMNS = {"named": "named", "named drop": "named_drop"}
OTHER_COLUMNS |= {"answer": "answer_log_prob_drop", "format": "format_log_prob_drop"}
PERCENT = "{:z6.2f} [{:z.1f}, {:z.1f}]"  # z: no -0.00
NATS = "{:z6.3f} [{:z.3f}, {:z.3f}]"
MISSED_SHARE = 0.1  # of the questions: from there on a matched mask is marked
MISSED = "*"  # marks what a matched mask removes where it is not matched to the baseline's
NOTES = {
    "n": "[ ]: 95% interval over resampled contexts. drop: unmasked minus masked. Both in percent.",
    "set": "set: which of the sets of kept questions, by the beginning of its hash.",
    "named": "named: a right answer stands somewhere in the text, in percent.",
    "answer": "answer, format: drop in log probability (nats per token) of the unmasked text in, around its [[ ]].",
    "removed": "removed: what the mask takes away, in percent of each position's norm, special tokens left out.",
    MISSED: f"{MISSED}: for over a tenth of the questions this is more than half above or below the baseline's.",
    "mean K": "mean K: latents masked per question.",
    "fewer": "fewer: questions for which the file of activations holds fewer latents than K asks for.",
    "left out": "left out: questions that do not fit the model's context, and are in no figure.",
    "paper": "paper: EM / F1 in GradSAE, arXiv 2505.08080.",
}


def to_csv(table: DataFrame) -> str:
    """All columns of `build_table`'s table, in full precision."""
    return table.to_csv(index=False, lineterminator="\n")


def to_latex(table: DataFrame) -> str:
    """`build_table`'s table as a booktabs tabular: all intervals, and the paper's figures beside ours."""
    cells, notes = write_cells(table)
    texts = cells.columns.get_loc("n")
    aligned = "l" * texts + "r" * (len(cells.columns) - texts)
    tabular = cells.to_latex(index=False, escape=True, column_format=aligned)
    tabular = re.sub(r"(?<=[ \[])-(?=\d)", "$-$", tabular)  # a minus, not a hyphen
    comments = ["Needs \\usepackage{booktabs}.", *notes]
    return "".join(f"% {comment}\n" for comment in comments) + tabular


def to_text(table: DataFrame) -> str:
    """`build_table`'s table for 100 columns, in two halves: EM and F1 with their intervals, then the rest."""
    cells, notes = write_cells(table)
    names = list(cells)
    row = names[: names.index("n")]
    first_half = list(row)
    second_half = list(row)
    for name in names[len(row) :]:
        if name == "n" or name in SCORE_COLUMNS:
            first_half.append(name)
        elif not name.endswith(" drop"):
            second_half.append(name)
    parts = [_align(cells[first_half]), _align(cells[second_half]), "\n".join(notes)]
    return re.sub(" +$", "", "\n\n".join(parts), flags=re.MULTILINE)


def _align(cells: DataFrame) -> str:
    """Columns below their heads, of EM and F1 alone with intervals; a drop stands beside what it is a drop of."""
    aligned = {}
    heads = []
    for name, column in cells.items():
        if name not in ("EM", "F1"):
            column = column.replace(r" \[.*", "", regex=True)
        aligned[name] = column.str.ljust(column.str.len().max())
        heads.append("drop" if name.endswith(" drop") else name)
    return type(cells)(aligned).to_string(index=False, header=heads, justify="left")


def write_cells(table: DataFrame) -> tuple[DataFrame, list[str]]:
    """The table as a reader sees it: texts without the columns that are empty, and notes on those that are there."""
    import pandas

    cells = write_settings(table) | _write_row_names(table)
    cells["n"] = _write("{:5}", table.n)
    for name, column in (SCORE_COLUMNS | OTHER_COLUMNS).items():
        form = NATS if "log_prob" in column else PERCENT
        values = [table[f"{column}{bound}"] for bound in BOUNDS]
        cells[name] = _write(form, *values)
    cells["removed"] = _write_removed(table)
    cells["mean K"] = _write("{:6.1f}", table.mean_k)
    cells["fewer"] = _write_count("{:5}", table.fewer_than_k)
    cells["left out"] = _write_count("{:8}", table.left_out)
    cells["paper"] = _write("{:6.2f} / {:6.2f}", table.paper_em, table.paper_f1)
    filled = {}
    for name, texts in cells.items():
        if any(map(str.strip, texts)):
            filled[name] = list(texts)
    return pandas.DataFrame(filled), _choose_notes(filled)


def _choose_notes(cells: dict[str, list[str]]) -> list[str]:
    """The notes on the columns that are there, and on a mark."""
    notes = []
    for name, note in NOTES.items():
        is_marked = name == MISSED and MISSED in "".join(cells.get("removed", []))
        if name in cells or is_marked:
            notes.append(note)
    return notes


def _write_row_names(table: DataFrame) -> dict[str, Sequence[str]]:
    """What a row is of: the ranking or which questions, the mask, K and, where there are several, the set."""
    is_masked = table.masked != "none"
    names = {
        "ranking": table.ranking.where(is_masked, table.questions),
        "masked": table.masked.where(is_masked | (table.error_term == "drop"), "none " + table.error_term),
        "K": table.k.str.rjust(4),
    }
    kept = table[table.questions == "kept"]
    settings = [*_list_settings(table), "error_term"]
    if kept.population.nunique() > len(kept[settings].drop_duplicates()):
        names["set"] = table.population.str[:6]
    return names


def _list_settings(table: DataFrame) -> list[str]:
    """The columns of settings that differ, which come first."""
    return list(table.columns[: table.columns.get_loc("ranking")])


def write_settings(table: DataFrame) -> dict[str, list[str]]:
    """{setting: a text for each row} of the settings that differ, but for those that say no more than earlier ones."""
    told = {}
    rows: list[tuple[str, ...]] = [()] * len(table)  # what was told of each
    for name in _list_settings(table):
        longer = [(*row, text) for row, text in zip(rows, table[name])]
        if len(set(longer)) > len(set(rows)):
            told[name] = _shorten_names(list(table[name]))
            rows = longer
    return told


def _shorten_names(names: list[str]) -> list[str]:
    """Of paths that differ in some of their parts (layer_9/width_131k, layer_20/width_131k), these parts; of digests
    the beginning."""
    if all(re.fullmatch("[0-9a-f]{64}|", name) for name in names):
        return [name[:8] for name in names]
    paths = [name.split("/") for name in names]
    if len(set(map(len, paths))) > 1:
        return names
    differing = []
    for parts in zip(*paths):
        if len(set(parts)) > 1:
            differing.append(parts)
    if not differing:
        return names
    return ["/".join(parts) for parts in zip(*differing)]


def _write(form: str, *columns: Series) -> list[str]:
    """Columns as one of texts, empty where there is no number; a mean without its interval where there is none."""
    import pandas

    texts = []
    for numbers in zip(*columns):
        missing = [pandas.isna(number) for number in numbers]
        if missing[0]:
            texts.append("")
        elif any(missing):
            texts.append(form.partition(" [")[0].format(numbers[0]))
        else:
            texts.append(form.format(*numbers))
    return texts


def _write_count(form: str, column: Series) -> list[str]:
    """A column of counts as texts, empty where there is nothing to count."""
    import pandas

    return _write(form, column.replace(0, pandas.NA))


def _write_removed(table: DataFrame) -> list[str]:
    """What masks remove, in percent, and a mark where that is not what a matched mask was to remove."""
    texts = _write("{:7.1f}", table.removed)
    is_marked = table.missed_target.fillna(0) > MISSED_SHARE * table.n
    if not is_marked.any():
        return texts
    marked = []
    for text, misses in zip(texts, is_marked):
        mark = MISSED if misses else " "
        marked.append(text + mark if text else "")
    return marked


def tell_statistics(statistics: LatentStatistics, ranking: str) -> str:
    """A ranking's `estimates.latent_statistics`, and what others share with it, as sentences."""
    if not statistics.n:
        return "No question was kept: there are no latents to describe."
    k = f"K at 50% is {statistics.k_at_half:.2f}"
    lines = [f"{statistics.active:.2f} latents are active at the last position on average; {k}."]
    if statistics.same_context_percent.topk is not None:
        lines.append(f"Two questions on one context {_tell_shared(statistics.same_context_percent)}")
    for other, overlap in statistics.overlap.items():
        if overlap.n:
            lines.append(f"{ranking} and {other} {_tell_shared(overlap)}")
    lines.append("In most questions' TopK:")
    for latent in statistics.most_frequent_topk:
        share = f"  latent {latent.latent} in {100 * latent.questions / statistics.n:.1f}%"
        lines.append(f"{share}  {latent.neuronpedia}" if latent.neuronpedia else share)
    return "\n".join(lines)


def _tell_shared(shared: SharedPercent) -> str:
    return f"share {shared.topk:.2f}% of their TopK and {shared.bottomk:.2f}% of their BottomK."
