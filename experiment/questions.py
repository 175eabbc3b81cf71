"""SQuAD questions in, scores out. Knows nothing of models."""

import collections
import hashlib
import json
import random
import re
import string
import sys
from dataclasses import dataclass
from pathlib import Path

from experiment import UserError, os_errors
from experiment.results import load_json, parse_json


@dataclass(frozen=True, slots=True)
class Question:
    id: str
    context: str
    question: str
    truths: tuple[str, ...]  # the ground truths: any one of them is right


def load(dataset, split):
    """Reads a data set. Returns its questions, in its order; how many were left out for having no ground truth; and a
    hash of ids, texts and ground truths: two runs with the same one asked the same questions.

    dataset: a local .jsonl (SQuAD's columns, one object a line), a local .json (a list of such objects, or SQuAD's
    nested form), or a local folder or Hub data set with SQuAD's columns, of which `split` is read.
    Raises UserError, naming the row, for anything that is not a question, and for an id that stands twice.
    """
    questions, ids, sha = [], set(), hashlib.sha256()
    for where, row in _read_rows(dataset, split):
        question = _make_question(row, f"{dataset}, {where}")
        if question.id in ids:
            raise UserError(f"{dataset}, {where}: the id {question.id!r} stands twice")
        ids.add(question.id)
        if question.truths:
            questions.append(question)
            sha.update(json.dumps([question.id, question.context, question.question, question.truths]).encode())
    if not questions:
        raise UserError(f"{dataset}: no question with a ground truth in it")
    return questions, len(ids) - len(questions), sha.hexdigest()


def is_local(dataset):
    """Whether a data set is read as a file, of which a split says nothing."""
    return dataset.endswith((".json", ".jsonl"))


def _read_rows(dataset, split):
    """Yields (where, row), the row with SQuAD's columns unless the data set is wrong."""
    if dataset.endswith(".jsonl"):
        with os_errors(f"{dataset}: cannot be read"), open(dataset, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"line {number}", parse_json(line, f"{dataset}, line {number}")
        return
    if dataset.endswith(".json"):
        rows = load_json(Path(dataset))
        if not isinstance(rows, list):
            yield from _flatten(dataset, rows)
            return
    else:
        import datasets  # slow to import, and a file does not need it

        rows = datasets.load_dataset(dataset, split=split or None)
        if isinstance(rows, dict):
            raise UserError(f"{dataset}: has the splits {', '.join(map(str, rows))}: give one as --split")
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _flatten(path, content):
    """Yields (where, row) of SQuAD's nested form."""
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    # SQuAD v2.0's unanswerable questions have answers that are only plausible.
                    truths = [] if qa.get("is_impossible") else [answer["text"] for answer in qa["answers"]]
                    row = {"id": qa["id"], "context": paragraph["context"], "question": qa["question"]}
                    yield f"id {qa['id']!r}", row | {"answers": {"text": truths}}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is neither a list of questions nor in SQuAD's nested form ({error!r})") from None


def _make_question(row, where):
    try:
        truths = row["answers"]["text"]
        texts = [row["id"], row["context"], row["question"], *truths]
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{where}: lacks one of SQuAD's columns id, context, question, answers.text ({error})"
        ) from None
    if not isinstance(truths, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: id, context, question and the answers' texts must be strings")
    if any(re.search(r"[\ud800-\udfff]", text) for text in texts):
        raise UserError(f"{where}: holds half a character (a lone surrogate)")
    # SQuAD asks five questions on a context: interned, they share one string.
    return Question(row["id"], sys.intern(row["context"]), row["question"], tuple(truths))


def select(questions, limit=None, sample=None, seed=42):
    """The first `limit` questions, or `sample` drawn ones in the data set's order, or all."""
    if sample is not None and sample < len(questions):
        return [questions[number] for number in sorted(random.Random(seed).sample(range(len(questions)), sample))]
    return questions[:limit]


def normalize(text):
    """SQuAD v1.1's normal form: lower case, no punctuation, no articles, single spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(answer, truth):
    """Harmonic mean of precision and recall over the normal forms' words, 0 to 1; 0 where they share none."""
    answer_words, truth_words = normalize(answer).split(), normalize(truth).split()
    shared = (collections.Counter(answer_words) & collections.Counter(truth_words)).total()
    return 2 * shared / (len(answer_words) + len(truth_words)) if shared else 0.0


def score(answer, text, truths):
    """Scores of a parsed answer and of the text it was parsed from, each 0 to 1 and the best over the ground truths.

    em, f1: SQuAD v1.1's.  accuracy: the stripped strings are equal.  named: a ground truth stands as whole words
    anywhere in the text, whatever the format around it.
    """
    return {
        "em": float(any(normalize(answer) == normalize(truth) for truth in truths)),
        "f1": max(token_f1(answer, truth) for truth in truths),
        "accuracy": float(any(answer.strip() == truth.strip() for truth in truths)),
        "named": float(any(_names(text, truth) for truth in truths)),
    }


def _names(text, truth):
    # Brackets are spaces here: without that, "[[Oslo]]<end_of_turn>" would be the one word "osloendofturn".
    text, truth = (normalize(re.sub(r"[\[\]{}()<>=]", " ", words)) for words in (text, truth))
    return bool(truth) and f" {truth} " in f" {text} "
