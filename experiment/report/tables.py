"""ONE table of all results, a pandas DataFrame, for results.csv; in which order results stand.

Knows nothing of models. pandas and matplotlib are imported where they are used: only the end of a round needs them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiment.records.entries import Agreement, Entry, Figures, MaskedEntry, UnmaskedEntry
from experiment.records.provenance import KNOWN_LATER, SETTINGS, depends_on
from experiment.records.schema import Provenance
from experiment.report.estimates import DROP_ONLY, MASKS, METRICS

if TYPE_CHECKING:
    from pandas import DataFrame

PAPERS_CHOICE = {"error_term": "drop", "ablation": "zero"}
TEXTS = ["ranking", "masked", "questions", "k", *PAPERS_CHOICE, "population"]  # no two rows of a folder share all
# Of several folders: those of these settings that differ are columns too.
COLUMNS = [name for name in SETTINGS if name not in ("questions", *PAPERS_CHOICE)]
COLUMNS += ["model_digest", "sae_digest", "dataset", "dataset_config", "split", "limit", "sample"]
NAMES = {
    "model": ("model",),
    "sae_release": ("sae_release", "sae_id"),
    "questions": ("dataset", "dataset_config", "split"),
}
SELECTION = ("limit", "sample")  # say less than which questions these gave, by which tables are told apart anyhow
BOUNDS = ("", "_low", "_high")
LEVELS = [f"{metric}{bound}" for metric in METRICS if metric not in DROP_ONLY for bound in BOUNDS]
DROPS = [f"{metric}_drop{bound}" for metric in METRICS for bound in BOUNDS]
COUNTS = ["fewer_than_k", "missed_target", "n", "left_out"]
NUMBERS = ["mean_k", "fewer_than_k", "removed", "missed_target", "n", "left_out"]
NUMBERS += [*LEVELS, *DROPS, "paper_em", "paper_f1"]
COMPARED = ("faithfulness", "completeness", "faithfulness_auc", "completeness_auc")  # estimates of a MaskedEntry
AGREED = ("spearman", "share", "found")  # of an Agreement
PAPER = Path(__file__).with_name("paper.json")


def build_table(entries: Sequence[Entry]) -> DataFrame:
    """The entries of results.json: texts, then numbers, in percent or nats per token, NaN where there is none.

    Rows: the questions unmasked (all asked, then kept), one for each population, which its hash tells apart, for two
    can have equal n; then one for each ranking, mask and K, and a single one of K = 0, which is the same for all of
    them; then one for each ranking whose scores stand beside single effects. Settings in which the entries differ are
    columns, the first ones; what only some results have (COMPARED, AGREED) is a column where there is any.
    """
    import pandas

    entries = name_alike(entries)
    unmasked = [entry for entry in entries if isinstance(entry, UnmaskedEntry)]
    masked = sort_masked(entries)
    rows = []
    for entry in unmasked:
        row = _make_row(entry, entry.all, "all asked", entry.population_all)
        rows.append(row | {"left_out": len(entry.left_out)})
    for entry in unmasked:
        rows.append(_make_row(entry, entry, "kept", entry.population))
    for of_mask in masked:
        if of_mask.clean is not None:
            rows.append(_make_row(of_mask, of_mask.clean, "kept", of_mask.population))
    # Round 1 did not ask all there is: the paper's figures do not stand beside these.
    partial = {entry.population for entry in unmasked if not asks_all(entry.provenance)}
    for of_mask in sorted(masked, key=lambda entry: not entry.masks_nothing):
        row = _make_masked_row(of_mask)
        if of_mask.population not in partial:
            row |= dict(zip(("paper_em", "paper_f1"), find_published(of_mask) or ()))
        rows.append(row)
    rows += _make_agreement_rows(unmasked)
    texts = find_differing(entries) + TEXTS
    numbers = list(NUMBERS)
    for row in rows:
        numbers += [name for name in row if name not in numbers and name not in texts and name not in COLUMNS]
    types = dict.fromkeys(numbers, "float") | dict.fromkeys(COUNTS, "Int64")
    table = pandas.DataFrame(rows, columns=texts + numbers).astype(types)
    return table.drop_duplicates(texts, ignore_index=True)


def to_csv(entries: Sequence[Entry]) -> str:
    """All columns of `build_table`, in full precision."""
    return build_table(entries).to_csv(index=False, lineterminator="\n")


def _make_row(entry: Entry, figures: Figures, questions: str, population: str) -> dict[str, Any]:
    """An unmasked row. figures: those of `entry` itself, or of a part of it."""
    row = dict(
        ranking="",
        masked="none",
        questions=questions,
        k="",
        error_term=entry.provenance.error_term,
        ablation="",
        population=population,
        n=figures.n,
    )
    for name in COLUMNS:
        row[name] = write_setting(getattr(entry.provenance, name))
    return row | _list_numbers(figures, "")


def _make_masked_row(entry: MaskedEntry) -> dict[str, Any]:
    """A masked row, but for the paper's figures; that of K = 0 is of no ranking and no mask."""
    row = _make_row(entry, entry, "kept", entry.population)
    if entry.drop is not None:
        row |= _list_numbers(entry.drop, "_drop")
    for control, excess in (entry.excess or {}).items():
        row |= _list_numbers(excess, f"_beyond_{control}")
    row |= _list_estimates(entry, COMPARED)
    for name in ("k", "mean_k", "fewer_than_k", "removed", "missed_target"):
        row[name] = getattr(entry, name)
    row["left_out"] = len(entry.left_out)
    if not entry.masks_nothing:
        row["ranking"] = entry.provenance.ranking
        row["masked"] = name_mask(entry)
        row["ablation"] = entry.provenance.ablation
    return row


def _make_agreement_rows(entries: Iterable[UnmaskedEntry]) -> list[dict[str, Any]]:
    """A row for each ranking whose scores stand beside single effects."""
    rows = []
    for entry in entries:
        agreement = entry.agreement
        if agreement is None:
            continue
        row = _make_row(entry, entry, "kept", entry.population)
        row |= {"ranking": entry.provenance.ranking, "k": agreement.k}
        rows.append(row | _list_estimates(agreement, AGREED))
    return rows


def _list_estimates(of: MaskedEntry | Agreement, names: Iterable[str]) -> dict[str, float]:
    """{column: mean, low or high} of the estimates that are there."""
    numbers = {}
    for name in names:
        estimate = getattr(of, name)
        if estimate is None:
            continue
        for bound, value in zip(BOUNDS, (estimate.mean, estimate.low, estimate.high)):
            numbers[f"{name}{bound}"] = value
    return numbers


def _list_numbers(figures: Figures, suffix: str) -> dict[str, float]:
    """{column: mean, low or high} of each metric that is in `figures`; no low and high without an interval."""
    numbers = {}
    for metric in METRICS:
        mean = figures.mean_of(metric)
        if mean is None:
            continue
        values = [mean, *(figures.intervals.get(metric) or ())]
        for bound, value in zip(BOUNDS, values):
            numbers[f"{metric}{suffix}{bound}"] = value
    return numbers


def write_setting(value: object) -> str:
    return "" if value is None else str(value)


def asks_all(made: Provenance) -> bool:
    return made.limit is None and made.sample is None


def name_alike(entries: Iterable[Entry]) -> list[Entry]:
    """The entries, with models, SAEs and data sets that are the same named alike, as the first entry names them."""
    names_of: dict[tuple, dict[str, str | None]] = {}
    named = []
    for entry in entries:
        made = entry.provenance
        values = depends_on(made)
        alike: dict[str, str | None] = {}
        for field, names in NAMES.items():
            if values[field] is None:
                continue
            content = (field, values[field], values["sae_id"] if field == "sae_release" else None)
            own = {name: getattr(made, name) for name in names}
            alike |= names_of.setdefault(content, own)
        named.append(entry.with_fields(run=made.with_fields(**alike)))
    return named


def find_differing(entries: Sequence[Entry]) -> list[str]:
    """Those of COLUMNS in which the entries differ: none in one folder, but for what was selected."""
    differing = []
    for name in COLUMNS:
        values = {write_setting(getattr(entry.provenance, name)) for entry in entries}
        if name in KNOWN_LATER:
            values.discard("")
        if len(values) > 1:
            differing.append(name)
    return differing


def tell_settings(entries: Sequence[Entry]) -> list[tuple[tuple[str, str], ...]]:
    """For each entry, ((setting, text), ...) of the settings in which they differ, but for those that say no more than
    earlier ones."""
    alike = name_alike(entries)
    told: list[tuple[tuple[str, str], ...]] = [()] * len(alike)
    for name in find_differing(alike):
        if name in SELECTION:
            continue
        texts = []
        for entry in alike:
            value = getattr(entry.provenance, name)
            texts.append(write_setting(value))
        longer = []
        for earlier, text in zip(told, shorten_names(texts)):
            longer.append((*earlier, (name, text)))
        if len(set(longer)) > len(set(told)):
            told = longer
    return told


def shorten_names(names: list[str]) -> list[str]:
    """Of paths that differ in some of their parts (layer_9/width_131k, layer_20/width_131k), these parts; of digests
    the beginning."""
    if all(re.fullmatch("[0-9a-f]{64}|", name) for name in names):
        return [name[:8] for name in names]
    paths = [name.split("/") for name in names]
    lengths = {len(path) for path in paths}
    if len(lengths) > 1:
        return names
    differing = []
    for parts in zip(*paths):
        if len(set(parts)) > 1:
            differing.append(parts)
    if not differing:
        return names
    return ["/".join(parts) for parts in zip(*differing)]


def sort_masked(entries: Sequence[Entry]) -> list[MaskedEntry]:
    """The entries of masked rounds, by ranking, mask, setting and K; folders stay in their order.

    Of K that mask equally many, numbers stand before percentages.
    """
    alike = name_alike(entries)
    differing = find_differing(alike)
    folders: list[list[str]] = []  # the settings of each
    masked = []  # (what they are sorted by, entry)
    for entry, named in zip(entries, alike):
        settings = [write_setting(getattr(named.provenance, name)) for name in differing]
        if settings not in folders:
            folders.append(settings)
        if isinstance(entry, MaskedEntry):
            masked.append((_order_entry(entry, folders.index(settings)), entry))
    masked.sort(key=lambda pair: pair[0])
    return [entry for _, entry in masked]


def _order_entry(entry: MaskedEntry, folder: int) -> tuple:
    made = entry.provenance
    return (
        made.ranking,
        list(MASKS).index(entry.masked),
        folder,
        made.error_term != PAPERS_CHOICE["error_term"],
        made.ablation != PAPERS_CHOICE["ablation"],
        bool(entry.keep_only),
        entry.control or "",
        entry.mean_k,
        entry.k.endswith("%"),
        float(entry.k.removesuffix("%")),
    )


def name_mask(entry: MaskedEntry) -> str:
    """ "TopK" or "BottomK", what takes its place, and what of PAPERS_CHOICE is not the paper's."""
    words = ["all but"] if entry.keep_only else []
    words.append(MASKS[entry.masked])
    if entry.control is not None:
        words.append(entry.control)
    for name, choice in PAPERS_CHOICE.items():
        value = getattr(entry.provenance, name)
        if value != choice:
            words.append(value)
    return " ".join(words)


def find_published(entry: MaskedEntry) -> list[float] | None:
    """The paper's [EM, F1] for a masked round's entry, or None: paper.json has them, for the paper's own setting."""
    made = entry.provenance
    paper = json.loads(PAPER.read_text(encoding="utf-8"))
    published = paper["published"].get((made.model or "").split("/")[-1])
    if published is None:
        return None
    for name, value in (paper["setting"] | published["setting"]).items():
        if getattr(made, name) != value:
            return None
    of_ranking = published["sae_ids"].get(made.sae_id, {}).get(made.ranking, {})
    return of_ranking.get(entry.masked, {}).get(entry.k)
