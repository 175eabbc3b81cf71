"""The comparison in blocks, rankings down and K across: what terminal, LaTeX, figure and page show of it.

A Setting is what stands in one table: the masks of one error term and ablation, on one set of kept questions, of one
folder; --keep-only has a Setting of its own. A Line is a row of it: one ranking's TopK (or BottomK), over K.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from experiment import UserError
from experiment.masks import DRAWN, OTHERS, Side
from experiment.records.entries import Entry, Figures, MaskedEntry, UnmaskedEntry
from experiment.report import metrics, tables
from experiment.report.estimates import MASKS
from experiment.report.metrics import Metric

CHANCE = (*DRAWN, *OTHERS)  # rankings that know nothing of what a latent does
ALL_BUT = "all but TopK"  # the mask of --keep-only
QUESTIONS = "questions"  # names a Setting after its set of questions
WITH_NEIGHBOURS = "with another one on their context"  # those that other has latents for
PLAIN = ("model", "sae_release", "sae_id", "hook_name", "dataset")  # settings whose values say what they are
PUBLISHED = ("em", "f1")  # what the paper gives
ERROR_TERMS = {"drop": "error term dropped", "keep": "error term kept"}
ABLATIONS = {"zero": "masked latents set to zero", "mean": "masked latents set to their mean"}


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
    def words(self) -> str:
        """Its name as the page tells it."""
        return f"{self.ranking} in a random {self.control}" if self.control else self.ranking

    @property
    def mask(self) -> str:
        return ALL_BUT if self.keep_only else MASKS[self.side]

    def has(self, metric: Metric) -> bool:
        """Whether there is such a figure at any K."""
        for entry in self.by_k.values():
            if metric.read(entry) is not None:
                return True
        return False


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
        words = []
        for name, text in self.names.items():
            words.append(text if name in PLAIN else f"{name} {text}")
        words.append(ERROR_TERMS.get(self.error_term, self.error_term))
        if self.lines:
            words.append(ABLATIONS.get(self.ablation, self.ablation))
        if self.keep_only:
            words.append(f"{ALL_BUT} masked")
        return ", ".join(words)

    @property
    def keep_only(self) -> bool:
        """Whether it is of masks that leave a list alone."""
        return any(line.keep_only for line in self.lines)

    @property
    def masks(self) -> list[str]:
        """Those that it has lines of, TopK first."""
        there = {line.mask for line in self.lines}
        return [mask for mask in (*MASKS.values(), ALL_BUT) if mask in there]

    def of(self, mask: str) -> list[Line]:
        """The lines of one mask: TopK, BottomK or all but TopK."""
        return [line for line in self.lines if line.mask == mask]

    @property
    def entries(self) -> list[MaskedEntry]:
        entries: list[MaskedEntry] = []
        for line in self.lines:
            entries += line.by_k.values()
        return entries

    @property
    def told(self) -> list[Entry]:
        """Its entries, what masks nothing or less first."""
        nothing = [] if self.nothing is None else [self.nothing]
        return [*self.unmasked, *nothing, *self.entries]

    @property
    def population(self) -> str:
        """The hash of its questions' ids."""
        return self.told[0].population

    @property
    def is_of_neighbours(self) -> bool:
        """Whether all that was masked are latents of another question on the same context."""
        rankings = {line.ranking for line in self.lines}
        return rankings == {"other"}

    @property
    def has_nameless_questions(self) -> bool:
        """Whether nothing but a hash tells its set of questions from another."""
        return self.names.get(QUESTIONS, WITH_NEIGHBOURS) != WITH_NEIGHBOURS

    @property
    def controls(self) -> list[str]:
        """What there is an excess over, the fairest first."""
        found: set[str] = set()
        for entry in self.entries:
            found.update(entry.excess or {})
        return sorted(found, key=lambda name: (name != "direction", name))

    def has(self, metric: Metric) -> bool:
        return any(line.has(metric) for line in self.lines)

    def list_ks(self, metric: Metric, lines: Iterable[Line]) -> dict[str, str]:
        """{K: its label} of those at which any of the lines has such a figure."""
        there: set[str] = set()
        for line in lines:
            for k, entry in line.by_k.items():
                if metric.read(entry) is not None:
                    there.add(k)
        return {k: label for k, label in self.ks.items() if k in there}

    def list_metrics(self) -> list[Metric]:
        """What there are figures of, one block each."""
        wanted = list(metrics.DROPS)
        if any(entry.drop is None for entry in self.entries):
            wanted += [metrics.EM_LEVEL, metrics.F1_LEVEL]
        for control in self.controls:
            for name in metrics.EXCESS:
                wanted.append(metrics.make_excess(control, name))
        wanted += [metrics.REMOVED, metrics.MASKED]
        wanted += metrics.KEPT_ONLY
        return [metric for metric in wanted if self.has(metric)]


# ---------------------------------------------------------------------------------------------------------------------
# Entries as Settings and Lines


def split_settings(entries: Sequence[Entry]) -> list[Setting]:
    """The entries of results.json as Settings, in their order."""
    shown: list[Entry] = list(list_unmasked(entries))
    shown += tables.sort_masked(entries)
    groups: dict[tuple, list[Entry]] = {}
    for names, entry in zip(tables.tell_settings(shown), shown):
        key = (names, entry.provenance.error_term, entry.population)
        group = groups.setdefault(key, [])
        group.append(entry)
    settings: list[Setting] = []
    for (names, error_term, _), group in groups.items():
        settings += _split_ablations(dict(names), error_term, group)
    return _name_populations(settings)


def list_unmasked(entries: Iterable[Entry]) -> list[UnmaskedEntry]:
    return [entry for entry in entries if isinstance(entry, UnmaskedEntry)]


def list_masked(entries: Iterable[Entry]) -> list[MaskedEntry]:
    return [entry for entry in entries if isinstance(entry, MaskedEntry)]


def _split_ablations(names: dict[str, str], error_term: str, group: Sequence[Entry]) -> list[Setting]:
    """The entries on one set of questions as a Setting for each ablation, and for masks that leave a list alone; one
    where nothing is masked."""
    unmasked = list_unmasked(group)
    nothing: MaskedEntry | None = None
    masked: dict[tuple[bool, str], list[MaskedEntry]] = {}
    for entry in list_masked(group):
        if entry.masks_nothing:
            nothing = entry
            continue
        key = (bool(entry.keep_only), entry.provenance.ablation)
        entries = masked.setdefault(key, [])
        entries.append(entry)
    if not masked:
        masked[False, "zero"] = []
    settings = []
    for (keep_only, ablation), entries in sorted(masked.items(), key=lambda item: item[0][0]):
        setting = Setting(
            names=names,
            error_term=error_term,
            ablation=ablation,
            clean=_find_clean(group),
            unmasked=unmasked,
            nothing=None if keep_only else nothing,  # K = 0 keeps nothing there
            ks=label_ks(entries),
            lines=make_lines(entries),
        )
        settings.append(setting)
    return settings


def _find_clean(group: Sequence[Entry]) -> Figures | None:
    """The figures of the kept questions, unmasked; None where nobody knows them."""
    for entry in group:
        if isinstance(entry, UnmaskedEntry):
            return entry
        if isinstance(entry, MaskedEntry) and entry.clean is not None:
            return entry.clean
    return None


def _name_populations(settings: Sequence[Setting]) -> list[Setting]:
    """The Settings; those that nothing else tells apart are named after their set of questions, in words for those that
    only other was run on."""
    settings = _name_alike(settings, lambda setting: WITH_NEIGHBOURS if setting.is_of_neighbours else "")
    return _name_alike(settings, lambda setting: setting.population[:6])


def _name_alike(settings: Sequence[Setting], name: Callable[[Setting], str]) -> list[Setting]:
    """The Settings; those whose titles are the same with a name of their questions, where `name` has one."""
    titles = [setting.title for setting in settings]
    named = []
    for setting, title in zip(settings, titles):
        questions = name(setting)
        if questions and titles.count(title) > 1:
            setting = dataclasses.replace(setting, names=setting.names | {QUESTIONS: questions})
        named.append(setting)
    return named


def make_lines(entries: Iterable[MaskedEntry]) -> list[Line]:
    """The lines of masked entries: the baseline, other rankings, what chance does; a control below its own ranking."""
    lines: dict[tuple, Line] = {}
    for entry in entries:
        ranking = entry.provenance.ranking or ""
        keep_only = bool(entry.keep_only)
        key = (ranking, entry.masked, entry.control, keep_only)
        if key not in lines:
            lines[key] = Line(ranking, entry.masked, entry.control, keep_only)
        lines[key].by_k[entry.k] = entry
    return sorted(lines.values(), key=lambda line: order_ranking(line.ranking))


def order_ranking(ranking: str) -> tuple[bool, bool]:
    return ranking in CHANCE, ranking != "baseline"


def label_ks(entries: Sequence[MaskedEntry]) -> dict[str, str]:
    """{K: its label}, by how many latents they mask, which a percentage says. Of those that mask equally many, numbers
    stand before percentages."""
    counts: dict[str, float] = {}
    knowing_first = sorted(entries, key=lambda entry: entry.provenance.ranking in CHANCE)
    for entry in knowing_first:
        counts.setdefault(entry.k, entry.mean_k)
    fewest_first = sorted(counts, key=lambda k: order_k(k, counts[k]))
    labels = {}
    for k in fewest_first:
        labels[k] = k
        if k.endswith("%"):
            labels[k] += f" ({counts[k]:.1f})"
    return labels


def order_k(k: str, count: float) -> tuple[float, bool, float]:
    """count: latents that it masks."""
    number = k.removesuffix("%")
    return count, k.endswith("%"), float(number)


def find_papers(setting: Setting, lines: Iterable[Line], metric: str = "em") -> dict[str, dict[str, float]]:
    """{ranking: {K: the paper's EM or F1 in percent}} of the masks that it has, where all its questions were asked."""
    published: dict[str, dict[str, float]] = {}
    asks_all = all(tables.asks_all(entry.provenance) for entry in setting.unmasked)
    if metric not in PUBLISHED or not asks_all:
        return published
    place = PUBLISHED.index(metric)
    for line in lines:
        for k, entry in line.by_k.items():
            figures = tables.find_published(entry)
            if figures is not None and line.control is None:
                of_ranking = published.setdefault(line.ranking, {})
                of_ranking[k] = figures[place]
    return published


# ---------------------------------------------------------------------------------------------------------------------
# What a reader chose


def choose(entries: Sequence[Entry], rankings: Collection[str], ks: Collection[str]) -> list[Entry]:
    """The entries of these rankings and K, with what is unmasked of them; all where none is named. Raises UserError
    where there is no such ranking or K."""
    masked = list_masked(entries)
    _refuse_unknown("--rankings", rankings, [entry.provenance.ranking or "" for entry in masked])
    _refuse_unknown("--k", ks, [entry.k for entry in masked])
    chosen: list[Entry] = []
    for entry in entries:
        is_k = True
        if isinstance(entry, MaskedEntry) and not entry.masks_nothing:
            is_k = not ks or entry.k in ks
        is_ranking = not rankings or entry.provenance.ranking in rankings
        if is_k and is_ranking:
            chosen.append(entry)
    if not list_unmasked(chosen):
        chosen += list_unmasked(entries)
    return chosen


def _refuse_unknown(option: str, wanted: Iterable[str], known: Iterable[str]) -> None:
    there = list(dict.fromkeys(known))
    unknown = [name for name in wanted if name not in there]
    if unknown:
        named = " ".join(unknown)
        held = ", ".join(there) or "none"
        raise UserError(f"{option} {named}: not in these results, which have {held}")
