"""Means with their 95% intervals, drops between paired answers, statistics of rankings. Knows nothing of models."""

import collections

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
        columns |= {"answer_log_prob": [], "format_log_prob": []}
        for record, sample in zip(records, samples):
            parts = [], []
            for place, value in enumerate(record["log_probs"]):
                parts[place not in sample["inside"]].append(value)
            for name, values in zip(("answer_log_prob", "format_log_prob"), parts):
                columns[name].append(sum(values) / len(values) if values else float("nan"))
    return columns


def bootstrap(columns, contexts, resamples=10_000, seed=0):
    """95% percentile intervals of the columns' means over resampled contexts: [2, column], low and high.

    columns: [question, column]; a question that is NaN in a column does not count there.
    contexts: a key for each question. Questions on one context are not independent, so contexts are drawn, with all
    their questions (a cluster bootstrap: Davison & Hinkley 1997, section 3.8). All columns see the same draws.
    NaN stands for a column in which no question counts. A draw in which none counts is left out of that column.
    """
    columns = np.asarray(columns, dtype=float)
    counted = ~np.isnan(columns)
    _, group = np.unique(np.asarray(contexts), return_inverse=True)  # [question] -> number of its context
    groups = group.max() + 1
    sums, sizes = np.zeros((2, groups, columns.shape[1]))  # [context, column] each
    np.add.at(sums, group, np.where(counted, columns, 0))
    np.add.at(sizes, group, counted)
    rng = np.random.default_rng(seed)
    means, part = [], max(1, 1_000_000 // groups)  # in parts: [resamples, contexts] need not fit in memory
    for start in range(0, resamples, part):
        times = rng.multinomial(groups, np.full(groups, 1 / groups), size=min(part, resamples - start))
        with np.errstate(invalid="ignore"):  # 0 / 0 where no question counts
            means.append((times @ sums) / (times @ sizes))
    intervals = np.full((2, columns.shape[1]), np.nan)
    some = counted.any(0)  # of nothing but NaN, nanpercentile would warn
    intervals[:, some] = np.nanpercentile(np.concatenate(means)[:, some], [2.5, 97.5], axis=0)
    return intervals


def summarize(columns, contexts):
    """n, each column's mean and its interval, in the units of METRICS.

    columns: {metric: a score for each question}; NaN or None where it does not count.  contexts: a key for each.
    Returns {"n", metric: mean, ..., "intervals": {metric: [low, high], ...}}, None for a metric that counts nowhere,
    and "counted": {metric: questions} of the metrics that do not count for all.
    """
    return _summarize_each([columns], contexts)[0]


def compare(unmasked, masked, contexts):
    """What masking does to the same questions: their scores after it, before it ("clean"), and the paired drops.

    unmasked, masked: {metric: a score for each question}, the questions in the same order.  contexts: a key for each.
    Returns the summary of masked | {"clean": summary of unmasked, "drop": summary of unmasked - masked}. Those of
    DROP_ONLY are in the drop alone.
    """
    drops = {
        metric: np.asarray(unmasked[metric], dtype=float) - np.asarray(masked[metric], dtype=float)
        for metric in masked
        if metric in unmasked
    }
    levels = [{m: c for m, c in columns.items() if m not in DROP_ONLY} for columns in (masked, unmasked)]
    after, before, drop = _summarize_each([*levels, drops], contexts)
    return after | {"clean": before, "drop": drop}


def _summarize_each(tables, contexts):
    """`summarize` of each, with one bootstrap for all: to draw the contexts is what takes time."""
    n = len(contexts)
    summaries = [{"n": n} | dict.fromkeys(columns) | {"intervals": dict.fromkeys(columns)} for columns in tables]
    places = [(summary, metric) for summary, columns in zip(summaries, tables) for metric in columns]
    scores = [np.asarray(column, dtype=float) for columns in tables for column in columns.values()]
    intervals = bootstrap(np.stack(scores, axis=1), contexts).T if n and scores else []
    for (summary, metric), column, interval in zip(places, scores, intervals):
        counted = column[~np.isnan(column)]
        if len(counted):
            summary[metric] = float(METRICS[metric] * counted.mean())
            summary["intervals"][metric] = (METRICS[metric] * interval).tolist()
        if len(counted) < n:
            summary.setdefault("counted", {})[metric] = len(counted)
    return summaries


def shared_percent(a, b):
    """How many latents two lists have in common, in percent of their mean length (0 where both are empty)."""
    length = len(a) + len(b)
    return 200 * len(np.intersect1d(a, b)) / length if length else 0.0


def latent_statistics(samples, contexts):
    """The paper's table 3 for one ranking, at K = 50%.

    Latents active at the last position and K, means over questions; what TopK and BottomK of two questions on one
    context share, in percent of their mean length, pooled over all such pairs; and the 10 latents in most TopKs.

    samples: dicts with active, topk, bottomk.  contexts: a key for each.
    """
    counts, by_context = collections.Counter(), collections.defaultdict(list)
    for sample, context in zip(samples, contexts):
        by_context[context].append(sample)
        counts.update(_at_half(sample, "topk"))
    shared, possible = dict.fromkeys(MASKS, 0), dict.fromkeys(MASKS, 0)
    for group in by_context.values():
        for name in MASKS:
            # A latent that n lists have is shared by n (n - 1) / 2 pairs.
            _, times = np.unique(np.concatenate([_at_half(sample, name) for sample in group]), return_counts=True)
            shared[name] += (times * (times - 1) / 2).sum()
            possible[name] += (len(group) - 1) * times.sum() / 2
    active = [len(sample["active"]) for group in by_context.values() for sample in group]
    return {
        "n": len(active),
        "active": _mean(active),
        "k_at_50%": _mean([number // 2 for number in active]),
        "same_context_percent": {
            name: float(100 * shared[name] / possible[name]) if possible[name] else None for name in MASKS
        },
        "most_frequent_topk": [
            {"latent": latent, "questions": count}
            for latent, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:10]
        ],
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


def _at_half(sample, name):
    """The part of a stored list that K = 50% masks: the lists themselves may be longer."""
    return sample[name][: len(sample["active"]) // 2]


def _mean(values):
    return float(np.mean(values)) if values else None
