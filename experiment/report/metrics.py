"""What a block of the comparison is of: how a figure is read from an entry of results.json, with its interval."""

from __future__ import annotations

from dataclasses import dataclass

from experiment.records.entries import Estimate, Figures, MaskedEntry
from experiment.report.sentences import MANY

MISSED_SHARE = 0.1  # of the questions: from there on a matched mask is marked
MISSED = "*"  # marks what a matched mask costs, and removes, where it is not matched to the baseline's
CROWD = "+"  # marks the same where a matched mask takes more than MANY times as many latents as K says
FEWER = "<"  # marks the same where a file of activations holds fewer latents than K asks for
MARKED = ("em", "removed")  # the figures that carry these marks
CONTROL_WORDS = {"own": "own latents"}  # where a control's name does not say what it is
SHORT = {
    "em": "EM",
    "f1": "F1",
    "named": "named",
    "answer_log_prob": "answer",
    "format_log_prob": "format",
}
POINTS = "points"
NATS = "nats per token"
COUNT = "per question"
PERCENT = "%"
SHARE = ""
EXCESS = {
    "em": POINTS,
    "f1": POINTS,
    "named": POINTS,
    "answer_log_prob": NATS,
}


@dataclass(frozen=True)
class Cell:
    """A mean with its interval, which is None over a single context, and a mark."""

    value: float
    low: float | None = None
    high: float | None = None
    mark: str = ""


@dataclass(frozen=True)
class Metric:
    """source: whether `name` is a field of the entry, of its level (the masked answers' own figures), of its drop
    (unmasked minus masked) or of its excess over a control."""

    title: str
    unit: str
    name: str
    source: str = "drop"
    control: str = ""

    @property
    def label(self) -> str:
        """With its unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def read(self, entry: MaskedEntry) -> Cell | None:
        """The figure of one entry; None where it has none."""
        if self.source == "field":
            return _read_field(entry, self.name)
        figures: Figures | None = entry
        if self.source == "drop":
            figures = entry.drop
        if self.source == "excess":
            excesses = entry.excess or {}
            return _read_figures(excesses.get(self.control), self.name, "")
        return _read_figures(figures, self.name, find_mark(entry, self.name))


def _read_field(entry: MaskedEntry, name: str) -> Cell | None:
    value = getattr(entry, name)
    if value is None:
        return None
    if not isinstance(value, Estimate):
        return Cell(value, mark=find_mark(entry, name))
    if value.mean is None:
        return None
    return Cell(value.mean, value.low, value.high)


def _read_figures(figures: Figures | None, name: str, mark: str) -> Cell | None:
    if figures is None:
        return None
    value = figures.mean_of(name)
    if value is None:
        return None
    interval = figures.intervals.get(name)
    if interval is None:
        return Cell(value, mark=mark)
    low, high = interval
    return Cell(value, low, high, mark)


def find_mark(entry: MaskedEntry, name: str) -> str:
    """What a reader has to know of a figure."""
    if name not in MARKED:
        return ""
    missed = entry.missed_target or 0
    if missed > MISSED_SHARE * entry.n:
        return MISSED
    if entry.missed_target is not None and entry.asked_k is not None and entry.mean_k > MANY * entry.asked_k:
        return CROWD
    return FEWER if entry.fewer_than_k else ""


def make_excess(control: str, name: str) -> Metric:
    """What masking costs beyond what its control costs."""
    words = CONTROL_WORDS.get(control, control)
    title = f"{SHORT[name]} drop beyond {words}'s"
    return Metric(title, EXCESS[name], name, "excess", control)


EM = Metric("EM drop", POINTS, "em")
F1 = Metric("F1 drop", POINTS, "f1")
NAMED = Metric("named drop", POINTS, "named")
ANSWER = Metric("answer drop", NATS, "answer_log_prob")
FORMAT = Metric("format drop", NATS, "format_log_prob")
DROPS = (EM, F1, NAMED, ANSWER, FORMAT)
EM_LEVEL = Metric("EM", PERCENT, "em", "level")
F1_LEVEL = Metric("F1", PERCENT, "f1", "level")
REMOVED = Metric("removed", PERCENT, "removed", "field")
MASKED = Metric("latents masked", COUNT, "mean_k", "field")
RESTORED = (
    Metric("faithfulness", SHARE, "faithfulness", "field"),
    Metric("completeness", SHARE, "completeness", "field"),
)
KEPT_ONLY = (
    *RESTORED,
    Metric("area under faithfulness", SHARE, "faithfulness_auc", "field"),
    Metric("area under completeness", SHARE, "completeness_auc", "field"),
)
