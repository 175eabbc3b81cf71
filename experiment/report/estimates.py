"""Means with their 95% intervals, drops between paired answers, statistics of rankings. Knows nothing of models."""

import collections
import warnings

import numpy as np

# What one question's score is multiplied by in results: shares of questions become percent, log probabilities stay in
# nats a token.
METRICS = {"em": 100, "f1": 100, "accuracy": 100, "named": 100, "answer_log_prob": 1, "format_log_prob": 1}
# How likely the unmasked answer is differs from text to text: by itself it says little, only its drop is reported.
DROP_ONLY = ("answer_log_prob", "format_log_prob")
MASKS = {"topk": "TopK", "bottomk": "BottomK"}


def collect_columns(records, samples):
    """{metric: a score for each question}; of log probabilities the mean over the answer's tokens, and the others'."""
    columns = {metric: [record[metric] for record in records] for metric in ("em", "f1", "accuracy", "named")}
    if all("log_probs" in record for record in records) and all("inside" in sample for sample in samples):
        columns |= {name: [] for name in DROP_ONLY}
        for record, sample in zip(records, samples):
            parts = [], []
            for place, value in enumerate(record["log_probs"]):
                parts[place not in sample["inside"]].append(value)
            for name, part in zip(DROP_ONLY, parts):
                columns[name].append(sum(part) / len(part) if part else float("nan"))
    return columns


def bootstrap(columns, contexts, resamples=10_000, seed=0):
    """95% percentile intervals of the columns' means over resampled contexts: [2, column], low and high.

    columns: [question, column]; a question that is NaN in a column does not count there.
    contexts: a key for each question. Questions on one context are not independent, so contexts are drawn, with all
    their questions (a cluster bootstrap: Davison & Hinkley 1997, section 3.8). All columns see the same draws.
    NaN stands for a column in which the questions of less than two contexts count: what other contexts would give, one
    does not say. A draw in which none counts is left out of that column.
    resamples: a multiple of 100.
    """
    columns = np.asarray(columns, dtype=float)
    counted = ~np.isnan(columns)
    keys, group = np.unique(contexts, return_inverse=True)  # [context]; [question] -> number of its context
    groups = max(1, len(keys))  # without any question, one context of none
    sums, sizes = np.zeros((2, groups, columns.shape[1]))  # [context, column] each
    np.add.at(sums, group, np.where(counted, columns, 0))
    np.add.at(sizes, group, counted)
    rng, means = np.random.default_rng(seed), []
    with warnings.catch_warnings(action="ignore"):  # 0 / 0 where no question counts, in a draw or in all
        for _ in range(resamples // 100):  # in parts: [resamples, contexts] need not fit in memory
            times = rng.multinomial(groups, np.full(groups, 1 / groups), size=100)  # [draw, context]
            means.append((times @ sums) / (times @ sizes))
        intervals = np.nanpercentile(np.concatenate(means), [2.5, 97.5], axis=0)
    contexts_that_count = (sizes > 0).sum(0)  # [column]
    return np.where(contexts_that_count > 1, intervals, np.nan)


def summarize(columns, contexts):
    """n, each column's mean and its interval, in the units of METRICS.

    columns: {metric: a score for each question}; NaN or None where it does not count.  contexts: a key for each.
    Returns {"n", metric: mean, ..., "intervals": {metric: [low, high], ...}}, None for a metric that counts nowhere
    and for an interval over less than two contexts, and "counted": {metric: questions} of the metrics that do not count
    for all.
    """
    return _summarize_each([columns], contexts)[0]


def compare(unmasked, masked, contexts):
    """What masking does to the same questions: their scores after it, before it ("clean"), and the paired drops.

    unmasked, masked: {metric: a score for each question}, the questions in the same order.  contexts: a key for each.
    Returns the summary of masked | {"clean": summary of unmasked, "drop": summary of unmasked - masked}. Those of
    DROP_ONLY are in the drop alone.
    """
    both = [metric for metric in masked if metric in unmasked]
    drops = {m: np.asarray(unmasked[m], dtype=float) - np.asarray(masked[m], dtype=float) for m in both}
    levels = [{m: c for m, c in columns.items() if m not in DROP_ONLY} for columns in (masked, unmasked)]
    after, before, drop = _summarize_each([*levels, drops], contexts)
    return after | {"clean": before, "drop": drop}


def _summarize_each(tables, contexts):
    """`summarize` of each, with one bootstrap for all: to draw the contexts is what takes time."""
    tables = [{m: METRICS[m] * np.asarray(c, dtype=float) for m, c in columns.items()} for columns in tables]
    scores = [column for columns in tables for column in columns.values()]
    intervals = iter(bootstrap(np.stack(scores, axis=1), contexts).T.tolist())
    summaries, n = [], len(contexts)
    for columns in tables:
        summary = {"n": n} | dict.fromkeys(columns) | {"intervals": dict.fromkeys(columns)}
        for (metric, column), interval in zip(columns.items(), intervals):
            counted = column[~np.isnan(column)]
            summary[metric] = _mean(counted)
            if not np.isnan(interval).any():
                summary["intervals"][metric] = interval
            if len(counted) < n:
                summary.setdefault("counted", {})[metric] = len(counted)
        summaries.append(summary)
    return summaries


def latent_statistics(samples, contexts):
    """The paper's table 3 for one ranking, at K = 50%.

    Latents active at the last position and K, means over questions; what TopK and BottomK of two questions on one
    context share, in percent of their mean length, pooled over all such pairs; and the 10 latents in most TopKs.

    samples: dicts with active, topk, bottomk.  contexts: a key for each.
    """
    questions, same_context = collections.Counter(contexts), {}
    for name in MASKS:
        lists = [(context, _at_half(sample, name)) for context, sample in zip(contexts, samples)]
        times = collections.Counter((context, latent) for context, latents in lists for latent in latents)
        # Ordered pairs of questions: a latent that n lists on a context have is shared by n (n - 1) of them.
        shared = sum(n * (n - 1) for n in times.values())
        possible = sum((questions[context] - 1) * len(latents) for context, latents in lists)
        same_context[name] = 100 * shared / possible if possible else None
    counts = collections.Counter(latent for sample in samples for latent in _at_half(sample, "topk"))
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:10]
    active = [len(sample["active"]) for sample in samples]
    return {
        "n": len(active),
        "active": _mean(active),
        "k_at_50%": _mean([number // 2 for number in active]),
        "same_context_percent": same_context,
        "most_frequent_topk": [{"latent": latent, "questions": count} for latent, count in most],
    }


def ranking_overlap(samples, others):
    """What TopK and BottomK of two rankings share at K = 50%, mean percent over the questions that both have.

    samples, others: dicts with id, active, topk, bottomk.
    """
    by_id = {other["id"]: other for other in others}
    both = [(sample, by_id[sample["id"]]) for sample in samples if sample["id"] in by_id]
    return {"n": len(both)} | {
        name: _mean([shared_percent(_at_half(one, name), _at_half(other, name)) for one, other in both])
        for name in MASKS
    }


def shared_percent(a, b):
    """How many latents two lists have in common, in percent of their mean length (0 where both are empty)."""
    return 200 * len({*a} & {*b}) / max(1, len(a) + len(b))


def _at_half(sample, name):
    """The part of a stored list that K = 50% masks: the lists themselves may be longer."""
    return sample[name][: len(sample["active"]) // 2]


def _mean(values):
    return float(np.mean(values)) if len(values) else None
