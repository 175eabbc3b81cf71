"""Means with their 95% intervals, drops between paired answers, statistics of rankings. Knows nothing of models."""

from __future__ import annotations

import collections
import math
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from experiment.masks import SIDES, Side
from experiment.records.entries import LOG_PROBS, CommonLatent, Figures, LatentStatistics, SharedPercent
from experiment.records.schema import SCORES, KeptRecord, RankedLatents, RankedQuestion, Record

# What one question's score is multiplied by in results: shares of questions become percent, log probabilities stay in
# nats per token.
METRICS = dict.fromkeys(SCORES, 100) | dict.fromkeys(LOG_PROBS, 1)
# How likely the unmasked answer is differs from text to text: by itself it says little, only its drop is reported.
DROP_ONLY = LOG_PROBS
MASKS: dict[Side, str] = {"topk": "TopK", "bottomk": "BottomK"}
RESAMPLES_AT_ONCE = 100  # [resamples, contexts] need not fit in memory

Columns = dict[str, list[float]]
"""{metric: a score for each question}; NaN where it does not count."""


def collect_scores(records: Sequence[Record | RankedQuestion]) -> Columns:
    """The columns of the scores. NaN: a file is older than the metric."""
    columns: Columns = {}
    for metric in SCORES:
        columns[metric] = []
        for record in records:
            score = getattr(record, metric)
            columns[metric].append(math.nan if score is None else score)
    return columns


def collect_columns(records: Sequence[Record | RankedQuestion], ranked: Sequence[RankedLatents]) -> Columns:
    """Columns of scores, and where all is there for it, of log probabilities: means over the tokens of the unmasked
    answer that stand inside its brackets, and over the others.

    ranked: of the same questions; they say which tokens stand where.
    """
    columns = collect_scores(records)
    if any(record.log_probs is None for record in records) or any(question.inside is None for question in ranked):
        return columns
    for name in DROP_ONLY:
        columns[name] = []
    for record, question in zip(records, ranked):
        assert record.log_probs is not None and question.inside is not None  # looked at above, of all of them
        inside: list[float] = []
        outside: list[float] = []
        for position, value in enumerate(record.log_probs):
            part = inside if position in question.inside else outside
            part.append(value)
        columns["answer_log_prob"].append(_mean_or_nan(inside))
        columns["format_log_prob"].append(_mean_or_nan(outside))
    return columns


def _mean_or_nan(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def bootstrap(
    columns: ArrayLike, contexts: Sequence[Hashable], resamples: int = 10_000, seed: int = 0
) -> Float[np.ndarray, "2 column"]:
    """95% percentile intervals of the columns' means over resampled contexts: low and high.

    columns: [question, column]; a question that is NaN in a column does not count there.
    contexts: a key for each question. Questions on one context are not independent, so contexts are drawn, with all
    their questions (a cluster bootstrap: Davison & Hinkley 1997, section 3.8). All columns see the same draws.
    NaN stands for a column in which the questions of less than two contexts count: what other contexts would give, one
    does not say. A draw in which none counts is left out of that column.
    resamples: a multiple of 100.
    """
    columns = np.asarray(columns, dtype=float)
    is_counted = ~np.isnan(columns)
    keys, group = np.unique(np.asarray(contexts), return_inverse=True)  # [context]; [question] -> number of its context
    groups = max(1, len(keys))  # without any question, one context of none
    sums = np.zeros((groups, columns.shape[1]))  # [context, column]
    sizes = np.zeros_like(sums)
    np.add.at(sums, group, np.where(is_counted, columns, 0))
    np.add.at(sizes, group, is_counted)
    rng = np.random.default_rng(seed)
    share = np.full(groups, 1 / groups)
    means = []
    with warnings.catch_warnings(action="ignore"):  # 0 / 0 where no question counts, in a draw or in all
        for _ in range(resamples // RESAMPLES_AT_ONCE):
            times = rng.multinomial(groups, share, size=RESAMPLES_AT_ONCE)  # [draw, context]
            means.append((times @ sums) / (times @ sizes))
        intervals = np.nanpercentile(np.concatenate(means), [2.5, 97.5], axis=0)
    contexts_that_count = (sizes > 0).sum(0)  # [column]
    return np.where(contexts_that_count > 1, intervals, np.nan)


def summarize(columns: Mapping[str, ArrayLike], contexts: Sequence[Hashable]) -> Figures:
    """Each column's mean and its interval, in the units of METRICS.

    columns: {metric: a score for each question}; NaN or None where it does not count.  contexts: a key for each. A
    metric that counts nowhere is None, as is an interval over less than two contexts.
    """
    (figures,) = summarize_each([columns], contexts)
    return figures


def compare(
    unmasked: Mapping[str, ArrayLike], masked: Mapping[str, ArrayLike], contexts: Sequence[Hashable]
) -> tuple[Figures, Figures, Figures]:
    """What masking does to the same questions: figures of their unmasked scores, of the masked ones, and of the paired
    drops (unmasked - masked).

    unmasked, masked: {metric: a score for each question}, the questions in the same order.  contexts: a key for each.
    Those of DROP_ONLY are in the drop alone.
    """
    drops = {}
    for metric, column in masked.items():
        if metric in unmasked:
            drops[metric] = np.asarray(unmasked[metric], dtype=float) - np.asarray(column, dtype=float)
    tables = [_leave_levels(unmasked), _leave_levels(masked), drops]
    of_unmasked, of_masked, of_drops = summarize_each(tables, contexts)
    return of_unmasked, of_masked, of_drops


def _leave_levels(columns: Mapping[str, ArrayLike]) -> dict[str, ArrayLike]:
    """The columns that are reported by themselves."""
    return {metric: column for metric, column in columns.items() if metric not in DROP_ONLY}


def summarize_each(tables: Sequence[Mapping[str, ArrayLike]], contexts: Sequence[Hashable]) -> list[Figures]:
    """`summarize` of each, with one bootstrap for all: to draw the contexts is what takes time."""
    scaled: list[np.ndarray] = []
    for columns in tables:
        for metric, column in columns.items():
            scaled.append(METRICS[metric] * np.asarray(column, dtype=float))
    intervals = bootstrap(np.stack(scaled, axis=1), contexts).T.tolist()
    summaries = []
    first = 0
    for columns in tables:
        last = first + len(columns)
        summaries.append(_summarize_one(len(contexts), list(columns), scaled[first:last], intervals[first:last]))
        first = last
    return summaries


def _summarize_one(
    n: int, metrics: list[str], columns: list[Float[np.ndarray, " question"]], intervals: list[list[float]]
) -> Figures:
    """The figures of columns over n questions, in the units of METRICS, with their intervals, which may be NaN."""
    means: dict[str, float | None] = {}
    bounds: dict[str, list[float] | None] = {}
    counted: dict[str, int] = {}
    for metric, column, interval in zip(metrics, columns, intervals):
        values = column[~np.isnan(column)]
        means[metric] = _mean(values)
        bounds[metric] = None if np.isnan(interval).any() else interval
        if len(values) < n:
            counted[metric] = len(values)
    figures = Figures.model_validate({"n": n, **means, "intervals": bounds})
    return figures.with_fields(counted=counted) if counted else figures


def latent_statistics(ranked: Sequence[RankedLatents], contexts: Sequence[Hashable]) -> LatentStatistics:
    """The paper's table 3 for one ranking, at K = 50%.

    Latents active at the last position and K, means over questions; what TopK and BottomK of two questions share, in
    percent of their mean length, pooled over all pairs on one context, and over all pairs on different ones; how many
    latents are in any TopK, and the 10 in most of them.

    contexts: a key for each question.
    """
    same_context = {}
    other_context = {}
    for side in SIDES:
        shared, possible = _count_shared(ranked, contexts, side)
        shared_by_any, possible_by_any = _count_shared(ranked, [""] * len(ranked), side)
        same_context[side] = _percent(shared, possible)
        other_context[side] = _percent(shared_by_any - shared, possible_by_any - possible)
    counts: collections.Counter[int] = collections.Counter()
    for question in ranked:
        counts.update(_at_half(question, "topk"))
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:10]
    active = [len(question.active) for question in ranked]
    fields = {
        "n": len(active),
        "active": _mean(active),
        "k_at_50%": _mean([number // 2 for number in active]),
        "same_context_percent": SharedPercent.model_validate(same_context),
        "other_context_percent": SharedPercent.model_validate(other_context),
        "union_topk": len(counts),
        "most_frequent_topk": [CommonLatent(latent=latent, questions=count) for latent, count in most],
    }
    return LatentStatistics.model_validate(fields)


def _count_shared(ranked: Sequence[RankedLatents], contexts: Sequence[Hashable], side: Side) -> tuple[int, int]:
    """How many latents the lists of two questions on one context have in common, over all such pairs, and how many they
    would if their lists were the same. Both are counted from either side."""
    questions = collections.Counter(contexts)
    lists_with: collections.Counter[tuple[Hashable, int]] = collections.Counter()  # (context, latent): how many
    shared = 0
    possible = 0
    for context, question in zip(contexts, ranked):
        latents = _at_half(question, side)
        possible += len(latents) * (questions[context] - 1)
        for latent in latents:
            shared += 2 * lists_with[context, latent]  # with each list before, counted from both sides
            lists_with[context, latent] += 1
    return shared, possible


def _percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None


def ranking_overlap(
    ranked: Iterable[RankedQuestion | KeptRecord], others: Iterable[RankedQuestion | KeptRecord]
) -> SharedPercent:
    """What TopK and BottomK of two rankings share at K = 50%, mean percent over the questions that both have."""
    by_id = {other.id: other for other in others}
    shared: dict[Side, list[float]] = {side: [] for side in SIDES}
    for question in ranked:
        other = by_id.get(question.id)
        if other is None:
            continue
        for side in SIDES:
            shared[side].append(shared_percent(_at_half(question, side), _at_half(other, side)))
    return SharedPercent(n=len(shared["topk"]), topk=_mean(shared["topk"]), bottomk=_mean(shared["bottomk"]))


def shared_percent(a: list[int], b: list[int]) -> float:
    """How many latents two lists have in common, in percent of their mean length (0 where both are empty)."""
    return 200 * len({*a} & {*b}) / max(1, len(a) + len(b))


def _at_half(question: RankedLatents, side: Side) -> list[int]:
    """The part of a stored list that K = 50% masks: the lists themselves may be longer."""
    return question.latents(side)[: len(question.active) // 2]


def _mean(values: Sequence[float] | np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None
