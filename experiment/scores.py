"""Scores of an answer against the ground truths: SQuAD v1.1's, and two more. Knows nothing of models."""

import collections
import re
import string
import unicodedata
from collections.abc import Sequence

# Scripts that are written without spaces between words: Thai to Myanmar, Khmer, Japanese and Chinese with all that
# stands beside the characters themselves, halfwidth Katakana, and the supplementary ideographs.
UNSPACED = re.compile(
    "[\u0e00-\u109f\u1780-\u17ff\u2e80-\u312f\u31a0-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)


def normalize(text: str) -> str:
    """SQuAD v1.1's normal form: lower case, no punctuation, no articles, single spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    return " ".join(text.split())


def token_f1(answer: str, truth: str) -> float:
    """Harmonic mean of precision and recall over the normal forms' words, 0 to 1; 0 where they share none."""
    answer_words = normalize(answer).split()
    truth_words = normalize(truth).split()
    shared = (collections.Counter(answer_words) & collections.Counter(truth_words)).total()
    if not shared:
        return 0.0
    return 2 * shared / (len(answer_words) + len(truth_words))


def score_answer(answer: str, text: str, truths: Sequence[str]) -> dict[str, float]:
    """Scores of a parsed answer and of the text it was parsed from, each 0 to 1 and the best over the ground truths.

    em, f1: SQuAD v1.1's.  accuracy: the stripped strings are equal.  named: em is 1, or a ground truth stands anywhere
    in the text, whatever the format around it: as whole words, but for scripts without spaces between words.
    """
    em = any(normalize(answer) == normalize(truth) for truth in truths)
    f1 = max(token_f1(answer, truth) for truth in truths)
    accuracy = any(answer.strip() == truth.strip() for truth in truths)
    named = em or any(_names(text, truth) for truth in truths)
    return {"em": float(em), "f1": f1, "accuracy": float(accuracy), "named": float(named)}


def _names(text: str, truth: str) -> bool:
    """Whether a ground truth stands in a text, both in SQuAD's normal form."""
    text = _normalize_apart(text)
    truth = _normalize_apart(truth)
    if not truth:
        return False
    start = text.find(truth)
    while start >= 0:
        end = start + len(truth)
        begins_word = _is_boundary(text[start - 1 : start], truth[0])
        ends_word = _is_boundary(truth[-1], text[end : end + 1])
        if begins_word and ends_word:
            return True
        start = text.find(truth, start + 1)
    return False


def _normalize_apart(text: str) -> str:
    """SQuAD's normal form with brackets as spaces: else "[[Oslo]]<end_of_turn>" is the one word "osloendofturn"."""
    return normalize(re.sub(r"[\[\]{}()<>=]", " ", text))


def _is_boundary(before: str, after: str) -> bool:
    """Whether a word may end between two characters, "" for none: not inside a word of a script with spaces."""
    return not (_is_in_word(before) and _is_in_word(after))


def _is_in_word(character: str) -> bool:
    """Whether a character is a letter, mark or digit of a script with spaces between words."""
    if not character or UNSPACED.match(character):
        return False
    return unicodedata.category(character)[0] in "LMN"
