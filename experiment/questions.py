"""SQuAD questions in, scores out. Knows nothing of models."""

import collections
import hashlib
import json
import random
import re
import string
from dataclasses import dataclass
from pathlib import Path

from experiment import UserError


@dataclass(frozen=True, slots=True)
class Question:
    id: str
    context: str
    question: str
    truths: tuple[str, ...]  # the ground truths: any one of them is right


def load(dataset, split):
    """The questions of a data set, in its order, and how many were left out for having no ground truth.

    `dataset` is a local .jsonl (SQuAD's columns, one object a line), a local .json (a list of such objects, or SQuAD's
    nested form) or the name of a Hub data set with SQuAD's columns, of which `split` is read.
    Raises UserError, naming the row, for anything that is not a question, and for an id that stands twice.
    """
    if is_local(dataset):
        rows = _read_local(Path(dataset))
    else:
        import datasets  # slow to import, and a local file does not need it

        rows = ((f"row {n}", row) for n, row in enumerate(datasets.load_dataset(dataset, split=split), 1))
    found, seen, contexts, unanswerable = [], set(), {}, 0
    for where, row in rows:
        question = _parse(row, f"{dataset}, {where}")
        if question.id in seen:
            raise UserError(f"{dataset}, {where}: the id {question.id!r} stands twice")
        seen.add(question.id)
        if not question.truths:
            unanswerable += 1
            continue
        # Several questions share a context: keep one copy of its text.
        context = contexts.setdefault(question.context, question.context)
        found.append(Question(question.id, context, question.question, question.truths))
    if not found:
        raise UserError(f"{dataset}: no question with a ground truth in it")
    return found, unanswerable


def is_local(dataset):
    return dataset.endswith((".json", ".jsonl"))


def _read_local(path):
    """Yields (where, row) of a local file, whichever of the three forms it has."""
    where = "as a whole"
    try:
        # JSON strings may hold other line separators than \n: they end no line.
        with open(path, encoding="utf-8", newline="\n") as file:
            if path.suffix == ".jsonl":
                for number, line in enumerate(file, 1):
                    where = f"line {number}"
                    if line.strip():
                        yield where, json.loads(line)
                return
            content = json.load(file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check --dataset") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, {where}: is not JSON ({error})") from None
    if isinstance(content, list):
        yield from ((f"row {n}", row) for n, row in enumerate(content, 1))
        return
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for row in paragraph["qas"]:
                    truths = [] if row.get("is_impossible") else [answer["text"] for answer in row["answers"]]
                    row = {"id": row["id"], "question": row["question"], "answers": {"text": truths}}
                    yield f"id {row['id']!r}", row | {"context": paragraph["context"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is neither a list of questions nor in SQuAD's nested form ({error!r})") from None


def _parse(row, where):
    try:
        truths = row["answers"]["text"]
        question = Question(row["id"], row["context"], row["question"], tuple(truths))
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{where}: lacks one of SQuAD's columns id, context, question, answers.text ({error})"
        ) from None
    texts = (question.id, question.context, question.question, *question.truths)
    if not isinstance(truths, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: id, context, question and the answers' texts must be strings")
    if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
        raise UserError(f"{where}: holds half a character (a lone surrogate)")
    return question


def select(questions, limit=None, sample=None, seed=42):
    """The first `limit` questions, or `sample` drawn ones in the data set's order, or all."""
    if sample is not None and sample < len(questions):
        return [questions[i] for i in sorted(random.Random(seed).sample(range(len(questions)), sample))]
    return questions[:limit]


def digest(questions):
    """A hash of ids, texts and ground truths in order: two runs with the same one asked the same questions."""
    sha = hashlib.sha256()
    for q in questions:
        sha.update(json.dumps([q.id, q.context, q.question, q.truths]).encode())
    return sha.hexdigest()


def normalize(text):
    """SQuAD v1.1's normal form: lower case, no punctuation, no articles, single spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(answer, truth):
    """Harmonic mean of precision and recall over the normal forms' words, 0 to 1; 0 where they share none."""
    answer_words, truth_words = normalize(answer).split(), normalize(truth).split()
    shared = (collections.Counter(answer_words) & collections.Counter(truth_words)).total()
    return 2 * shared / (len(answer_words) + len(truth_words)) if shared else 0.0


def score(answer, truths):
    """EM, F1 (SQuAD v1.1) and pure accuracy (stripped strings equal), each the best over the ground truths."""
    return {
        "em": float(any(normalize(answer) == normalize(truth) for truth in truths)),
        "f1": max(token_f1(answer, truth) for truth in truths),
        "accuracy": float(any(answer.strip() == truth.strip() for truth in truths)),
    }
