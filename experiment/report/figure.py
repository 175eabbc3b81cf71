"""The figure: what masking costs against what it removes, in a paper's column.

A line is a ranking over K; what chance does (matched, random) is dashed, and a ranking's control direction dashed, thin
and without intervals. A ranking has a colour and a marker of its own, filled for TopK and smaller and hollow for
BottomK, so that it reads in grey, too.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from experiment.records.entries import Entry
from experiment.report import blocks
from experiment.report.blocks import Line, Setting
from experiment.report.estimates import MASKS
from experiment.report.metrics import ANSWER, EM, MASKED, REMOVED, Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# For colour-blind readers: Okabe & Ito 2008, but for yellow, which is too light on white. What chance does is grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#000000", "#CC79A7", "#56B4E9")
GREYS = ("#777777", "#999999", "#5F5F5F", "#AAAAAA")
MARKERS = "osD^vPX"
CHANCE_MARKERS = "<>ph"
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
INK = "#000000"
PAPER = "#ffffff"
PANEL_HEIGHT = 1.6  # inches
LEGEND_ROW_HEIGHT = 0.13
MARGIN = 0.4
THIN = 0.6  # of a line's width and of a marker's size: a control's
SMALL = 0.8  # of a marker's size: BottomK's
FAINT = 0.6  # a control's opacity
ABOVE_LINES = 3  # where marks are drawn: a bar's line is at 2.1
TITLE_WIDTH = 62  # characters of the legend's title
WIDTH = 3.3  # inches: a paper's column
WIDE = 6.9  # its text's width, for more than two settings beside each other


@dataclass(frozen=True)
class Point:
    """below, above: how far its interval reaches from its mean.  name: its metric and journal."""

    place: float
    mean: float
    below: float
    above: float
    name: str


@dataclass(frozen=True)
class Look:
    """Of a line."""

    color: str
    marker: str
    is_dashed: bool
    is_control: bool = False

    @property
    def style(self) -> Literal["-", "--"]:
        return "--" if self.is_dashed else "-"

    @property
    def opacity(self) -> float:
        return FAINT if self.is_control else 1.0

    def scale(self, size: float) -> float:
        """A width or a size, smaller for a control."""
        return THIN * size if self.is_control else size

    def marked(self, mask: str, size: float) -> dict[str, Any]:
        """Its marker: filled for TopK, smaller and hollow for BottomK."""
        is_hollow = mask == MASKS["bottomk"]
        return {
            "marker": self.marker,
            "color": self.color,
            "alpha": self.opacity,
            "markersize": self.scale(SMALL * size if is_hollow else size),
            "markeredgewidth": 0.7 if is_hollow else 0,
            "markerfacecolor": PAPER if is_hollow else self.color,
        }


def draw(entries: Sequence[Entry]) -> dict[str, bytes]:
    """`make_figure`'s figure as {"png": bytes, "pdf": bytes}: for the same entries the same bytes. Empty where nothing
    was masked."""
    import matplotlib

    settings = list_settings(entries)
    if not settings:
        return {}
    files = {}
    with matplotlib.rc_context(STYLE):
        figure = make_figure(settings, tell_left_out(entries))
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # it is laid out: not once more for each format
        for ending, metadata in UNDATED.items():
            file = io.BytesIO()
            figure.savefig(file, format=ending, dpi=300, metadata=metadata)
            files[ending] = file.getvalue()
    return files


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn


def list_settings(entries: Sequence[Entry]) -> list[Setting]:
    """Those in which something was masked, and what was lost is known; not masks that leave a list alone.

    Where it is known what a folder's masks remove, without those of which it is not: they have no place on that axis.
    """
    shown = []
    for setting, is_measured in _list_masked(entries):
        lines = setting.lines
        if is_measured:
            lines = [line for line in lines if line.has(REMOVED)]
        if lines:
            shown.append(dataclasses.replace(setting, lines=lines))
    return shown


def tell_left_out(entries: Sequence[Entry]) -> str:
    """Which lines, or which of their K, are not in the figure, and why; empty where all are."""
    names: dict[str, None] = {}
    for setting, is_measured in _list_masked(entries):
        for line in setting.lines:
            unknown = [k for k, entry in line.by_k.items() if REMOVED.read(entry) is None]
            if not is_measured or not unknown:
                continue
            is_whole = len(unknown) == len(line.by_k)
            name = line.name if is_whole else f"{line.name} at K = {', '.join(unknown)}"
            names[name] = None
    if not names:
        return ""
    return f"Not in the figure: {', '.join(names)}. What they remove is not measured; see the table."


def _list_masked(entries: Sequence[Entry]) -> list[tuple[Setting, bool]]:
    """The settings of `list_settings` with all their lines, and whether it is known of any mask of their folder what it
    removes."""
    settings = []
    for setting in blocks.split_settings(entries):
        if list_metrics([setting]) and not setting.keep_only:
            settings.append(setting)
    measured = {_tell_folder(setting) for setting in settings if setting.has(REMOVED)}
    return [(setting, _tell_folder(setting) in measured) for setting in settings]


def _tell_folder(setting: Setting) -> tuple[tuple[str, str], ...]:
    """What tells a setting's folder from others: all its names but that of a set of questions."""
    return tuple((name, text) for name, text in setting.names.items() if name != blocks.QUESTIONS)


def list_lines(settings: Sequence[Setting]) -> list[Line]:
    lines: list[Line] = []
    for setting in settings:
        lines += setting.lines
    return lines


def list_metrics(settings: Sequence[Setting]) -> list[Metric]:
    """EM and the answer's log probability, where there are drops of them."""
    there = []
    for metric in (EM, ANSWER):
        if any(setting.has(metric) for setting in settings):
            there.append(metric)
    return there


def choose_looks(settings: Sequence[Setting]) -> dict[str, Look]:
    """{name of a line: its look}. A control has its ranking's, dashed."""
    lines = list_lines(settings)
    colors = itertools.cycle(COLORS)
    markers = itertools.cycle(MARKERS)
    greys = itertools.cycle(GREYS)
    chance_markers = itertools.cycle(CHANCE_MARKERS)
    looks: dict[str, Look] = {}
    for line in lines:
        if line.ranking in looks:
            continue
        if line.ranking in blocks.CHANCE:
            looks[line.ranking] = Look(next(greys), next(chance_markers), True)
        else:
            looks[line.ranking] = Look(next(colors), next(markers), False)
    for line in lines:
        if line.control is not None:
            looks[line.name] = dataclasses.replace(looks[line.ranking], is_dashed=True, is_control=True)
    return looks


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def make_figure(settings: Sequence[Setting], left_out: str = "") -> Figure:
    """A row of panels per metric, a column per setting, as wide as a paper's column, or as its text where there are
    more than two. left_out: what is said of lines that are not in it."""
    from matplotlib.figure import Figure

    shown = list_metrics(settings)
    looks = choose_looks(settings)
    handles = make_handles(settings, looks)
    title = tell_along(settings, left_out)
    rows_of_legend = math.ceil(len(handles) / 2) + title.count("\n") + 1
    width = WIDTH if len(settings) <= 2 else WIDE
    height = PANEL_HEIGHT * len(shown) + LEGEND_ROW_HEIGHT * rows_of_legend + MARGIN
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(len(shown), len(settings), sharey="row", squeeze=False)
    for row, metric in zip(panels, shown):
        for panel, setting in zip(row, settings):
            draw_panel(panel, setting, metric, looks)
            if metric is not shown[-1]:
                panel.set_xlabel("")
        row[0].set_ylabel(metric.label)
    if len(settings) > 1:
        for panel, setting in zip(panels[0], settings):
            of_column = setting.title.replace(", ", "\n")
            panel.set_title(of_column, fontsize=6)
    figure.legend(handles=handles, loc="outside lower center", ncols=2, title=title)
    return figure


def tell_along(settings: Sequence[Setting], left_out: str) -> str:
    """The legend's title: which K stand along a line, and what is left out."""
    labels: dict[str, None] = {}
    for setting in settings:
        labels.update(dict.fromkeys(setting.ks.values()))
    along = f"along a line: K = {', '.join(labels)}"
    return "\n".join([along, *textwrap.wrap(left_out, TITLE_WIDTH)])


def draw_panel(panel: Axes, setting: Setting, metric: Metric, looks: dict[str, Look]) -> None:
    """The lines of one metric of a setting, over what masks remove; where an SAE does not let that be known, over how
    many latents they mask."""
    x = REMOVED if setting.has(REMOVED) else MASKED
    panel.axhline(0, color=INK, linewidth=0.5)
    for line in setting.lines:
        draw_line(panel, line, metric, x, looks[line.name])
    panel.set_xlabel(X_LABELS[x.name])
    panel.spines[["top", "right"]].set_visible(False)


def draw_line(panel: Axes, line: Line, metric: Metric, x: Metric, look: Look) -> None:
    """A line with its intervals, which a control has none of, and each of its points by itself, so that the page can
    point at it."""
    from matplotlib import rcParams

    points = find_points(line, metric, x)
    if not points:
        return
    places = [point.place for point in points]
    means = [point.mean for point in points]
    below = [point.below for point in points]
    above = [point.above for point in points]
    of_line = f"line|{line.ranking}|{line.control or ''}|"
    drawn = panel.errorbar(
        places,
        means,
        None if look.is_control else [below, above],
        color=look.color,
        alpha=look.opacity,
        linestyle=look.style,
        linewidth=look.scale(rcParams["lines.linewidth"]),
        elinewidth=0.5,
        label=f"{line.name} {line.mask}",
    )
    for artist in drawn.get_children():
        artist.set_gid(of_line)
    marked = look.marked(line.mask, rcParams["lines.markersize"])
    for point in points:
        name = f"{of_line}{point.name}"
        panel.plot([point.place], [point.mean], linestyle="", gid=name, zorder=ABOVE_LINES, **marked)


def find_points(line: Line, metric: Metric, x: Metric) -> list[Point]:
    """From left to right."""
    points = []
    for k, entry in line.by_k.items():
        place = x.read(entry)
        lost = metric.read(entry)
        if place is None or lost is None:
            continue
        low = lost.value if lost.low is None else lost.low
        high = lost.value if lost.high is None else lost.high
        point = Point(
            place=place.value,
            mean=lost.value,
            below=max(0.0, lost.value - low),
            above=max(0.0, high - lost.value),
            name=f"{metric.name}:{entry.journal or k}",
        )
        points.append(point)
    return sorted(points, key=lambda point: point.place)


def make_handles(settings: Sequence[Setting], looks: dict[str, Look]) -> list[Line2D]:
    """The legend's: a line for each ranking and for each control, then a marker for each mask."""
    from matplotlib import rcParams
    from matplotlib.lines import Line2D

    handles = []
    for name, look in list_legend(settings, looks).items():
        marker = look.marker or None
        width = look.scale(rcParams["lines.linewidth"])
        handle = Line2D([], [], label=name, linestyle=look.style, linewidth=width, color=look.color, marker=marker)
        handles.append(handle)
    plain = Look(INK, "o", False)
    masks = dict.fromkeys(line.mask for line in list_lines(settings))
    for mask in masks:
        handles.append(Line2D([], [], label=mask, linestyle="", **plain.marked(mask, rcParams["lines.markersize"])))
    return handles


def list_legend(settings: Sequence[Setting], looks: dict[str, Look]) -> dict[str, Look]:
    """{name: look} of the rankings, and of controls, which have their rankings' colours and markers, without any."""
    rankings = {}
    controls = {}
    for line in list_lines(settings):
        rankings[line.ranking] = looks[line.ranking]
        if line.control is not None:
            controls[f"the same in a random {line.control}"] = Look(GREYS[0], "", True, is_control=True)
    return rankings | controls
