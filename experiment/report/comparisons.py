"""What masks cost more than their controls, whether scores find what matters, what is left where only TopK is kept.

Figures of questions go by their ids, so that only questions that two rounds have in common are compared. Knows nothing
of models.
"""

from __future__ import annotations

import collections
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Float

from experiment.records.entries import Agreement, Estimate, Excess
from experiment.records.schema import RankedLatents, Record
from experiment.report import estimates

EXCESS = ("em", "f1", "named", "answer_log_prob")  # the metrics of an Excess
# In nats per token. Where keeping nothing costs less than this, a share of what it costs says nothing.
LEAST_LOSS = 0.1

PerQuestion = dict[str, float]
"""{question id: a value}; NaN where it does not count."""
Scores = dict[str, PerQuestion]
"""{metric: the questions' scores}: shares from 0 to 1, log probabilities in nats per token."""
Contexts = Mapping[str, Hashable]
"""{question id: a key of its context}"""
Key = TypeVar("Key", bound=Hashable)


def find_scores(records: Sequence[Record], ranked: Sequence[RankedLatents]) -> Scores:
    """The scores of a round's records. ranked: of the same questions; they say where the answers' tokens stand."""
    ids = [record.id for record in records]
    columns = estimates.collect_columns(records, ranked)
    scores: Scores = {}
    for metric, column in columns.items():
        scores[metric] = dict(zip(ids, column))
    return scores


def average_draws(draws: Sequence[Scores]) -> Scores:
    """The mean over several draws within each question, of the questions and metrics that all of them have."""
    first, *others = draws
    averaged: Scores = {}
    for metric in first:
        if any(metric not in other for other in others):
            continue
        averaged[metric] = {}
        for question_id in first[metric]:
            if any(question_id not in other[metric] for other in others):
                continue
            values = [draw[metric][question_id] for draw in draws]
            averaged[metric][question_id] = sum(values) / len(values)
    return averaged


# ---------------------------------------------------------------------------------------------------------------------
# Over a control


def measure_excesses(pairs: Mapping[Key, tuple[Scores, Scores]], contexts: Contexts) -> dict[Key, Excess]:
    """What each mask costs more than its control, on the questions that both have.

    pairs: the scores of the answers under a mask, and under its control; without a question that both have, there is no
    Excess.
    The drop under a mask is the unmasked score minus the masked one, so of the difference of two drops the control's
    score minus the mask's is left.
    """
    pairs_on: dict[tuple[str, ...], list[Key]] = collections.defaultdict(list)  # by the questions they are of
    for key, (mask, control) in pairs.items():
        both = tuple(question_id for question_id in mask["em"] if question_id in control["em"])
        pairs_on[both].append(key)
    excesses = {}
    for ids, keys in pairs_on.items():
        if not ids:
            continue
        tables = []
        for key in keys:
            mask, control = pairs[key]
            tables.append(_subtract(control, mask, ids))
        figures = estimates.summarize_each(tables, [contexts[question_id] for question_id in ids])
        for key, of_pair in zip(keys, figures):
            excesses[key] = Excess.model_validate(of_pair.fields())
    return excesses


def _subtract(one: Scores, two: Scores, ids: Sequence[str]) -> dict[str, list[float]]:
    """The metrics of EXCESS that both have: one minus two, of these questions."""
    columns = {}
    for metric in EXCESS:
        if metric in one and metric in two:
            columns[metric] = [one[metric][question_id] - two[metric][question_id] for question_id in ids]
    return columns


# ---------------------------------------------------------------------------------------------------------------------
# Does a score find what matters?


@dataclass(frozen=True)
class Effects:
    """What masking each latent of a question alone does, beside a ranking's scores: lists with an item per latent that
    was measured, in the order of their ids.

    effects: in nats per token of the answer.  k: K = 50% of the latents active at the last position.
    """

    scores: list[float]
    effects: list[float]
    k: int


def measure_agreement(
    measured: Mapping[str, Effects], unmeasured: Sequence[int], contexts: Contexts
) -> Agreement | None:
    """How well a ranking's scores tell which latents matter; None where there is no question with effects.

    measured: by question id.  unmeasured: active latents without an effect, of each question.
    A question in which all scores, or all effects, are equal says nothing of that and does not count; nor does one
    without a positive effect for the share of these.
    """
    if not measured:
        return None
    columns: dict[str, PerQuestion] = {"spearman": {}, "share": {}, "found": {}}
    for question_id, of_question in measured.items():
        for name, value in compare_with_effects(of_question).items():
            columns[name][question_id] = value
    found = estimate_each(columns, contexts)
    mean = float(np.mean(unmeasured)) if unmeasured else None
    return Agreement(spearman=found["spearman"], share=found["share"], found=found["found"], unmeasured=mean)


def compare_with_effects(question: Effects) -> dict[str, float]:
    """The figures of an Agreement for one question; NaN where they are not defined."""
    nothing = {"spearman": np.nan, "share": np.nan, "found": np.nan}
    scores = np.array(question.scores)
    effects = np.array(question.effects)
    if len(set(question.scores)) < 2 or len(set(question.effects)) < 2:
        return nothing
    figures = nothing | {"spearman": correlate_ranks(scores, effects)}
    own = _find_top(scores, question.k)
    most = _find_top(effects, question.k)
    positive = effects.clip(min=0)
    if positive.sum() > 0:
        figures["share"] = float(positive[own].sum() / positive.sum())
    if most:
        figures["found"] = len({*own} & {*most}) / len(most)
    return figures


def correlate_ranks(one: Float[np.ndarray, " item"], two: Float[np.ndarray, " item"]) -> float:
    """Spearman's correlation: Pearson's of the ranks, equal values sharing the mean of theirs."""
    return float(np.corrcoef(_rank(one), _rank(two))[0, 1])


def _rank(values: Float[np.ndarray, " item"]) -> Float[np.ndarray, " item"]:
    """Each value's rank from 1 on, that of the lowest."""
    _, number, counts = np.unique(values, return_inverse=True, return_counts=True)
    last_ranks = counts.cumsum()
    mean_ranks = last_ranks - (counts - 1) / 2
    return mean_ranks[number]


def _find_top(values: Float[np.ndarray, " item"], k: int) -> list[int]:
    """The places of the k highest values, none of which is 0; of equal ones the first: as rankings make their TopK."""
    descending = np.argsort(-values, kind="stable")
    nonzero = [place for place in descending.tolist() if values[place] != 0]
    return nonzero[:k]


# ---------------------------------------------------------------------------------------------------------------------
# What is left where only TopK is kept


def measure_recovery(reached: PerQuestion, none: PerQuestion, full: PerQuestion) -> PerQuestion:
    """(reached - none) / (full - none) of each question that has all three; NaN where full - none <= LEAST_LOSS.

    All are log probabilities of the unmasked answer's tokens.  none: with every latent masked.  full: with none masked.
    reached: with only TopK kept, for faithfulness; with TopK masked, for completeness.
    """
    recovered = {}
    for question_id, value in reached.items():
        if question_id not in none or question_id not in full:
            continue
        loss = full[question_id] - none[question_id]
        is_enough = loss > LEAST_LOSS
        recovered[question_id] = (value - none[question_id]) / loss if is_enough else float("nan")
    return recovered


def area_over_log_k(recovered: Mapping[float, PerQuestion]) -> PerQuestion:
    """The mean height of each question's curve over log K: the area by trapezoids, over the width.

    recovered: {mean K: what its mask recovers}; K = 0 is left out, for it has no logarithm.  Only questions that have
    every K; none where there are less than two K.
    """
    ks = sorted(k for k in recovered if k > 0)
    if len(ks) < 2:
        return {}
    places = np.log(ks)
    areas = {}
    for question_id in recovered[ks[0]]:
        if all(question_id in recovered[k] for k in ks):
            heights = [recovered[k][question_id] for k in ks]
            areas[question_id] = float(np.trapezoid(heights, places) / (places[-1] - places[0]))
    return areas


# ---------------------------------------------------------------------------------------------------------------------
# Means with intervals


def estimate_each(columns: Mapping[Key, PerQuestion], contexts: Contexts) -> dict[Key, Estimate]:
    """Each column's mean over the questions that count in it, with its interval over their contexts."""
    ids: dict[str, None] = {}
    for column in columns.values():
        ids.update(dict.fromkeys(column))
    values = np.full((len(ids), len(columns)), np.nan)
    for number, column in enumerate(columns.values()):
        for row, question_id in enumerate(ids):
            values[row, number] = column.get(question_id, np.nan)
    of_contexts = [contexts[question_id] for question_id in ids]
    intervals = estimates.bootstrap(values, of_contexts)
    found = {}
    for number, key in enumerate(columns):
        found[key] = _make_estimate(values[:, number], intervals[:, number])
    return found


def _make_estimate(values: Float[np.ndarray, " question"], interval: Float[np.ndarray, " bound"]) -> Estimate:
    counted = values[~np.isnan(values)]
    low, high = [None if np.isnan(bound) else float(bound) for bound in interval]
    mean = float(counted.mean()) if len(counted) else None
    return Estimate(mean=mean, low=low, high=high, n=len(counted))
