"""What round 1 knows of each ranking, a row per ranking: what its lists share, and whether its scores find what
matters. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Sequence

from experiment.records.entries import Agreement, Estimate, LatentStatistics, SharedPercent, UnmaskedEntry
from experiment.report import cells
from experiment.report.metrics import Cell

MOST_ROWS = 15  # rankings that a terminal shows
FIRST = "with 1"  # what TopK shares with that of the first ranking
ON_TERMINAL = ("ranking", "same", "other", "union", FIRST, "spearman", "share", "found")
HEADS = {
    "ranking": ("", "ranking"),
    "active": ("active", ""),
    "k": ("K at", "50%"),
    "same": ("one context", "Top  Bottom"),
    "other": ("other ones", "Top  Bottom"),
    "union": ("in any", "TopK"),
    "common": ("most frequent", "in TopK"),
    "spearman": ("rank", "correlation"),
    "share": ("effect", "in TopK"),
    "found": ("", "found"),
}
NOTES = {
    "same": "one context, other ones: what TopK, BottomK of two questions on one, on different ones share, in %.",
    "union": "in any TopK: latents that are in the TopK of at least one question.",
    FIRST: "with 1: what TopK shares with that of ranking 1, in %.",
    "spearman": "rank correlation: between a ranking's scores and what masking each latent alone costs the answer.",
    "share": "effect in TopK: its share of what all latents cost alone; found: of the K costliest, those in it.",
}

Table = dict[str, list[str]]
"""Columns: two heads, then a text for each ranking."""


def describe_rankings(entries: Sequence[UnmaskedEntry]) -> Table:
    """The statistics of the entries that have any, at K = 50%; columns that are empty are left out."""
    described = [entry for entry in entries if entry.statistics is not None and entry.statistics.n]
    names = [entry.provenance.ranking or "" for entry in described]
    rows = []
    for number, entry in enumerate(described, 1):
        assert entry.statistics is not None  # those without are not described
        row = {"ranking": f"{number} {cells.shorten(entry.provenance.ranking or '')}"}
        row |= describe_lists(entry.statistics)
        row |= describe_agreement(entry.agreement)
        row |= describe_overlaps(entry.statistics, names)
        rows.append(row)
    heads = dict(HEADS)
    for number in range(1, len(names) + 1):
        heads[f"with {number}"] = ("with", str(number))
    table = {}
    for name, head in heads.items():
        texts = [row.get(name, "") for row in rows]
        if any(texts):
            table[name] = [*head, *texts]
    return table


def describe_lists(statistics: LatentStatistics) -> dict[str, str]:
    """{column: text} of a ranking's lists."""
    row = {
        "active": write_mean(statistics.active),
        "k": write_mean(statistics.k_at_half),
        "same": write_pair(statistics.same_context_percent),
        "other": write_pair(statistics.other_context_percent),
    }
    if statistics.union_topk is not None:
        row["union"] = str(statistics.union_topk)
    if statistics.most_frequent_topk:
        first = statistics.most_frequent_topk[0]
        percent = 100 * first.questions / statistics.n
        row["common"] = f"{first.latent} ({percent:.0f}%)"
    return row


def describe_agreement(agreement: Agreement | None) -> dict[str, str]:
    """{column: text} of what a ranking's scores say of single effects."""
    if agreement is None:
        return {}
    return {
        "spearman": write_estimate(agreement.spearman),
        "share": write_share(agreement.share),
        "found": write_share(agreement.found),
    }


def describe_overlaps(statistics: LatentStatistics, names: Sequence[str]) -> dict[str, str]:
    """{column: text} of what a ranking's TopK shares with those of the others, which go by their numbers."""
    row = {}
    for number, name in enumerate(names, 1):
        shared = statistics.overlap.get(name)
        if shared is not None and shared.topk is not None:
            row[f"with {number}"] = f"{shared.topk:.0f}"
    return row


def write_mean(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def write_pair(shared: SharedPercent | None) -> str:
    if shared is None or shared.topk is None or shared.bottomk is None:
        return ""
    return f"{shared.topk:4.1f}  {shared.bottomk:4.1f}"


def write_estimate(estimate: Estimate) -> str:
    if estimate.mean is None:
        return ""
    cell = Cell(estimate.mean, estimate.low, estimate.high)
    return cells.write_cell(cell, 2)


def write_share(estimate: Estimate) -> str:
    """A share from 0 to 1 in percent, without its interval."""
    return "" if estimate.mean is None else f"{100 * estimate.mean:.0f}%"


def list_notes(table: Table) -> list[str]:
    """What the columns that are there mean."""
    return [note for name, note in NOTES.items() if name in table]


# ---------------------------------------------------------------------------------------------------------------------
# On a terminal


def tell_rankings(entries: Sequence[UnmaskedEntry]) -> str:
    """`describe_rankings` for a terminal, without the columns that the page alone has: at most 25 lines of 100 columns,
    however many rankings there are."""
    table = describe_rankings(entries)
    if not table:
        return "No question was kept: there are no latents to describe."
    shown = {name: table[name] for name in ON_TERMINAL if name in table}
    columns = []
    for texts in shown.values():
        width = max(map(len, texts))
        columns.append([text.ljust(width) for text in texts])
    rows = []
    for row in zip(*columns):
        rows.append("  ".join(row).rstrip())
    told = rows[: 2 + MOST_ROWS]
    left_out = len(rows) - len(told)
    if left_out:
        told.append(f"and {left_out} more rankings, in results.json")
    first = {name: texts[2] for name, texts in table.items()}
    active = f"{first.get('active', '')} latents are active at the last position on average"
    lines = [f"{active}; K at 50% is {first.get('k', '')}.", *told, *list_notes(shown)]
    return "\n".join(lines)
