"""SQuAD questions in, scores out. Knows nothing of models."""

import array
import collections
import hashlib
import json
import random
import re
import string
from dataclasses import dataclass
from pathlib import Path

from experiment import UserError, streams


@dataclass(frozen=True, slots=True)
class Question:
    id: str
    context: str
    question: str
    truths: tuple[str, ...]  # the ground truths: any one of them is right


@dataclass(frozen=True)
class Questions:
    """A list of Questions, texts on disk: only ids and numbers stay in memory."""

    ids: list[str]
    contexts: array.array  # a number for each question, the same for those on one context
    _texts: streams.Spool
    _places: array.array  # in _texts

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, number):
        question_id, context, question, truths = self._texts[self._places[number]]
        return Question(question_id, context, question, tuple(truths))

    def only(self, numbers):
        """Those with these numbers, in this order."""
        numbers = list(numbers)
        contexts, places = (array.array("q", map(of.__getitem__, numbers)) for of in (self.contexts, self._places))
        return Questions([self.ids[number] for number in numbers], contexts, self._texts, places)


def load(dataset, split):
    """Reads a data set: its Questions, in its order, how many were left out for having no ground truth, and a hash of
    ids, texts and ground truths: two runs with the same one asked the same questions.

    `dataset` is a local .jsonl (SQuAD's columns, one object a line), a local .json (a list of such objects, or SQuAD's
    nested form) or the name of a Hub data set with SQuAD's columns, of which `split` is read.
    Raises UserError, naming the row, for anything that is not a question, and for an id that stands twice.
    """
    if is_local(dataset):
        rows = _read_local(Path(dataset))
    else:
        import datasets  # slow to import, and a local file does not need it

        rows = ((f"row {n}", row) for n, row in enumerate(datasets.load_dataset(dataset, split=split), 1))
    ids, contexts, texts = [], array.array("q"), streams.Spool()
    seen, numbers, unanswerable, sha = set(), {}, 0, hashlib.sha256()
    for where, row in rows:
        question = _parse(row, f"{dataset}, {where}")
        if question.id in seen:
            raise UserError(f"{dataset}, {where}: the id {question.id!r} stands twice")
        seen.add(question.id)
        if not question.truths:
            unanswerable += 1
            continue
        ids.append(question.id)
        context = hashlib.blake2b(question.context.encode(), digest_size=16).digest()
        contexts.append(numbers.setdefault(context, len(numbers)))
        fields = [question.id, question.context, question.question, question.truths]
        texts.append(fields)
        sha.update(json.dumps(fields).encode())
    if not ids:
        forms = " (its form must be a list of questions, or SQuAD's nested one)" if dataset.endswith(".json") else ""
        raise UserError(f"{dataset}: no question with a ground truth in it{forms}")
    return Questions(ids, contexts, texts, array.array("q", range(len(ids)))), unanswerable, sha.hexdigest()


def is_local(dataset):
    return dataset.endswith((".json", ".jsonl"))


def _read_local(path):
    """Yields (where, row) of a local file, whichever of the three forms it has."""
    try:
        yield from _read_lines(path) if path.suffix == ".jsonl" else _read_json(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check --dataset") from None


def _read_lines(path):
    number = 0
    try:
        # JSON strings may hold other line separators than \n: they end no line.
        with open(path, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"line {number}", json.loads(line)
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: is not JSON ({error})") from None


def _read_json(path):
    try:
        for number, (key, value) in enumerate(streams.pieces(path), 1):
            if key is None:
                yield f"row {number}", value
            elif key == "data":
                for paragraph in value["paragraphs"]:
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
    numbers = range(len(questions))
    if sample is not None and sample < len(questions):
        return questions.only(sorted(random.Random(seed).sample(numbers, sample)))
    return questions.only(numbers[:limit])


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
