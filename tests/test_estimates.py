"""Means, intervals and statistics of rankings: against SciPy, by simulation, and on cases worked out by hand."""

import math

import numpy as np
import pytest
import scipy.stats

from experiment.records.schema import RankedQuestion
from experiment.report import comparisons, estimates

NAN = math.nan


def draw_contexts(rng, contexts, share=0.7):
    """As many questions a context as SQuAD has, each context with a difficulty of its own.

    Returns each context's share of right answers, mean `share`, and each question's context.
    """
    sizes = rng.integers(1, 10, contexts)
    return rng.beta(2 * share, 2 * (1 - share), contexts), np.repeat(np.arange(contexts), sizes)


def draw_answers(rng, contexts):
    """Right or wrong answers, 0.7 right in the long run, and their contexts."""
    shares, keys = draw_contexts(rng, contexts)
    return (rng.random(len(keys)) < shares[keys]).astype(float), keys


def count_covered(intervals, truth):
    return np.mean([low <= truth <= high for low, high in intervals])


# ---------------------------------------------------------------------------------------------------------------------
# Intervals


def test_intervals_agree_with_scipy():
    values, keys = draw_answers(np.random.default_rng(5), 150)
    low, high = estimates.bootstrap(values[:, None], keys)[:, 0]
    sums, sizes = (np.bincount(keys, weights) for weights in (values, np.ones_like(values)))
    theirs = scipy.stats.bootstrap(
        (sums, sizes),
        lambda s, n, axis: s.sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=10_000,
        rng=1,
    ).confidence_interval
    width = theirs.high - theirs.low
    assert abs(low - theirs.low) < 0.04 * width and abs(high - theirs.high) < 0.04 * width


def test_intervals_stay_as_they_were():
    """The draws are those of the first version: published intervals do not move."""
    questions = np.arange(40)
    columns = np.stack([questions * 7 % 10 < 7, questions / 40], axis=1)
    expected = [[0.6666666666666666, 0.3410714285714286], [0.7619047619047619, 0.6375]]
    assert estimates.bootstrap(columns, questions // 3) == pytest.approx(np.array(expected), abs=1e-12)


def test_columns_do_not_disturb_each_other():
    """A column with NaN, or of nothing but NaN, beside one without: all have the intervals they have by themselves."""
    values, keys = draw_answers(np.random.default_rng(8), 40)
    some = np.where(np.arange(len(values)) % 3 == 0, NAN, values)
    together = estimates.bootstrap(np.stack([values, some, values * NAN], axis=1), keys, 500)
    for column, scores in enumerate((values, some)):
        assert together[:, column] == pytest.approx(estimates.bootstrap(scores[:, None], keys, 500)[:, 0], abs=1e-12)
    assert np.isnan(together[:, 2]).all()
    assert not np.allclose(together[:, 1], together[:, 0])


def test_questions_that_do_not_count():
    """Contexts without any question that counts are as if they were not there, but for their part in the draws."""
    rng = np.random.default_rng(9)
    values, keys = draw_answers(rng, 60)
    values[keys >= 40] = NAN
    low, high = estimates.bootstrap(values[:, None], keys, 20_000)[:, 0]
    counted = keys < 40
    alone = estimates.bootstrap(values[counted, None], keys[counted], 20_000)[:, 0]
    assert [low, high] == pytest.approx(alone, abs=0.03)
    # Two contexts of four count: some of the draws have none of them, and say nothing.
    assert estimates.bootstrap([[1.0], [1.0], [NAN], [NAN]], [0, 1, 2, 3], 200)[:, 0].tolist() == [1, 1]


def test_one_context_has_no_interval():
    """What others would give, one context does not say; a width of 0 would say that it is known."""
    columns = np.array([[1.0, 1.0], [0.0, NAN], [1.0, NAN]])
    assert np.isnan(estimates.bootstrap(columns, ["x", "x", "x"])).all()
    low, high = estimates.bootstrap(columns, ["x", "y", "y"]).T.tolist()[0]
    assert 0.5 <= low < high <= 1
    assert np.isnan(estimates.bootstrap(columns, ["x", "y", "y"])[:, 1]).all()  # of two, one counts
    found = estimates.summarize({"em": [1, 0], "f1": [1, 0.5]}, ["x", "x"])
    assert (found.em, found.f1, found.intervals) == (50, 75, {"em": None, "f1": None})


def test_intervals_cover_the_truth():
    """Of 300 simulated data sets; intervals over questions instead of contexts cover it far less often."""
    rng, ours, naive = np.random.default_rng(6), [], []
    for _ in range(300):
        values, keys = draw_answers(rng, 60)
        ours.append(estimates.bootstrap(values[:, None], keys, resamples=300)[:, 0])
        naive.append(estimates.bootstrap(values[:, None], np.arange(len(values)), resamples=300)[:, 0])
    assert 0.91 <= count_covered(ours, 0.7) <= 0.98
    assert count_covered(naive, 0.7) < 0.85


def test_intervals_of_the_other_columns_cover_the_truth():
    """300 data sets: a drop in nats, as skewed as log probabilities are, and a column where hard questions are NaN."""
    rng, nats, percent = np.random.default_rng(16), [], []
    for _ in range(300):
        shares, keys = draw_contexts(rng, 60)
        before = -rng.exponential(0.2, len(keys))
        # Contexts differ by a factor with mean 1; the drop's mean is 0.5 nats.
        factor = rng.lognormal(-0.125, 0.5, len(shares))
        after = before - 0.5 * factor[keys] * rng.exponential(1, len(keys))
        named = np.where(rng.random(len(keys)) < shares[keys], 1.0, 0.0)
        named[rng.random(len(keys)) > 0.3 + 0.7 * shares[keys]] = NAN
        intervals = estimates.bootstrap(np.stack([before - after, named], axis=1), keys, resamples=300)
        nats.append(intervals[:, 0])
        percent.append(intervals[:, 1])
    assert 0.90 <= count_covered(nats, 0.5) <= 0.98
    # Right ones among those that count: E[s (0.3 + 0.7 s)] / E[0.3 + 0.7 s], with s from the beta distribution.
    right = (0.3 * 0.7 + 0.7 * (0.7**2 + 0.7 * 0.3 / 3)) / (0.3 + 0.7 * 0.7)
    assert 0.91 <= count_covered(percent, right) <= 0.98
    assert count_covered(percent, 0.7) < 0.8  # what it would be if all counted


# ---------------------------------------------------------------------------------------------------------------------
# Summaries


def test_summary_has_the_units_of_results():
    columns = {"em": [1, 0, 1, 1], "f1": [1, 0.5, 1, 1], "answer_log_prob": [-0.5, -1.5, -1, -1]}
    found = estimates.summarize(columns, ["x", "x", "y", "z"]).fields()
    assert {name: found[name] for name in ("n", *columns)} == {"n": 4, "em": 75, "f1": 87.5, "answer_log_prob": -1}
    low, high = found["intervals"]["em"]
    assert low < 75 < high == 100
    assert -1.5 <= found["intervals"]["answer_log_prob"][0] <= -1 <= found["intervals"]["answer_log_prob"][1] <= -0.5
    assert "counted" not in found and [*found["intervals"]] == [*columns]
    assert all(type(bound) is float for interval in found["intervals"].values() for bound in interval)  # for JSON


@pytest.mark.parametrize("missing", [NAN, None])
def test_summary_of_questions_that_do_not_count(missing):
    columns = {"em": [1, 0, 1, 1], "named": [1, missing, missing, 0], "accuracy": [missing] * 4}
    found = estimates.summarize(columns, ["x", "x", "y", "z"])
    assert (found.n, found.em, found.named, found.accuracy) == (4, 75, 50, None)
    assert found.intervals["accuracy"] is None and found.counted == {"named": 2, "accuracy": 0}


def test_summary_of_nothing():
    found = estimates.summarize({"em": [], "f1": []}, [])
    assert found.fields() == {"n": 0, "em": None, "f1": None, "intervals": {"em": None, "f1": None}}


def test_a_metric_that_older_files_lack():
    latents = {"active": [1], "topk": [1], "bottomk": [1]}
    scores = {"em": 1.0, "f1": 1.0, "accuracy": 1.0}
    older = RankedQuestion.model_validate({"id": "a", "answer": "", **latents, **scores})
    newer = RankedQuestion.model_validate({"id": "b", "answer": "", **latents, **scores, "named": 0.0})
    columns = estimates.collect_scores([older, newer])
    figures = estimates.summarize(columns, ["x", "y"])
    assert (figures.em, figures.named, figures.counted) == (100, 0, {"named": 1})
    assert math.isnan(columns["named"][0])  # not None, of which nothing can be taken away
    scores = comparisons.find_scores([older, newer], [older, newer])
    excess = comparisons.measure_excesses({"one": (scores, scores)}, {"a": "x", "b": "y"})["one"]
    assert (excess.em, excess.named, excess.counted) == (0, 0, {"named": 1})
    nowhere = estimates.summarize(estimates.collect_scores([older, older]), ["x", "y"])
    assert nowhere.em == 100 and nowhere.named is None


def test_paired_drops_are_narrower_than_their_parts():
    rng = np.random.default_rng(7)
    before, keys = draw_answers(rng, 200)
    after = before * (rng.random(len(before)) < 0.95)
    clean, found, drop = estimates.compare({"em": before, "f1": before}, {"em": after, "f1": after}, keys)

    def width(figures):
        low, high = figures.intervals["em"]
        return high - low

    assert drop.em == pytest.approx(clean.em - found.em)
    assert drop.em == pytest.approx(100 * (before - after).mean())
    assert width(drop) < 0.5 * width(found)
    assert found.n == clean.n == drop.n == len(keys)


def test_log_probabilities_are_compared_and_not_reported_by_themselves():
    unmasked = {"em": [1, 1], "answer_log_prob": [-0.1, -0.3], "format_log_prob": [-0.2, NAN]}
    masked = {"em": [1, 0], "answer_log_prob": [-0.6, -0.3], "format_log_prob": [-0.2, -0.4]}
    clean, found, drop = estimates.compare(unmasked, masked, ["x", "y"])
    assert "answer_log_prob" not in found.fields() and "answer_log_prob" not in clean.fields()
    assert drop.answer_log_prob == pytest.approx(0.25)  # less likely by so much: a positive drop
    assert drop.format_log_prob == 0 and drop.counted == {"format_log_prob": 1}
    assert (found.em, clean.em, drop.em) == (50, 100, 50)


def test_metrics_that_round_1_has_not_are_not_compared():
    clean, found, drop = estimates.compare({"em": [1, 1]}, {"em": [1, 0], "named": [1, 1]}, ["x", "y"])
    assert found.named == 100 and drop.named is None and clean.named is None


# ---------------------------------------------------------------------------------------------------------------------
# Rankings

RANKED = [
    RankedQuestion(id="a", answer="", active=[1, 2, 3, 4], topk=[1, 2], bottomk=[9, 8]),
    RankedQuestion(id="b", answer="", active=[1, 2, 3, 4, 5], topk=[2, 3], bottomk=[9, 8]),
    RankedQuestion(id="c", answer="", active=[1, 7], topk=[7], bottomk=[1]),
]


def on_one_context(ranked, contexts):
    return estimates.latent_statistics(ranked, contexts).fields()["same_context_percent"].fields()


def overlap(ranked, others):
    return estimates.ranking_overlap(ranked, others).fields()


def test_latent_statistics():
    found = estimates.latent_statistics(RANKED, ["x", "x", "y"])
    assert found.n == 3
    assert found.active == pytest.approx(11 / 3) and found.k_at_half == pytest.approx(5 / 3)
    assert on_one_context(RANKED, ["x", "x", "y"]) == {"topk": 50, "bottomk": 100}
    assert on_one_context(RANKED, ["x", "y", "z"])["topk"] is None
    # What questions on different contexts share does not count.
    wider = on_one_context([*RANKED, RANKED[0], RANKED[0]], ["x", "x", "y", "y", "z"])
    assert wider == {
        "topk": pytest.approx(100 * 1 / (2 + 1.5)),
        "bottomk": pytest.approx(100 * 2 / (2 + 1.5)),
    }
    # Three on one context: each pair's shared latents over each pair's mean length, pooled.
    pooled = on_one_context(RANKED, ["x"] * 3)
    assert pooled == {"topk": pytest.approx(100 * (1 + 0 + 0) / (2 + 1.5 + 1.5)), "bottomk": pytest.approx(40)}
    most = [latent.fields() for latent in found.most_frequent_topk]
    assert most[:2] == [{"latent": 2, "questions": 2}, {"latent": 1, "questions": 1}]


def test_latent_statistics_do_not_depend_on_the_order_of_questions():
    shuffled = estimates.latent_statistics([RANKED[i] for i in (0, 2, 1)], ["x", "y", "x"])
    assert shuffled == estimates.latent_statistics(RANKED, ["x", "x", "y"])


def test_statistics_are_of_half_the_active_latents_however_long_the_lists_are():
    longer = [q.with_fields(topk=[*q.topk, 50, 51], bottomk=[*q.bottomk, 60]) for q in RANKED]
    contexts = ["x", "x", "y"]
    assert estimates.latent_statistics(longer, contexts) == estimates.latent_statistics(RANKED, contexts)
    assert overlap(longer, RANKED) == {"n": 3, "topk": 100, "bottomk": 100}


def test_statistics_of_nothing():
    found = estimates.latent_statistics([], [])
    assert (found.n, found.active, found.most_frequent_topk) == (0, None, [])
    assert overlap(RANKED, []) == {"n": 0, "topk": None, "bottomk": None}


def test_ranking_overlap():
    others = [RANKED[0].with_fields(topk=[5, 1]), RANKED[2].with_fields(bottomk=[3])]
    assert overlap(RANKED, others) == {"n": 2, "topk": 75, "bottomk": 50}


@pytest.mark.parametrize(
    ("a", "b", "percent"),
    [([1, 2], [2, 3], 50), ([1], [1, 2, 3], 50), ([], [], 0), ([1], [], 0), ([4, 2], [2, 4], 100)],
)
def test_shared_percent(a, b, percent):
    assert estimates.shared_percent(a, b) == percent
