"""Excess over controls, agreement with effects, recovery: worked out by hand, against SciPy, and by simulation."""

import functools
import math

import numpy as np
import pytest
import scipy.stats
from test_estimates import count_covered, draw_contexts

from experiment.records.entries import parse_entry
from experiment.records.schema import RankedLatents, Record
from experiment.report import comparisons, estimates
from experiment.report.comparisons import Effects
from experiment.report.sentences import tell_finding

NAN = math.nan


def record(question_id, em, f1, log_probs, named=1.0):
    scores = {"em": em, "f1": f1, "accuracy": em, "named": named}
    return Record.model_validate({"id": question_id, "text": "", "answer": "", **scores, "log_probs": log_probs})


def ranked(inside):
    return RankedLatents(active=[1, 2], topk=[1], bottomk=[2], inside=inside)


# Two questions on one context, one on another; of the third no token stands inside the brackets.
CONTEXTS = {"a": "x", "b": "x", "c": "y", "d": "y"}
RANKED = {"a": ranked([1, 2]), "b": ranked([0]), "c": ranked([]), "d": ranked([0])}
MASK = [
    record("a", 0.0, 0.5, [-9.0, -1.0, -3.0], named=0.0),
    record("b", 1.0, 1.0, [-0.5, -9.0]),
    record("c", 0.0, 0.0, [-1.0]),
]
# A control's two draws; the second one lacks question c.
DRAWS = [
    [record("d", 0.0, 0.0, [-7.0]), record("c", 1.0, 1.0, [-0.1]), record("b", 1.0, 1.0, [-0.1, 0.0]),
     record("a", 1.0, 1.0, [0.0, -0.2, -0.2])],
    [record("a", 0.0, 0.0, [0.0, -0.4, -0.6]), record("b", 1.0, 0.5, [-0.3, 0.0]), record("d", 1.0, 1.0, [-7.0])],
]  # fmt: skip


def scores_of(records):
    return comparisons.find_scores(records, [RANKED[one.id] for one in records])


# ---------------------------------------------------------------------------------------------------------------------
# Over a control


def test_excess_by_hand():
    """Unmasked minus masked, minus the same of the control: the unmasked score is in both, whatever it is."""
    excess = comparisons.measure_excesses({"one": (scores_of(MASK), scores_of(DRAWS[0]))}, CONTEXTS)["one"]
    unmasked = {"em": 1.0, "f1": 1.0, "named": 1.0}
    for metric, expected in {"em": [1, 0, 1], "f1": [0.5, 0, 1], "named": [1, 0, 0]}.items():
        by_hand = []
        for one in MASK:
            (control,) = [other for other in DRAWS[0] if other.id == one.id]
            drop = unmasked[metric] - getattr(one, metric)
            by_hand.append(drop - (unmasked[metric] - getattr(control, metric)))
        assert by_hand == expected
        assert excess.mean_of(metric) == pytest.approx(100 * sum(expected) / 3)
    # In nats per token of the answer: a 2 - 0.2, b 0.5 - 0.1; c has no such token.
    assert excess.answer_log_prob == pytest.approx((1.8 + 0.4) / 2) and excess.counted == {"answer_log_prob": 2}
    assert excess.n == 3 and excess.format_log_prob is None and excess.accuracy is None
    assert [*excess.intervals] == [*comparisons.EXCESS]
    columns = 100 * np.array([[1.0, 0.5, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    expected = estimates.bootstrap(columns, ["x", "x", "y"])
    for number, metric in enumerate(("em", "f1", "named")):
        assert excess.intervals[metric] == expected[:, number].tolist()


def test_several_draws_are_averaged_within_a_question():
    averaged = comparisons.average_draws([scores_of(records) for records in DRAWS])
    assert averaged["em"] == {"d": 0.5, "b": 1, "a": 0.5}  # what all have
    assert averaged["f1"] == {"d": 0.5, "b": 0.75, "a": 0.5}
    log_probs = averaged["answer_log_prob"]
    assert log_probs == pytest.approx({"d": -7, "b": -0.2, "a": -(0.2 + 0.5) / 2})
    excess = comparisons.measure_excesses({"x": (scores_of(MASK), averaged)}, CONTEXTS)["x"]
    assert (excess.n, excess.em) == (2, pytest.approx(100 * (0.5 + 0) / 2))
    assert excess.answer_log_prob == pytest.approx(((2 - 0.35) + (0.5 - 0.2)) / 2)
    assert excess.intervals["em"] is None  # a and b are on one context


def test_a_metric_that_one_of_them_lacks():
    without = [one.with_fields(log_probs=None) for one in DRAWS[0]]
    averaged = comparisons.average_draws([scores_of(without), scores_of(DRAWS[1])])
    assert "answer_log_prob" not in averaged and averaged["em"]["a"] == 0.5
    excess = comparisons.measure_excesses({"x": (scores_of(MASK), averaged)}, CONTEXTS)["x"]
    assert excess.answer_log_prob is None and "answer_log_prob" not in excess.intervals and excess.em == 25


def test_pairs_on_other_questions_do_not_disturb_each_other():
    pairs = {
        1: (scores_of(MASK), scores_of(DRAWS[0])),
        2: (scores_of(MASK[:2]), scores_of(DRAWS[0])),
        3: (scores_of(MASK), scores_of(DRAWS[1])),
        4: (scores_of(MASK), scores_of(DRAWS[1][2:])),  # no question in common
    }
    together = comparisons.measure_excesses(pairs, CONTEXTS)
    assert sorted(together) == [1, 2, 3]
    for number in together:
        assert comparisons.measure_excesses({"x": pairs[number]}, CONTEXTS)["x"] == together[number]


# ---------------------------------------------------------------------------------------------------------------------
# Agreement with effects


def test_ranks_correlate_as_scipys():
    rng = np.random.default_rng(1)
    for _ in range(20):
        one = rng.integers(0, 5, 12) / 4  # ties
        two = rng.normal(size=12).round(1)
        assert comparisons.correlate_ranks(one, two) == pytest.approx(scipy.stats.spearmanr(one, two).statistic)


def test_agreement_of_one_question():
    # By score: latents 2, 0, 3 (the last one has none); by effect: 0, 2, 1, 3.
    found = comparisons.compare_with_effects(Effects([2.0, 0.0, 5.0, 1.0], [0.6, 0.1, 0.3, -0.5], k=2))
    assert found == {"spearman": pytest.approx(0.6), "share": pytest.approx(0.9), "found": 1}
    found = comparisons.compare_with_effects(Effects([2.0, 0.0, 5.0, 1.0], [0.6, 0.1, 0.3, -0.5], k=1))
    assert (found["share"], found["found"]) == (pytest.approx(0.3), 0)
    # A latent without a score is in no TopK, and takes nothing away where its effect is negative.
    found = comparisons.compare_with_effects(Effects([2.0, 0.0, 5.0, 1.0], [0.6, 0.1, 0.3, -0.5], k=4))
    assert (found["share"], found["found"]) == (pytest.approx(0.9), pytest.approx(3 / 4))
    # Of equal scores the lower latent comes first, as in the lists.
    found = comparisons.compare_with_effects(Effects([1.0, 1.0, 0.5], [0.0, 0.2, 0.2], k=1))
    assert (found["share"], found["found"]) == (0, 0)


@pytest.mark.parametrize(
    ("scores", "effects", "k", "undefined"),
    [
        ([1.0, 1.0], [0.1, 0.2], 1, {"spearman", "share", "found"}),
        ([0.0, 0.0], [0.1, 0.2], 1, {"spearman", "share", "found"}),
        ([1.0, 2.0], [0.1, 0.1], 1, {"spearman", "share", "found"}),
        ([], [], 1, {"spearman", "share", "found"}),
        ([1.0, 2.0], [-0.1, -0.2], 1, {"share"}),
        ([1.0, 2.0], [0.1, 0.2], 0, {"found"}),
    ],
)
def test_agreement_where_nothing_varies(scores, effects, k, undefined):
    found = comparisons.compare_with_effects(Effects(scores, effects, k))
    assert {name for name, value in found.items() if math.isnan(value)} == undefined


def test_agreement_is_a_mean_over_the_questions_that_count():
    measured = {
        "a": Effects([1.0, 2.0, 3.0], [0.1, 0.2, 0.3], k=1),  # 1, 0.5, 1
        "b": Effects([3.0, 2.0, 1.0], [-0.1, -0.2, -0.3], k=1),  # 1, none, 1
        "c": Effects([1.0, 2.0], [0.4, 0.1], k=1),  # -1, 0.2, 0
        "d": Effects([1.0, 1.0], [0.4, 0.1], k=1),  # none
    }
    found = comparisons.measure_agreement(measured, [0, 3, 0, 1], CONTEXTS)
    assert (found.spearman.n, found.spearman.mean) == (3, pytest.approx(1 / 3))
    assert (found.share.n, found.share.mean) == (2, pytest.approx(0.35))
    assert (found.found.n, found.found.mean) == (3, pytest.approx(2 / 3))
    assert (found.unmeasured, found.k) == (1, "50%")
    expected = estimates.bootstrap([[1.0], [1.0], [-1.0], [NAN]], ["x", "x", "y", "y"])[:, 0]
    assert [found.spearman.low, found.spearman.high] == pytest.approx(expected.tolist())
    assert comparisons.measure_agreement({}, [], CONTEXTS) is None
    # Of a single context there is no interval, and of nothing no mean.
    found = comparisons.measure_agreement({"c": measured["c"], "d": measured["d"]}, [], CONTEXTS)
    assert found.share.fields() == {"mean": pytest.approx(0.2), "low": None, "high": None, "n": 1}
    found = comparisons.measure_agreement({"d": measured["d"]}, [], CONTEXTS)
    assert found.share.fields() == {"mean": None, "low": None, "high": None, "n": 0}


# ---------------------------------------------------------------------------------------------------------------------
# Recovery


def test_recovery_by_hand():
    full = {"a": -0.1, "b": -0.1, "c": -0.1, "d": -0.1}
    none = {"a": -2.1, "b": -0.2, "c": -4.1}
    reached = {"a": -1.1, "b": -0.1, "c": -5.1, "d": -0.5}
    found = comparisons.measure_recovery(reached, none, full)
    assert [*found] == ["a", "b", "c"]  # of d it is not known what keeping none leaves
    assert (found["a"], found["c"]) == (pytest.approx(0.5), pytest.approx(-0.25))
    assert math.isnan(found["b"])  # keeping none costs no more than 0.1
    (estimate,) = comparisons.estimate_each({0: found}, CONTEXTS).values()
    assert (estimate.n, estimate.mean) == (2, pytest.approx(0.125))


def test_area_over_log_k():
    """In steps of ten the trapezoids are equally wide: half of both ends, and all between."""
    curves = {100.0: {"a": 1.0, "b": NAN}, 0.0: {"a": 9.0, "b": 9.0}, 1.0: {"a": 0.0, "b": NAN}, 10.0: {"a": 0.5}}
    assert comparisons.area_over_log_k(curves) == {"a": pytest.approx((0 + 0.5) / 4 + (0.5 + 1) / 4)}
    two = comparisons.area_over_log_k({2.0: {"a": 0.2, "b": NAN}, 6.2: {"a": 0.6, "b": NAN}})
    assert two["a"] == pytest.approx(0.4) and math.isnan(two["b"])
    # Wider steps count for more: from 1 to 2 and from 2 to 8.
    uneven = comparisons.area_over_log_k({1.0: {"a": 0.0}, 2.0: {"a": 0.0}, 8.0: {"a": 1.0}})
    assert uneven["a"] == pytest.approx(0.5 * math.log(4) / math.log(8))
    assert comparisons.area_over_log_k({0.0: {"a": 1.0}, 5.0: {"a": 1.0}}) == {}


# ---------------------------------------------------------------------------------------------------------------------
# Intervals


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(estimates, "bootstrap", functools.partial(estimates.bootstrap, resamples=300))


def name_all(keys):
    """Ids of questions, and their contexts."""
    ids = [f"q{number}" for number in range(len(keys))]
    return ids, dict(zip(ids, keys.tolist()))


def test_intervals_of_an_excess_cover_the_truth(few_resamples):
    """200 data sets, five draws of the control: over questions instead of contexts they cover it far less often."""
    rng, ours, naive, nats = np.random.default_rng(21), [], [], []
    for _ in range(200):
        shares, keys = draw_contexts(rng, 60)
        ids, contexts = name_all(keys)
        right = 0.6 * shares[keys]  # under the mask: 0.42 in the long run
        mask = {"em": dict(zip(ids, (rng.random(len(ids)) < right).astype(float).tolist()))}
        mask["answer_log_prob"] = dict(zip(ids, -shares[keys] * rng.exponential(1.0, len(ids))))
        draws = []
        for _ in range(5):
            draw = {"em": dict(zip(ids, (rng.random(len(ids)) < 1 - right).astype(float).tolist()))}
            draw["answer_log_prob"] = dict(zip(ids, -rng.exponential(0.3, len(ids))))
            draws.append(draw)
        pair = (mask, comparisons.average_draws(draws))
        ours.append(comparisons.measure_excesses({0: pair}, contexts)[0].intervals)
        naive.append(comparisons.measure_excesses({0: pair}, dict(zip(ids, ids)))[0].intervals["em"])
        nats.append(ours[-1]["answer_log_prob"])
    truth = 100 * (1 - 0.42 - 0.42)
    assert 0.90 <= count_covered([found["em"] for found in ours], truth) <= 0.98
    assert 0.90 <= count_covered(nats, 0.7 - 0.3) <= 0.98
    assert count_covered(naive, truth) < 0.85


def draw_effects(rng, noise):
    """A question's effects, as skewed as they are, and scores that tell them with so much noise."""
    effects = rng.exponential(0.2, 12) - 0.1
    return Effects((effects + noise * rng.normal(size=12)).tolist(), effects.tolist(), k=6)


def test_intervals_of_an_agreement_cover_the_truth(few_resamples):
    """200 data sets; how well a score tells effects differs from context to context."""
    rng = np.random.default_rng(22)
    noises = (0.05, 0.3, 1.0)
    names = ("spearman", "share", "found")
    many = [comparisons.compare_with_effects(draw_effects(rng, noises[n % 3])) for n in range(9_000)]
    truth = {name: np.mean([found[name] for found in many]) for name in names}
    intervals = {name: [] for name in names}
    for _ in range(200):
        _, keys = draw_contexts(rng, 30)
        ids, contexts = name_all(keys)
        of_context = rng.integers(0, 3, 30)
        measured = {name: draw_effects(rng, noises[of_context[key]]) for name, key in zip(ids, keys)}
        found = comparisons.measure_agreement(measured, [], contexts)
        for name in names:
            estimate = getattr(found, name)
            intervals[name].append((estimate.low, estimate.high))
    for name in names:
        assert 0.89 <= count_covered(intervals[name], truth[name]) <= 0.98, name


def test_intervals_of_recovery_cover_the_truth(few_resamples):
    """200 data sets: shares of what keeping none loses, at three K, and the area; one question in three loses too
    little to count."""
    rng, ks = np.random.default_rng(23), (1.0, 10.0, 100.0)
    means = (0.2, 0.5, 0.8)
    intervals = {key: [] for key in (*ks, "area")}
    counted = []
    for _ in range(200):
        shares, keys = draw_contexts(rng, 60, share=0.5)
        ids, contexts = name_all(keys)
        full = dict(zip(ids, -rng.exponential(0.1, len(ids))))
        loss = np.where(rng.random(len(ids)) < 1 / 3, 0.05, 0.2 + rng.exponential(2.0, len(ids)))
        none = {name: full[name] - lost for name, lost in zip(ids, loss)}
        recovered = {}
        for k, mean in zip(ks, means):
            reached = mean + 0.4 * (shares[keys] - 0.5) + 0.3 * rng.normal(size=len(ids))
            values = {name: none[name] + share * lost for name, share, lost in zip(ids, reached, loss)}
            recovered[k] = comparisons.measure_recovery(values, none, full)
        columns = recovered | {"area": comparisons.area_over_log_k(recovered)}
        for key, estimate in comparisons.estimate_each(columns, contexts).items():
            intervals[key].append((estimate.low, estimate.high))
        counted.append(estimate.n / len(ids))
    assert np.mean(counted) == pytest.approx(2 / 3, abs=0.02)
    for key, truth in zip((*ks, "area"), (*means, 0.5)):
        assert 0.90 <= count_covered(intervals[key], truth) <= 0.98, key


# ---------------------------------------------------------------------------------------------------------------------
# The sentence


def entry(ranking, em, cost, mean_k=6.2, k="50%", masked="topk", width=2.0, excess=None, **fields):
    """A masked round's entry. cost: its EM drop; excess: {control: (low, mean, high)}."""
    means = {"em": em, "f1": em}
    drop = {"em": cost, "f1": cost}
    over = {}
    for name, (low, mean, high) in (excess or {}).items():
        over[name] = {"n": 5, "em": mean, "intervals": {"em": [low, high]}}
    value = {
        "round": "false",
        "masked": masked,
        "k": k,
        "mean_k": mean_k,
        "run": {"ranking": ranking},
        "population": "f00d",
        "n": 5,
        **means,
        "intervals": {name: [em - 1, em + 1] for name in means},
        "clean": None,
        "drop": {"n": 5, **drop, "intervals": {name: [cost - width, cost + width] for name in drop}},
        "excess": over or None,
        **fields,
    }
    return parse_entry(value)


def test_sentence_of_a_difference():
    control = entry("baseline", 96.6, 3.4, control="direction", draws=5)
    mask = entry("baseline", 74.3, 25.7, excess={"direction": (18.1, 22.3, 26.4), "matched": (13.0, 17.6, 21.0)})
    others = [entry("baseline", 50.0, 50.0, k="10", mean_k=10.0), entry("matched", 91.9, 8.1, mean_k=25.0)]
    others += [entry("baseline", 99.9, 0.1, masked="bottomk"), entry("baseline", 12.0, 88.0, keep_only=True)]
    assert tell_finding([*others, control, mask]) == (
        "Masking the 6.2 latents that fire most (on average per question) costs 25.7 points of EM [23.7, 27.7]; "
        "taking away as much in a random direction 3.4; the difference is 22.3 [18.1, 26.4]."
    )
    # Without one, the matched mask stands in; of more than five times as many latents that is said.
    assert tell_finding([*others, mask]) == (
        "Masking the 6.2 latents that fire most (on average per question) costs 25.7 points of EM [23.7, 27.7]; active "
        "latents drawn at random that take away as much (25.0 of them) 8.1; the difference is 17.6 [13.0, 21.0]."
    )
    assert "(31.1 of them, more than 5 times as many) 8.1" in tell_finding(
        [mask, entry("matched", 91.9, 8.1, mean_k=31.1)]
    )
    assert tell_finding([entry("baseline", 74.3, 25.7)]).endswith(
        ". No control was run: with --control direction the same command says what any change of this size costs."
    )


def test_sentence_where_there_is_no_difference():
    control = entry("baseline", 70.0, 24.9, control="direction")
    mask = entry("baseline", 74.3, 25.7, excess={"direction": (-1.0, 0.8, 2.6)})
    assert tell_finding([mask, control]) == (
        "Masking the 6.2 latents that fire most (on average per question) costs 25.7 points of EM [23.7, 27.7]; "
        "taking away as much in a random direction 24.9; the difference, 0.8 [-1.0, 2.6], may be nothing."
    )
    mask = entry("baseline", 74.3, 25.7, excess={"direction": (-9.0, -4.0, -0.5)})
    assert (
        "], less than taking away as much in a random direction: 24.9, a difference of -4.0 [-9.0, -0.5]."
        in tell_finding([mask, control])
    )
    # On a single context there is no interval that could say so.
    alone = mask.with_fields(excess={"direction": {"n": 1, "em": 0.8, "intervals": {"em": None}}})
    assert tell_finding([alone, control]).endswith("; the difference is 0.8.")


def ranked(ranking, spearman=(0.12, 0.1, 0.14), found=(0.125, 0.1, 0.15), counted=5, **fields):
    """Round 1's entry of a ranking. spearman, found: mean, low and high over so many questions."""
    agreement = {}
    for name, estimate in (("spearman", spearman), ("share", found), ("found", found)):
        agreement[name] = {**dict(zip(("mean", "low", "high"), estimate)), "n": counted}
    scores = {"n": 5, "em": 100.0, "f1": 100.0, "intervals": {"em": None, "f1": None}}
    value = {"round": "baseline", "k": None, "run": {"ranking": ranking}, "population": "f00d", **scores}
    return parse_entry(value | {"all": scores, "population_all": "all", "agreement": agreement, **fields})


def test_sentence_says_whether_those_that_matter_are_among_those_that_fire():
    mask, effect = entry("baseline", 74.3, 25.7), entry("effect", 9.7, 90.3)
    entries = [ranked("gradsae", found=(0.9, 0.8, 1.0)), ranked("baseline"), mask, effect]
    told = (
        " Of the 6.2 latents that matter most, measured one by one, 12% [10%, 15%] are among them (rank correlation "
        "0.12 [0.10, 0.14])"
    )
    costs = "; masking the 6.2 that matter most costs 90.3 [88.3, 92.3]."
    assert tell_finding(entries).endswith(told + costs)
    # What masking them costs is of the same questions, mask and setting, or is not said.
    for other in (
        effect.with_fields(population="beef"),
        effect.with_fields(k="10"),
        effect.with_fields(control="direction"),
    ):
        assert tell_finding([*entries[:3], other]).endswith(f"{told}.")
    # Not where effects are not known, or of other questions; of BottomK nothing, and nothing of effect itself.
    silent = [entries[:1], [ranked("baseline", agreement=None)], [ranked("baseline", population="beef")]]
    silent.append([ranked("baseline", found=(None, None, None), counted=0)])
    for unmasked in silent:
        assert "matter" not in tell_finding([*unmasked, mask])
    assert "among" not in tell_finding([ranked("baseline"), entry("baseline", 99.9, 0.1, masked="bottomk")])
    found = tell_finding([ranked("effect", found=(1.0, 1.0, 1.0)), effect])
    assert "among" not in found and found.startswith(
        "Masking the 6.2 latents that matter most, measured one by one (on "
    )


def test_sentence_of_what_matters_stays_true():
    mask = entry("baseline", 74.3, 25.7)
    # Measured, or telling, on fewer questions; intervals that include zero; none at all.
    found = tell_finding([ranked("baseline", spearman=(0.01, -0.2, 0.2), found=(0.0, 0.0, 0.1), counted=3), mask])
    assert " 0% [0%, 10%] are among them (rank correlation 0.01 [-0.20, 0.20])" in found
    assert found.endswith(", on 3 of the 5 questions.")
    alone = tell_finding([ranked("baseline", spearman=(None, None, None), found=(0.5, None, None)), mask])
    assert alone.endswith(" Of the 6.2 latents that matter most, measured one by one, 50% are among them.")
    # Shares are of K = 50%: at another K that is said.
    entries = [ranked("baseline"), ranked("gradsae")]
    found = tell_finding(
        [*entries, entry("baseline", 60.0, 40.0, k="10", mean_k=10.0), entry("effect", 5.0, 95.0, k="10", mean_k=10.0)]
    )
    assert found.startswith("Masking the 10 latents that fire most costs 40.0")
    assert (
        " At K = 50%, of the latents that matter most, measured one by one, 12% [10%, 15%] are among those that fire "
        "most (rank" in found
    )
    assert found.endswith("; masking the 10 that matter most costs 95.0 [93.0, 97.0].")
    found = tell_finding([*entries, entry("gradsae", 20.0, 80.0, k="10", mean_k=10.0)])
    assert "are among those that it ranks highest (rank correlation 0.12 [0.10, 0.14])." in found


def test_sentence_hints_at_other_ks():
    low = [entry("baseline", 60.0, 40.0), entry("effect", 4.9, 95.0), entry("effect", 3.0, 97.0, k="10", mean_k=10.0)]
    low += [entry("gradsae", 5.0, 95.0), entry("attribution", 1.0, 99.0, control="direction")]
    assert tell_finding(low).endswith(
        " At K = 50% hardly an answer is left (effect: EM under 5%): smaller K tell more."
    )
    still = [entry("baseline", 99.0, 1.0, width=1.0)]
    assert tell_finding(still).endswith(
        " At K = 50% what TopK costs may be nothing: more questions, or larger K, tell more."
    )
    assert "larger K" not in tell_finding([entry("baseline", 99.0, 1.0, width=0.9)])
    assert "larger K" not in tell_finding([entry("baseline", 99.0, 1.0, masked="bottomk")])


def test_what_the_sentence_is_about():
    """TopK first, the baseline first, K = 50% first; without it the largest K."""
    found = tell_finding([entry("gradsae", 20.0, 80.0), entry("baseline", 99.9, 0.1, masked="bottomk")])
    average = "(on average per question)"
    cost = "costs 80.0 points of EM [78.0, 82.0]."
    assert found.startswith(f"Masking the 6.2 latents that gradsae ranks highest {average} {cost}")
    others = {"other": "another question on the same context", "other-context": "a question on another context"}
    for ranking, who in others.items():
        found = tell_finding([entry(ranking, 20.0, 80.0)])
        assert found.startswith(f"Masking the 6.2 latents that {who} ranks highest {average} {cost}")
        found = tell_finding([entry(ranking, 20.0, 80.0, excess={"own": (-3.4, 0.8, 5.0)})])
        assert found.endswith("; the difference from masking a question's own is 0.8 [-3.4, 5.0].")
    found = tell_finding([entry("baseline", 99.9, 0.1, k="1", mean_k=1.0, masked="bottomk")])
    assert found.startswith("Masking the one latent that fires least costs 0.1 ")
    found = tell_finding([entry("baseline", 80.0, 20.0, k=k, mean_k=float(k)) for k in ("1", "10", "3")])
    assert found.startswith("Masking the 10 latents that fire most costs 20.0")
    found = tell_finding([entry("baseline", 80.0, 20.0, k="10", mean_k=9.8)])
    assert found.startswith(f"Masking the 9.8 latents that fire most {average} costs 20.0")
    assert tell_finding([entry("baseline", 100.0, 0.0, k="0", mean_k=0.0)]) == ""
    assert tell_finding([entry("baseline", 100.0, 0.0).with_fields(drop=None)]) == tell_finding([]) == ""
