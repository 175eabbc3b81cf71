"""The comparison in blocks, rankings down and K across: what terminal, LaTeX, figure and page show of it.

A Setting is what stands in one table: the masks of one error term and ablation, on one set of kept questions, of one
folder. A Line is a row of it: one ranking's TopK (or BottomK), over K. Knows nothing of models.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from experiment import UserError
from experiment.masks import Side
from experiment.records.entries import Entry, Estimate, Figures, MaskedEntry, UnmaskedEntry
from experiment.report import tables
from experiment.report.estimates import MASKS

CHANCE = ("matched", "random", "other", "other-context")  # rankings that know nothing of what a latent does
DRAWN = ("matched", "random")  # rankings that have nothing to be beyond chance
ALL_BUT = "all but TopK"  # the mask of --keep-only
MISSED_SHARE = 0.1  # of the questions: from there on a matched mask is marked
MISSED = "*"  # marks what a matched mask removes where it is not matched to the baseline's
MARKED = ("em", "removed")  # the figures that carry these marks
FEWER = "<"  # marks where a file of activations holds fewer latents than K asks for
SELECTION = ("limit", "sample")  # say less than which questions these gave, by which Settings are told apart anyhow
ERROR_TERMS = {"drop": "error term dropped", "keep": "error term kept"}
ABLATIONS = {"zero": "masked latents set to zero", "mean": "masked latents set to their mean"}
CONTROL_WORDS = {"own": "own latents"}  # where a control's name does not say what it is


@dataclass(frozen=True)
class Cell:
    """A mean with its interval, which is None over a single context, and a mark."""

    value: float
    low: float | None = None
    high: float | None = None
    mark: str = ""


@dataclass(frozen=True)
class Metric:
    """What a block is of: a field of an entry, of its drop (unmasked minus masked) or of its excess over a control."""

    title: str
    unit: str
    name: str
    source: str = "drop"
    control: str = ""

    def read(self, entry: MaskedEntry) -> Cell | None:
        """The figure of one entry; None where it has none."""
        mark = _mark(entry) if self.name in MARKED else ""
        if self.source == "excess":
            return _read_figures((entry.excess or {}).get(self.control), self.name)
        if self.source == "drop":
            return _read_figures(entry.drop, self.name, mark)
        if self.source == "level":
            return _read_figures(entry, self.name, mark)
        value = getattr(entry, self.name)
        if isinstance(value, Estimate):
            return None if value.mean is None else Cell(value.mean, value.low, value.high)
        return None if value is None else Cell(value, mark=mark)

    def is_of(self, line: Line) -> bool:
        """Whether a line has such a figure."""
        return any(self.read(entry) is not None for entry in line.by_k.values())


def _read_figures(figures: Figures | None, name: str, mark: str = "") -> Cell | None:
    value = figures.mean_of(name) if figures is not None else None
    if figures is None or value is None:
        return None
    low, high = figures.intervals.get(name) or (None, None)
    return Cell(value, low, high, mark)


def _mark(entry: MaskedEntry) -> str:
    if (entry.missed_target or 0) > MISSED_SHARE * entry.n:
        return MISSED
    return FEWER if entry.fewer_than_k else ""


POINTS = "points"
NATS = "nats per token"
COUNT = "per question"
EM = Metric("EM drop", POINTS, "em")
F1 = Metric("F1 drop", POINTS, "f1")
NAMED = Metric("named drop", POINTS, "named")
ANSWER = Metric("answer drop", NATS, "answer_log_prob")
FORMAT = Metric("format drop", NATS, "format_log_prob")
DROPS = (EM, F1, NAMED, ANSWER, FORMAT)
EM_LEVEL = Metric("EM", "%", "em", "level")
F1_LEVEL = Metric("F1", "%", "f1", "level")
REMOVED = Metric("removed", "%", "removed", "field")
MASKED = Metric("latents masked", COUNT, "mean_k", "field")
KEPT_ONLY = (
    Metric("faithfulness", "", "faithfulness", "field"),
    Metric("completeness", "", "completeness", "field"),
    Metric("area under faithfulness", "", "faithfulness_auc", "field"),
    Metric("area under completeness", "", "completeness_auc", "field"),
)
EXCESS = {"em": POINTS, "f1": POINTS, "named": POINTS, "answer_log_prob": NATS}
PUBLISHED = ("em", "f1")  # what the paper gives
SHORT = {"em": "EM", "f1": "F1", "named": "named", "answer_log_prob": "answer", "format_log_prob": "format"}


@dataclass(frozen=True)
class Line:
    """A ranking's TopK (or BottomK) over K; with a control, what is masked in their place; keep_only, all but these."""

    ranking: str
    side: Side
    control: str | None
    keep_only: bool
    by_k: dict[str, MaskedEntry] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.ranking}, {self.control}" if self.control else self.ranking

    @property
    def mask(self) -> str:
        return ALL_BUT if self.keep_only else MASKS[self.side]

    @property
    def is_chance(self) -> bool:
        return self.control is not None or self.ranking in CHANCE


@dataclass(frozen=True)
class Setting:
    """What stands in one table.

    names: what tells it from the others, {setting: text}.  ks: in the order of how many latents they mask, each with a
    label.  nothing: of K = 0, which is the same for all rankings.  clean: the kept questions, unmasked.
    """

    names: dict[str, str]
    error_term: str
    ablation: str
    clean: Figures | None
    unmasked: list[UnmaskedEntry]
    nothing: MaskedEntry | None
    ks: dict[str, str]
    lines: list[Line]

    @property
    def title(self) -> str:
        words = [*self.names.values(), ERROR_TERMS.get(self.error_term, self.error_term)]
        if self.lines:
            words.append(ABLATIONS.get(self.ablation, self.ablation))
        return ", ".join(words)

    @property
    def masks(self) -> list[str]:
        """Those that it has lines of, TopK first."""
        there = {line.mask for line in self.lines}
        return [mask for mask in (*MASKS.values(), ALL_BUT) if mask in there]

    def of(self, mask: str) -> list[Line]:
        """The lines of one mask: TopK, BottomK or all but TopK."""
        return [line for line in self.lines if line.mask == mask]

    @property
    def controls(self) -> list[str]:
        """What there is an excess over, the fairest first."""
        found: dict[str, None] = {}
        for entry in self.entries:
            found.update(dict.fromkeys(entry.excess or {}))
        return sorted(found, key=lambda name: (name != "direction", name))

    @property
    def entries(self) -> list[MaskedEntry]:
        entries: list[MaskedEntry] = []
        for line in self.lines:
            entries += line.by_k.values()
        return entries

    def metrics(self) -> list[Metric]:
        """What there are figures of, one block each."""
        wanted = [*DROPS]
        if any(entry.drop is None for entry in self.entries):
            wanted += [EM_LEVEL, F1_LEVEL]
        for control in self.controls:
            for name, unit in EXCESS.items():
                wanted.append(make_excess(control, name, unit))
        wanted += [REMOVED, MASKED, *KEPT_ONLY]
        return [metric for metric in wanted if self.has(metric)]

    def has(self, metric: Metric) -> bool:
        return any(metric.is_of(line) for line in self.lines)


def make_excess(control: str, name: str, unit: str) -> Metric:
    """What masking costs beyond what its control costs."""
    words = CONTROL_WORDS.get(control, control)
    return Metric(f"{SHORT[name]} drop beyond {words}'s", unit, name, "excess", control)


def choose(entries: Sequence[Entry], rankings: Collection[str], ks: Collection[str]) -> list[Entry]:
    """The entries of these rankings and K, with what is unmasked of them; all where none is named. Raises UserError
    where there is no such ranking or K."""
    masked = [entry for entry in entries if isinstance(entry, MaskedEntry)]
    _refuse_unknown("--rankings", rankings, [entry.provenance.ranking or "" for entry in masked])
    _refuse_unknown("--k", ks, [entry.k for entry in masked])
    chosen: list[Entry] = []
    for entry in entries:
        is_k = not ks or entry.k is None or entry.k in ks
        if isinstance(entry, MaskedEntry) and entry.masks_nothing:
            is_k = True
        if is_k and (not rankings or entry.provenance.ranking in rankings):
            chosen.append(entry)
    if not any(isinstance(entry, UnmaskedEntry) for entry in chosen):
        chosen += [entry for entry in entries if isinstance(entry, UnmaskedEntry)]
    return chosen


def _refuse_unknown(option: str, wanted: Collection[str], known: Iterable[str]) -> None:
    there = list(dict.fromkeys(known))
    unknown = [name for name in wanted if name not in there]
    if unknown:
        raise UserError(f"{option} {' '.join(unknown)}: not in these results, which have {', '.join(there) or 'none'}")


def split_settings(entries: Sequence[Entry]) -> list[Setting]:
    """The entries of results.json as Settings, in their order."""
    shown: list[Entry] = [entry for entry in entries if isinstance(entry, UnmaskedEntry)]
    shown += tables.sort_masked(entries)
    groups: dict[tuple, list[Entry]] = {}
    for names, entry in zip(tell_settings(shown), shown):
        key = (names, entry.provenance.error_term, entry.population)
        groups.setdefault(key, []).append(entry)
    settings = []
    for (names, error_term, _), group in groups.items():
        settings += _split_ablations(dict(names), error_term, group)
    return _name_populations(settings)


def _split_ablations(names: dict[str, str], error_term: str, group: list[Entry]) -> list[Setting]:
    """The entries on one set of questions as a Setting for each ablation; one where nothing is masked."""
    unmasked = [entry for entry in group if isinstance(entry, UnmaskedEntry)]
    masked = [entry for entry in group if isinstance(entry, MaskedEntry)]
    clean: Figures | None = unmasked[0] if unmasked else None
    for entry in masked:
        clean = clean or entry.clean
    nothing = [entry for entry in masked if entry.masks_nothing]
    shown = [entry for entry in masked if not entry.masks_nothing]
    settings = []
    for ablation in dict.fromkeys([entry.provenance.ablation for entry in shown] or ["zero"]):
        of_ablation = [entry for entry in shown if entry.provenance.ablation == ablation]
        setting = Setting(
            names=names,
            error_term=error_term,
            ablation=ablation,
            clean=clean,
            unmasked=unmasked,
            nothing=nothing[0] if nothing else None,
            ks=label_ks(of_ablation),
            lines=make_lines(of_ablation),
        )
        settings.append(setting)
    return settings


def _name_populations(settings: Sequence[Setting]) -> list[Setting]:
    """The Settings; those that nothing else tells apart are named after their set of questions."""
    titles = [setting.title for setting in settings]
    named = []
    for setting in settings:
        if titles.count(setting.title) > 1:
            entry: Entry = (setting.entries or setting.unmasked)[0]
            names = setting.names | {"questions": f"questions {entry.population[:6]}"}
            setting = dataclasses.replace(setting, names=names)
        named.append(setting)
    return named


def make_lines(entries: Iterable[MaskedEntry]) -> list[Line]:
    """The lines of masked entries: the baseline, other rankings, what chance does; a control below its own ranking."""
    lines: dict[tuple, Line] = {}
    for entry in entries:
        ranking = entry.provenance.ranking or ""
        key = (ranking, entry.masked, entry.control, bool(entry.keep_only))
        line = lines.setdefault(key, Line(*key))
        line.by_k[entry.k] = entry
    return sorted(lines.values(), key=lambda line: (line.ranking in CHANCE, line.ranking != "baseline"))


def label_ks(entries: Sequence[MaskedEntry]) -> dict[str, str]:
    """{K: its label}, by how many latents they mask, which a percentage says. Of those that mask equally many, numbers
    stand before percentages."""
    counts: dict[str, float] = {}
    for entry in sorted(entries, key=lambda entry: entry.provenance.ranking in CHANCE):
        counts.setdefault(entry.k, entry.mean_k)
    order = sorted(counts, key=lambda k: (counts[k], k.endswith("%"), float(k.removesuffix("%"))))
    return {k: f"{k} ({counts[k]:.1f})" if k.endswith("%") else k for k in order}


def find_papers(setting: Setting, lines: Iterable[Line], metric: str = "em") -> dict[str, dict[str, float]]:
    """{ranking: {K: the paper's EM or F1 in percent}} of the masks that it has, where all its questions were asked."""
    published: dict[str, dict[str, float]] = {}
    asks_all = all(tables.asks_all(entry.provenance) for entry in setting.unmasked)
    if metric not in PUBLISHED or not asks_all:
        return published
    for line in lines:
        for k, entry in line.by_k.items():
            figures = tables.find_published(entry)
            if figures is not None and line.control is None:
                of_ranking = published.setdefault(line.ranking, {})
                of_ranking[k] = figures[PUBLISHED.index(metric)]
    return published


# ---------------------------------------------------------------------------------------------------------------------
# Settings in which folders differ


def tell_settings(entries: Sequence[Entry]) -> list[tuple[tuple[str, str], ...]]:
    """For each entry, ((setting, text), ...) of the settings in which they differ, but for those that say no more than
    earlier ones."""
    alike = tables.name_alike(entries)
    told: dict[str, list[str]] = {}
    rows: list[tuple[str, ...]] = [()] * len(alike)  # what was told of each
    for name in tables.find_differing(alike):
        if name in SELECTION:
            continue
        texts = [tables.write_setting(getattr(entry.provenance, name)) for entry in alike]
        longer = [(*row, text) for row, text in zip(rows, texts)]
        if len(set(longer)) > len(set(rows)):
            told[name] = shorten_names(texts)
            rows = longer
    settings = []
    for number in range(len(entries)):
        settings.append(tuple((name, texts[number]) for name, texts in told.items()))
    return settings


def shorten_names(names: list[str]) -> list[str]:
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
