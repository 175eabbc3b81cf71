"""The figure's panels for the page, as SVG: each line can be told by its ranking and control, each point by its id."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

from experiment.records.entries import Entry
from experiment.report import figure
from experiment.report.blocks import Setting
from experiment.report.figure import Look
from experiment.report.metrics import Metric

STYLE = figure.STYLE | {"font.size": 9, "lines.linewidth": 1.4, "lines.markersize": 6}
SIZE = (4.4, 3.1)  # of a panel, inches
# The id of what is drawn of a line: ranking, control and a point's name.
NAMED_GROUP = re.compile(r'<g id="line\|(.*?)\|(.*?)\|(.*?)"')


def draw_panels(entries: Sequence[Entry]) -> dict[str, list[tuple[str, str]]]:
    """The figure's panels for the page, by setting: (what it shows, SVG)."""
    import matplotlib

    settings = figure.list_settings(entries)
    looks = figure.choose_looks(settings)
    panels = {}
    with matplotlib.rc_context(STYLE):
        for setting in settings:
            drawn = []
            for metric in figure.list_metrics([setting]):
                drawn.append((metric.label, draw_svg(setting, metric, looks)))
            panels[setting.title] = drawn
    return panels


def draw_svg(setting: Setting, metric: Metric, looks: dict[str, Look]) -> str:
    """A panel by itself. What is drawn of a line says in data-ranking and data-control which one it is of; a point's id
    is its name."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=SIZE, layout="constrained")
    panel = drawing.subplots()
    figure.draw_panel(panel, setting, metric, looks)
    panel.set_ylabel(metric.label)
    file = io.StringIO()
    drawing.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    svg = file.getvalue()
    named = NAMED_GROUP.sub(_name_group, svg)
    return named[named.index("<svg") :]


def _name_group(found: re.Match[str]) -> str:
    """The opening of a group, with what its id says as attributes. An interval has no name."""
    ranking, control, name = found.groups()
    of_line = f'<g data-ranking="{ranking}" data-control="{control}"'
    return f'{of_line} id="{name}"' if name else of_line
