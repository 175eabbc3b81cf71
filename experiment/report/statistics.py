"""What round 1 knows of each ranking, a row per ranking: what its lists share, and whether its scores find what
matters. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Sequence

from experiment.records.entries import Estimate, LatentStatistics, SharedPercent, UnmaskedEntry

MOST_ROWS = 15  # rankings that a terminal shows
MOST_OVERLAPS = 7  # of them stand beside each other
NOTES = {
    "one context, %": "one context, other contexts: what lists of two questions on one, on different ones share.",
    "in any": "in any TopK: latents that are in the TopK of at least one question.",
    "rank": "rank correlation: between a ranking's scores and what masking each latent alone costs the answer.",
    "effect": "effect in TopK: of what the latents cost alone, the share of its TopK.  found: of the K that cost most.",
    "with": "with 1, 2, ...: what TopK shares with that of the ranking of this number, %.",
}
HEADS = {
    "active": ("active", ""),
    "k": ("K at", "50%"),
    "same": ("one context, %", "TopK  BottomK"),
    "other": ("other contexts, %", "TopK  BottomK"),
    "union": ("in any", "TopK"),
    "common": ("most frequent", "in TopK"),
    "spearman": ("rank", "correlation"),
    "share": ("effect", "in TopK"),
    "found": ("", "found"),
}

Table = list[list[str]]
"""Rows of texts; the first two are heads."""


def describe_rankings(entries: Sequence[UnmaskedEntry]) -> Table:
    """The statistics of the entries that have any, at K = 50%; columns that are empty are left out. Without such an
    entry, no row."""
    described = [entry for entry in entries if entry.statistics is not None and entry.statistics.n]
    if not described:
        return []
    names = [entry.provenance.ranking or "" for entry in described]
    rows = [describe_ranking(entry, names) for entry in described]
    heads = [("", "ranking"), *HEADS.values(), *_head_overlaps(names)]
    columns = []
    for head, *texts in zip(heads, *rows):
        if any(texts):
            columns.append([*head, *texts])
    return [list(row) for row in zip(*columns)]


def _head_overlaps(names: list[str]) -> list[tuple[str, str]]:
    """The heads of the columns of what a ranking shares with the others, which go by their numbers."""
    numbers = range(1, min(len(names), MOST_OVERLAPS) + 1)
    return [("with", str(number)) for number in numbers]


def describe_ranking(entry: UnmaskedEntry, names: list[str]) -> list[str]:
    """A row of texts. names: of all rankings, for what they share."""
    statistics = entry.statistics
    assert statistics is not None  # those without are not described
    own = entry.provenance.ranking or ""
    row = [
        f"{names.index(own) + 1} {own}",
        _write_mean(statistics.active),
        _write_mean(statistics.k_at_half),
        _write_pair(statistics.same_context_percent),
        _write_pair(statistics.other_context_percent),
        "" if statistics.union_topk is None else str(statistics.union_topk),
        _write_most_frequent(statistics),
    ]
    agreement = entry.agreement
    row.append(_write_estimate(agreement.spearman, 2) if agreement else "")
    row.append(_write_share(agreement.share) if agreement else "")
    row.append(_write_share(agreement.found) if agreement else "")
    for name in names[:MOST_OVERLAPS]:
        shared = statistics.overlap.get(name)
        row.append("" if shared is None or shared.topk is None else f"{shared.topk:.0f}")
    return row


def _write_mean(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _write_pair(shared: SharedPercent | None) -> str:
    if shared is None or shared.topk is None or shared.bottomk is None:
        return ""
    return f"{shared.topk:5.1f} {shared.bottomk:5.1f}"


def _write_most_frequent(statistics: LatentStatistics) -> str:
    if not statistics.most_frequent_topk:
        return ""
    first = statistics.most_frequent_topk[0]
    return f"{first.latent} ({100 * first.questions / statistics.n:.0f}%)"


def _write_estimate(estimate: Estimate, digits: int) -> str:
    if estimate.mean is None:
        return ""
    text = f"{estimate.mean:.{digits}f}"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def _write_share(estimate: Estimate) -> str:
    """A share from 0 to 1 in percent, without its interval."""
    return "" if estimate.mean is None else f"{100 * estimate.mean:.0f}%"


def tell_rankings(entries: Sequence[UnmaskedEntry]) -> str:
    """`describe_rankings` for a terminal: some thirty lines at most, however many rankings there are."""
    table = describe_rankings(entries)
    if not table:
        return "No question was kept: there are no latents to describe."
    widths = [max(map(len, column)) for column in zip(*table)]
    rows = []
    for row in table[: 2 + MOST_ROWS]:
        texts = [text.ljust(width) for text, width in zip(row, widths)]
        rows.append("  ".join(texts).rstrip())
    left_out = len(table) - len(rows)
    if left_out:
        rows.append(f"and {left_out} more rankings, in results.json")
    return "\n".join([*rows, *list_notes(entries)])


def list_notes(entries: Sequence[UnmaskedEntry]) -> list[str]:
    """What the columns that are there mean."""
    heads: list[str] = []
    for row in describe_rankings(entries)[:2]:
        heads += row
    return [note for head, note in NOTES.items() if head in heads]
