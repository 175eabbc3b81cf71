"""The answer parser and the metrics on awkward text, and against third parties."""

import random

import oracle
import pytest

import common
from experiment import prompts
from experiment.scores import normalize, score_answer

PARSED = {
    "Result = [[ Oslo ]]": "Oslo",
    "Result = [[Oslo]]": "Oslo",
    "[ Oslo ]": "Oslo",
    "Result = [[ [ Oslo ] ]]": "Oslo",
    "Result = [[  ]]": "",
    "[]": "",
    "Result = [[ Oslo": "Result   Oslo",
    "Result = Oslo ]]": "Result  Oslo",
    "no brackets = at all": "no brackets  at all",
    "": "",
    "[[ first ]] and [[ second ]]": "first",
    "[[ two\nlines ]]": "two\nlines",
    "[[ two\nlines ]] [[ one ]]": "one",
    "[[ a = b ]]": "a  b",
    '[[ "quoted" ]]': '"quoted"',
    "[[ Orléans ]]": "Orléans",
    "[[ 東京 ]]": "東京",
    "[[ the ]]": "the",
    "[[ ... ]]": "...",
    "=[[ x ]]=": "x",
}


@pytest.mark.parametrize("text", PARSED)
def test_parser(text):
    assert common.parse_answer(text) == PARSED[text] == oracle.parse(text)


@pytest.mark.parametrize(
    ("answer", "truths", "em", "f1", "accuracy"),
    [
        ("Oslo", ["Oslo"], 1, 1, 1),
        ("oslo.", ["Oslo"], 1, 1, 0),
        ("the Oslo", ["Oslo"], 1, 1, 0),
        (" Oslo ", ["Oslo"], 1, 1, 1),
        ("Oslo", ["Bergen", "Oslo"], 1, 1, 1),
        ("grey heron", ["a grey goat", "heron"], 0, 2 / 3, 0),
        ("the", ["the"], 1, 0, 1),  # nothing is left of either: SQuAD's script counts EM 1 and F1 0
        ("the", ["an"], 1, 0, 0),
        ("...", ["..."], 1, 0, 1),
        ("", ["Oslo"], 0, 0, 0),
        ("", [""], 1, 0, 1),
        ("Orléans", ["Orleans"], 0, 0, 0),
        ("Orléans", ["orléans"], 1, 1, 0),
        ('"Oslo"', ["Oslo"], 1, 1, 0),
        ("Oslo Oslo", ["Oslo"], 0, 2 / 3, 0),
        ("theatre", ["atre"], 0, 0, 0),
    ],
)
def test_scores(answer, truths, em, f1, accuracy):
    score = score_answer(answer, "", truths)
    assert score == {"em": em, "f1": pytest.approx(f1), "accuracy": accuracy, "named": em}


@pytest.mark.parametrize(
    ("text", "truths", "named"),
    [
        ("Result = [[ Oslo ]]", ["Oslo"], 1),
        ("Result = (( oslo ]]", ["Bergen", "the Oslo"], 1),  # the format gone, the knowledge there
        ("It is the city of Oslo, Norway.", ["Oslo"], 1),
        ("Result=[[Oslo]]<end_of_turn>", ["Oslo"], 1),
        ("Oslo<|im_end|>", ["Oslo"], 1),
        ("a grey\n heron", ["grey heron"], 1),
        ("grey and heron", ["grey heron"], 0),
        ("heron grey", ["grey heron"], 0),
        ("Oslofjord", ["Oslo"], 0),
        ("Old-Oslo", ["Oslo"], 0),  # as F1 sees it: SQuAD's normal form makes one word of it
        ("119030", ["1903"], 0),
        ("in 1,903 years", ["1903"], 1),
        ("f(x) = 3", ["f(x)"], 1),
        ("Orléans", ["orléans."], 1),
        ("the ... [[ ]] a", ["the", "...", "", "[]"], 0),  # nothing is left of these ground truths
        ("", ["Oslo"], 0),
        # Scripts without spaces between words: whatever stands around it.
        ("答案是北京。", ["北京"], 1),
        ("Result = [[ 北京市 ]]", ["北京"], 1),
        ("in北京now", ["北京"], 1),
        ("東京と大阪", ["京都", "大阪"], 1),
        ("กรุงเทพมหานคร", ["กรุงเทพ"], 1),
        ("在1903年", ["1903"], 1),
        ("在11903年", ["1903"], 0),
        ("上海", ["北京"], 0),
        ("서울특별시", ["서울"], 0),  # Korean has spaces
        ("हिन्दी", ["हिन्द"], 0),  # and so has Hindi, whose vowel signs are marks
        ("“Oslo”, they say", ["Oslo"], 1),
    ],
)
def test_a_ground_truth_that_is_named(text, truths, named):
    """In the generated text, not in what was parsed as the answer."""
    assert score_answer("no such thing", text, truths)["named"] == named
    assert score_answer(truths[0], text, truths)["named"] == 1  # what is right is named


def test_scores_are_the_best_over_the_ground_truths():
    score = score_answer("grey heron", "Result = [[ grey heron ]] a goat", ["a grey goat", "Grey heron.", "goat"])
    assert score == {"em": 1, "f1": 1, "accuracy": 0, "named": 1}


def test_scores_agree_with_a_third_party():
    squad = pytest.importorskip("torchmetrics.functional.text").squad
    rng = random.Random(0)
    words = [
        "the",
        "a",
        "an",
        "Oslo",
        "oslo",
        "Oslo's",
        "grey",
        "heron,",
        "heron",
        "1903",
        "-",
        "...",
        "Orléans",
        '"x"',
    ]

    def text():
        return " ".join(rng.choice(words) for _ in range(rng.randint(0, 5)))

    compared = 0
    for number in range(600):
        answer, truths = text(), [text() for _ in range(rng.randint(1, 3))]
        theirs = squad(
            {"prediction_text": answer, "id": str(number)},
            {"answers": {"text": truths, "answer_start": [0] * len(truths)}, "id": str(number)},
        )
        ours = score_answer(answer, "", truths)
        assert 100 * ours["em"] == pytest.approx(theirs["exact_match"].item()), (answer, truths)
        # Where nothing is left of either text, SQuAD v1.1's own script gives F1 0 and torchmetrics 1 (as v2.0 does).
        if normalize(answer) or all(normalize(truth) for truth in truths):
            compared += 1
            assert 100 * ours["f1"] == pytest.approx(theirs["f1"].item(), abs=1e-4), (answer, truths)
    assert compared > 500


def test_prompt_fields_are_filled_once():
    template = "{context}|{question}|{other}"
    assert (
        prompts.build_prompt(template, "has {question} in it", "q {context}")
        == "has {question} in it|q {context}|{other}"
    )
