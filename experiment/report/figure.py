"""The figure: what masking costs against what it removes, in a paper's column, and panel by panel for the page.

A line is a ranking over K; what chance does (matched, random, a control direction) is dashed. A ranking has a colour
and a marker of its own, filled for TopK and hollow for BottomK, so that it reads in grey, too.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from experiment.records.entries import Entry
from experiment.report import blocks
from experiment.report.blocks import DROPS, MASKED, REMOVED, Line, Metric, Setting
from experiment.report.estimates import MASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# For colour-blind readers: Okabe & Ito 2008, but for yellow, which is too light on white. What chance does is grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#000000", "#CC79A7", "#56B4E9")
GREYS = ("#666666", "#999999", "#333333", "#BBBBBB")
MARKERS = "osD^vPX"
CHANCE_MARKERS = "<>ph"
Y_LABELS = {"em": "points of EM lost", "answer_log_prob": "answer's log probability:\nnats per token lost"}
X_LABELS = {"removed": "removed, % of the norm", "mean_k": "latents masked per question"}
# Keys are Any: Matplotlib's own type spells out all its settings.
STYLE: dict[Any, Any] = {
    "font.size": 7,
    "legend.frameon": False,
    "lines.linewidth": 1,
    "lines.markersize": 4,
    "errorbar.capsize": 1.5,
}
# TrueType, for publishers refuse Matplotlib's Type 3 fonts. In an SVG texts as texts, and a salt for random ids.
STYLE |= {"pdf.fonttype": 42, "svg.hashsalt": "results", "svg.fonttype": "none"}
UNDATED = {"png": {}, "pdf": {"CreationDate": None}}  # metadata without the time of drawing
WIDTH = 3.3  # inches: a paper's column
WIDE = 6.9  # its text's width, for more than two settings beside each other
PAGE_STYLE = STYLE | {"font.size": 9, "lines.linewidth": 1.4, "lines.markersize": 6}
PAGE_PANEL = (4.4, 3.1)  # inches


@dataclass(frozen=True)
class Look:
    """Of a line."""

    color: str
    marker: str
    is_dashed: bool

    @property
    def style(self) -> Literal["-", "--"]:
        return "--" if self.is_dashed else "-"

    def marked(self, mask: str) -> dict[str, Any]:
        """Its marker: filled for TopK, hollow for BottomK, half for what all but TopK is masked."""
        looks: dict[str, Any] = {"marker": self.marker, "color": self.color, "markerfacecoloralt": "#ffffff"}
        looks["fillstyle"] = "left" if mask == blocks.ALL_BUT else "full"
        looks["markerfacecolor"] = "#ffffff" if mask == MASKS["bottomk"] else self.color
        return looks


def draw(entries: Sequence[Entry]) -> dict[str, bytes]:
    """`make_figure`'s figure as {"png": bytes, "pdf": bytes}: for the same entries the same bytes. Empty where nothing
    was masked."""
    import matplotlib

    settings = list_settings(entries)
    if not settings:
        return {}
    files = {}
    with matplotlib.rc_context(STYLE):
        figure = make_figure(settings)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # it is laid out: not once more for each format
        for ending, metadata in UNDATED.items():
            file = io.BytesIO()
            figure.savefig(file, format=ending, dpi=300, metadata=metadata)
            files[ending] = file.getvalue()
    return files


def draw_panels(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """The figure's panels for the page, each an SVG: (what it shows, SVG). A point's id is its metric and journal."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = list_settings(entries)
    looks = choose_looks(settings)
    panels = []
    with matplotlib.rc_context(PAGE_STYLE):
        for setting in settings:
            for metric in list_metrics([setting]):
                figure = Figure(figsize=PAGE_PANEL, layout="constrained")
                panel = figure.subplots()
                draw_panel(panel, setting, metric, looks)
                panel.set_ylabel(Y_LABELS[metric.name])
                file = io.StringIO()
                figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
                svg = file.getvalue()
                title = f"{metric.title}, {metric.unit}"
                panels.append((f"{title}; {setting.title}", svg[svg.index("<svg") :]))
    return panels


def list_settings(entries: Sequence[Entry]) -> list[Setting]:
    """Those in which something was masked, and what was lost is known."""
    settings = blocks.split_settings(entries)
    return [setting for setting in settings if list_metrics([setting])]


def list_metrics(settings: Sequence[Setting]) -> list[Metric]:
    """EM and the answer's log probability, where there are drops of them."""
    metrics = [metric for metric in DROPS if metric.name in Y_LABELS]
    return [metric for metric in metrics if any(setting.has(metric) for setting in settings)]


def choose_looks(settings: Sequence[Setting]) -> dict[str, Look]:
    """{name of a line: its look}. A control has its ranking's, dashed."""
    lines = [line for setting in settings for line in setting.lines]
    names = list(dict.fromkeys(line.ranking for line in lines))
    ranked = [name for name in names if name not in blocks.CHANCE]
    chance = [name for name in names if name in blocks.CHANCE]
    looks = {}
    for number, name in enumerate(ranked):
        looks[name] = Look(COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)], False)
    for number, name in enumerate(chance):
        looks[name] = Look(GREYS[number], CHANCE_MARKERS[number], True)
    for line in lines:
        of_ranking = looks[line.ranking]
        looks.setdefault(line.name, Look(of_ranking.color, of_ranking.marker, True))
    return looks


def make_figure(settings: Sequence[Setting]) -> Figure:
    """A row of panels per metric, a column per setting, as wide as a paper's column, or as its text where there are
    more than two."""
    from matplotlib.figure import Figure

    metrics = list_metrics(settings)
    width = WIDTH if len(settings) <= 2 else WIDE
    looks = choose_looks(settings)
    handles = make_handles(settings, looks)
    height = 1.6 * len(metrics) + 0.5 + 0.13 * (len(handles) + 1) // 2
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(len(metrics), len(settings), sharey="row", squeeze=False)
    for row, metric in zip(panels, metrics):
        for panel, setting in zip(row, settings):
            draw_panel(panel, setting, metric, looks)
        row[0].set_ylabel(Y_LABELS[metric.name])
    for row in panels[:-1]:
        for panel in row:
            panel.set_xlabel("")
    if len(settings) > 1:
        for panel, setting in zip(panels[0], settings):
            panel.set_title(setting.title.replace(", ", "\n"), fontsize=6)
    ks = dict.fromkeys(label for setting in settings for label in setting.ks.values())
    figure.legend(handles=handles, loc="outside lower center", ncols=2, title=f"along a line: K = {', '.join(ks)}")
    return figure


def draw_panel(panel: Axes, setting: Setting, metric: Metric, looks: dict[str, Look]) -> None:
    """The lines of one metric of a setting, over what masks remove; where an SAE does not let that be known, over how
    many latents they mask."""
    x = REMOVED if setting.has(REMOVED) else MASKED
    panel.axhline(0, color="#000000", linewidth=0.5)
    for line in setting.lines:
        draw_line(panel, line, metric, x, looks[line.name])
    panel.set_xlabel(X_LABELS[x.name])
    panel.spines[["top", "right"]].set_visible(False)


def draw_line(panel: Axes, line: Line, metric: Metric, x: Metric, look: Look) -> None:
    """A line with its intervals, and each of its points by itself, so that the page can point at it."""
    points = []
    for k, entry in line.by_k.items():
        removed = x.read(entry)
        lost = metric.read(entry)
        if removed is not None and lost is not None:
            points.append((removed.value, lost, f"{metric.name}:{entry.journal or k}"))
    if not points:
        return
    points.sort(key=lambda point: point[0])
    places = [place for place, _, _ in points]
    means = [lost.value for _, lost, _ in points]
    below = [max(0.0, lost.value - lost.low) if lost.low is not None else 0.0 for _, lost, _ in points]
    above = [max(0.0, lost.high - lost.value) if lost.high is not None else 0.0 for _, lost, _ in points]
    label = f"{line.name} {line.mask}"
    panel.errorbar(places, means, [below, above], color=look.color, linestyle=look.style, elinewidth=0.7, label=label)
    for place, mean, (_, _, name) in zip(places, means, points):
        panel.plot([place], [mean], linestyle="", gid=name, **look.marked(line.mask))


def make_handles(settings: Sequence[Setting], looks: dict[str, Look]) -> list[Line2D]:
    """The legend's: a line for each ranking and for each control, then a marker for each mask."""
    from matplotlib.lines import Line2D

    handles = []
    for name, look in list_legend(settings, looks).items():
        marker = look.marker or None
        handles.append(Line2D([], [], label=name, linestyle=look.style, color=look.color, marker=marker))
    for mask in dict.fromkeys(mask for setting in settings for mask in setting.masks):
        handles.append(Line2D([], [], label=mask, linestyle="", **Look("#000000", "o", False).marked(mask)))
    return handles


def list_legend(settings: Sequence[Setting], looks: dict[str, Look]) -> dict[str, Look]:
    """{name: look} of the rankings, and of controls, which have their rankings' colours and markers, without any."""
    lines = [line for setting in settings for line in setting.lines]
    shown = {}
    for line in lines:
        shown[line.ranking] = looks[line.ranking]
    for line in lines:
        if line.control is not None:
            shown[f"the same in a random {line.control}"] = Look(GREYS[0], "", True)
    return shown
