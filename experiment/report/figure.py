"""The figure: what masking costs against K, a paper's column wide, for the page and for papers."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from experiment.records.entries import Entry
from experiment.report import cells, tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame, Series

PANELS = {"em": "EM (%)", "f1": "F1 (%)", "answer_log_prob_drop": "answer's log prob.,\ndrop (nats per token)"}
MARKERS = "os^Dv*"  # of the figure: a marker for each line
# Keys are Any: Matplotlib's own type spells out all its settings.
STYLE: dict[Any, Any] = {
    "font.size": 7,
    "legend.frameon": False,
    "lines.linewidth": 1,
    "lines.markersize": 4,
    "errorbar.capsize": 2,
}
# TrueType, for publishers refuse Matplotlib's Type 3 fonts; a salt in place of the random ids of an SVG.
STYLE |= {"pdf.fonttype": 42, "svg.hashsalt": "results"}
UNDATED = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}  # metadata without the time of drawing
WIDTH = 3.3  # inches: a paper's column
APART = 0.07  # of the distance between two K: one line's intervals would hide another's
LONGEST_IN_TWO_COLUMNS = 22  # characters of a label, for two of them to stand side by side in the legend


def draw(entries: list[Entry]) -> dict[str, bytes]:
    """`make_figure`'s figure as {"png": bytes, "pdf": ..., "svg": ...}: for the same entries the same bytes. Empty
    where nothing was masked."""
    import matplotlib

    table = tables.build_table(entries)
    if (table.masked == "none").all():
        return {}
    files = {}
    with matplotlib.rc_context(STYLE):
        figure = make_figure(table)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # it is laid out: not once more for each format
        for ending, metadata in UNDATED.items():
            file = io.BytesIO()
            figure.savefig(file, format=ending, dpi=300, metadata=metadata, transparent=ending == "svg")
            files[ending] = file.getvalue()
    return files


def make_figure(table: DataFrame) -> Figure:
    """EM and F1 against K with their intervals, and the drop in the answer's log probability where there is one.

    As wide as a paper's column, of at most six lines, the paper's settings and TopK first; dotted: the unmasked level,
    and that of K = 0. table: of masked rounds at least one.
    """
    from matplotlib.figure import Figure

    masked = table[table.masked != "none"]
    masked = masked.assign(line=_name_lines(masked))
    lines = sorted(masked.line.unique(), key=_order_line)
    drawn = lines[: len(MARKERS)]
    shown = masked[masked.line.isin(drawn)]
    is_level = (table.masked == "none") & (table.questions == "kept")
    levels = table[is_level & table.population.isin(shown.population)]
    places = _place_ks(shown)
    metrics = [metric for metric in PANELS if shown[metric].notna().any()]
    figure = Figure(figsize=(WIDTH, 1 + 1.5 * len(metrics)), layout="constrained")
    panels = figure.subplots(len(metrics), 1, sharex=True)
    panels[1].sharey(panels[0])
    for panel, metric in zip(panels, metrics):
        for number, line in enumerate(drawn):
            rows = shown[shown.line == line]
            from_the_middle = number - (len(drawn) - 1) / 2
            _draw_line(panel, rows, metric, places + APART * from_the_middle, number)
        _draw_levels(panel, levels[metric])
        panel.set_ylabel(PANELS[metric])
    _label_ks(panels[-1], places)
    _draw_legend(figure, panels[0], len(lines) - len(drawn))
    return figure


def _name_lines(masked: DataFrame) -> list[str]:
    """For each row, the name of the line that it is a point of: ranking, mask and the settings that differ."""
    columns = [masked.ranking, masked.masked, *cells.write_settings(masked).values()]
    return [" ".join(texts) for texts in zip(*columns)]


def _order_line(line: str) -> tuple[int, bool]:
    return line.count(" "), "BottomK" in line


def _place_ks(shown: DataFrame) -> Series:
    """{K: its place on the axis}. K that mask the same latents in every line share a place, as 10 and 50% do where the
    lists end before 10."""
    order = shown.groupby("k", sort=False).mean_k.min().sort_values(kind="stable").index
    of_k = shown.pivot_table(index="k", columns="line", values=["mean_k", "em", "f1"]).loc[order]
    return of_k.groupby(list(of_k), dropna=False, sort=False).ngroup()


def _draw_line(panel: Axes, rows: DataFrame, metric: str, places: Series, number: int) -> None:
    """A line with its intervals, a marker of its own, TopK solid, BottomK dashed and hollow: no need of colour."""
    rows = rows.assign(x=rows.k.map(places)).drop_duplicates("x").dropna(subset=metric)
    label = rows.line.iloc[0]
    is_solid = "TopK" in label
    grey = str(0.12 * number)
    means = rows[metric]
    panel.errorbar(
        rows.x,
        means,
        [means - rows[f"{metric}_low"], rows[f"{metric}_high"] - means],
        color=grey,
        marker=MARKERS[number],
        markerfacecolor=grey if is_solid else "white",
        label=label,
        linestyle="-" if is_solid else "--",
    )


def _draw_levels(panel: Axes, levels: Series) -> None:
    """The unmasked levels, of each folder one, dotted."""
    for number, level in enumerate(levels.dropna().unique()):
        label = "" if number else "unmasked"
        panel.axhline(level, color="0", linestyle=":", linewidth=0.9, label=label)


def _label_ks(panel: Axes, places: Series) -> None:
    count = places.max() + 1
    labels = [" = ".join(places.index[places == place]) for place in range(count)]
    panel.set_xticks(range(count), labels)
    panel.set_xlim(-0.5, count - 0.5)
    panel.set_xlabel("K, latents masked per question")


def _draw_legend(figure: Figure, panel: Axes, left_out: int) -> None:
    """Below the panels. left_out: how many lines are not drawn."""
    handles, labels = panel.get_legend_handles_labels()
    longest = max(map(len, labels))
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        title=f"{left_out} more lines: see results.csv" if left_out else None,
        ncols=2 if longest <= LONGEST_IN_TWO_COLUMNS else 1,
    )
