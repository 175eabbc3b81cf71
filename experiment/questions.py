"""SQuAD questions, from whatever file or data set holds them. Knows nothing of models."""

import ast
import glob
import hashlib
import json
import logging
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiment import UserError, os_errors, parse_json

if TYPE_CHECKING:
    import datasets

# What save_to_disk leaves in a folder: of one split, and of several.
SAVED_SPLIT = "state.json"
SAVED_SPLITS = "dataset_dict.json"
TRUTH_VALUES = {"true": True, "1": True, "false": False, "0": False, "": None}  # of is_impossible, in CSV
CSV_COLUMNS = ("id", "context", "question", "answers", "is_impossible")


@dataclass(frozen=True, slots=True)
class Question:
    id: str
    context: str
    question: str
    truths: tuple[str, ...]  # the ground truths: any one of them is right


def load(dataset: str, split: str | None, config: str | None = None) -> tuple[list[Question], int, str]:
    """Reads a data set. Returns its questions, in its order; how many were left out for having no ground truth; and a
    hash of ids, texts and ground truths: two runs with the same one asked the same questions.

    dataset: a file, a folder or a Hub data set: whatever the `datasets` package reads, in SQuAD's columns (answers as
    lists, as objects in a list, or as texts) or in its nested form. A .jsonl or .json is read without that package.
    split: of a folder or a Hub data set the part that is read.  config: of one with configurations that which is read.
    Raises UserError, naming the row, for anything that is not a question, and for an id that stands twice.
    """
    is_saved = os.path.isfile(os.path.join(dataset, SAVED_SPLITS))
    if config and (is_saved or is_local(dataset)):
        raise UserError(f"--dataset-config {config}: {dataset} has no configurations: leave it out")
    questions: list[Question] = []
    ids: set[str] = set()
    sha = hashlib.sha256()
    for place, row in _read_rows(dataset, split, config):
        where = f"{dataset}, {place}"
        question = _make_question(row, where)
        if question.id in ids:
            raise UserError(f"{where}: the id {question.id!r} stands twice")
        ids.add(question.id)
        if not question.truths:
            continue
        questions.append(question)
        fields = [question.id, question.context, question.question, question.truths]
        text = json.dumps(fields)
        sha.update(text.encode())
    if not questions:
        raise UserError(f"{dataset}: no question with a ground truth in it")
    left_out = len(ids) - len(questions)
    return questions, left_out, sha.hexdigest()


def is_local(dataset: str) -> bool:
    """Whether a data set is one file, or what save_to_disk wrote of one split: of these --split says nothing."""
    if _is_plain(dataset) or os.path.isfile(dataset):
        return True
    return os.path.isfile(os.path.join(dataset, SAVED_SPLIT))


def _is_plain(dataset: str) -> bool:
    return dataset.endswith((".json", ".jsonl"))


def _read_rows(dataset: str, split: str | None, config: str | None) -> Iterator[tuple[str, object]]:
    """Yields (where, row) of each question, the row with SQuAD's columns unless the data set is wrong."""
    rows = _read_plain(dataset) if _is_plain(dataset) else _read_with_datasets(dataset, split, config)
    for where, row in rows:
        try:
            yield from _unfold(where, row)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{dataset}, {where}: is neither a list of questions nor in SQuAD's nested form ({error!r})"
            ) from None


def _unfold(where: str, row: object) -> Iterator[tuple[str, object]]:
    """Yields (where, row) of each question in a row: itself, or those in an object of SQuAD's nested form, which holds
    articles or rows ("data"), an article's paragraphs, or a paragraph's questions ("qas")."""
    if not isinstance(row, dict) or "question" in row:
        yield where, row
    elif "data" in row:
        for number, part in enumerate(row["data"], 1):
            yield from _unfold(f"row {number}", part)
    elif "paragraphs" in row:
        for paragraph in row["paragraphs"]:
            yield from _unfold(where, paragraph)
    elif "qas" in row:
        for question in row["qas"]:
            yield f"id {question['id']!r}", {"context": row["context"]} | question
    else:
        yield where, row


def _read_plain(path: str) -> Iterator[tuple[str, object]]:
    """Yields (where, row) of a .json, or of a .jsonl, an object per line. A .json may hold lines too, as `datasets` and
    pandas write them."""
    content = _parse_whole(path) if path.endswith(".json") else None
    if content is None:
        with os_errors(f"{path}: cannot be read"), open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"line {number}"
                    yield where, parse_json(line, f"{path}, {where}")
    elif isinstance(content, list):
        for number, row in enumerate(content, 1):
            yield f"row {number}", row
    elif isinstance(content, dict) and "data" in content:
        yield "data", content
    else:
        raise UserError(f"{path}: is neither a list of questions nor in SQuAD's nested form")


def _parse_whole(path: str) -> object:
    """The value in a file that holds one; None where it holds something else."""
    with os_errors(f"{path}: cannot be read"), open(path, "rb") as file:
        try:
            return json.loads(file.read())
        except (ValueError, RecursionError):
            return None


def _read_with_datasets(dataset: str, split: str | None, config: str | None) -> Iterator[tuple[str, object]]:
    """Yields (where, row) of what the `datasets` package reads: a file, a folder, a Hub data set."""
    import datasets  # slow to import, and a plain file of rows does not need it

    # What cannot be read is an exception, of which the person gets one line: they log it as well, in several.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    if os.path.exists(dataset):
        datasets.disable_progress_bars()  # of what is converted; nobody waits for a download
    is_csv = False
    if os.path.isfile(os.path.join(dataset, SAVED_SPLIT)):
        rows = datasets.load_from_disk(dataset)
    elif os.path.isfile(os.path.join(dataset, SAVED_SPLITS)):
        saved = datasets.load_from_disk(dataset)
        if split is None or split not in saved:
            raise UserError(_ask_for_split(dataset, saved))
        rows = saved[split]
    else:
        builder, is_csv = _find_builder(dataset, config)
        builder.download_and_prepare()
        if os.path.isfile(dataset):
            split = next(iter(builder.info.splits))  # its only one, whatever its name
        if not split:
            raise UserError(_ask_for_split(dataset, builder.info.splits))
        try:
            rows = builder.as_dataset(split)
        except ValueError as error:
            raise UserError(f"{_ask_for_split(dataset, builder.info.splits)} ({error})") from None
    for number, row in enumerate(rows, 1):
        where = f"row {number}"
        if is_csv:
            row = _read_cells(row, f"{dataset}, {where}")
        yield where, row


def _ask_for_split(dataset: str, splits: Iterable[str]) -> str:
    named = ", ".join(str(split) for split in splits)
    return f"{dataset}: has the splits {named}: give one as --split"


def _find_builder(dataset: str, config: str | None) -> tuple["datasets.DatasetBuilder", bool]:
    """What reads this data set, and whether it is CSV."""
    import datasets

    path = dataset
    which = {}
    if os.path.isfile(dataset):
        path = os.path.dirname(os.path.abspath(dataset))
        which["data_files"] = glob.escape(os.path.basename(dataset))
    try:
        builder = datasets.load_dataset_builder(path, config, **which)
    except ValueError as error:
        if "onfig" not in str(error):  # Config name is missing; BuilderConfig ... not found
            raise
        names = ", ".join(datasets.get_dataset_config_names(path))
        raise UserError(
            f"{dataset}: has the configurations {names}: give one as --dataset-config, and one of its splits as --split"
        ) from None
    if not hasattr(builder.config, "keep_default_na"):
        return builder, False
    # All cells as they are: else the answer 007 would be the number 7, and NA none.
    texts = {"converters": dict.fromkeys(CSV_COLUMNS, str), "keep_default_na": False}
    return datasets.load_dataset_builder(path, config, **which, **texts), True


def _read_cells(row: dict[str, object], where: str) -> dict[str, object]:
    """A row of CSV, all of it texts, as other forms have it: answers that were written as an object or a list (by
    datasets or pandas: Python's; by others: JSON) are one again, and is_impossible is true or false."""
    row = dict(row)
    impossible = row.get("is_impossible")
    if isinstance(impossible, str):
        row["is_impossible"] = TRUTH_VALUES.get(impossible.lower(), impossible)
    answers = row.get("answers")
    if isinstance(answers, str) and answers.startswith(("{", "[")):
        try:
            row["answers"] = json.loads(answers)
        except (ValueError, RecursionError):
            row["answers"] = _read_literal(answers, where)
    return row


def _read_literal(text: str, where: str) -> object:
    """The value that Python's repr wrote, in which NumPy's arrays are lists."""
    try:
        tree = _Arrays().visit(ast.parse(text, mode="eval"))
        return ast.literal_eval(tree)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise UserError(f"{where}: the answers are neither a text nor an object with text: {text[:60]!r}") from None


class _Arrays(ast.NodeTransformer):
    """array([...], dtype=object) is [...]."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        is_array = isinstance(node.func, ast.Name) and node.func.id == "array"
        if is_array and len(node.args) == 1:
            return node.args[0]
        return node


def _make_question(row: Any, where: str) -> Question:
    """The Question in a row. Raises UserError where it is none."""
    try:
        question_id = row["id"]
        context = row["context"]
        question = row["question"]
        truths = _find_truths(row["answers"])
        is_impossible = row.get("is_impossible") or False
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(
            f"{where}: lacks one of SQuAD's columns id, context, question, answers.text ({error})"
        ) from None
    if type(question_id) is int:
        question_id = str(question_id)
    texts = [question_id, context, question, *truths]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(
            f"{where}: context, question and the answers' texts must be strings, the id a string or a whole number"
        )
    if any(re.search(r"[\ud800-\udfff]", text) for text in texts):
        raise UserError(f"{where}: holds half a character (a lone surrogate)")
    if is_impossible not in (True, False):
        raise UserError(f"{where}: is_impossible must be true or false, not {is_impossible!r}")
    # What is said of SQuAD v2.0's unanswerable questions is only plausible, and a blank text is no answer.
    truths = [] if is_impossible else [text for text in truths if text.strip()]
    # SQuAD asks five questions on a context: interned, they share one string.
    return Question(question_id, sys.intern(context), question, tuple(truths))


def _find_truths(answers: Any) -> list[Any]:
    """The texts of answers: of {"text": [...]}, as SQuAD's columns have them, or of [{"text": ...}, ...], as its nested
    form has them; or they are texts, or one text, themselves. None where they are null. What is none of these is given
    back as it is."""
    if isinstance(answers, dict):
        answers = answers["text"]
    if answers is None:
        return []
    if not isinstance(answers, list):
        return [answers]
    truths = []
    for answer in answers:
        truths.append(answer["text"] if isinstance(answer, dict) else answer)
    return truths


def select(
    questions: list[Question], limit: int | None = None, sample: int | None = None, seed: int | None = 42
) -> list[Question]:
    """The first `limit` questions, or `sample` drawn ones in the data set's order, or all."""
    if sample is None or sample >= len(questions):
        return questions[:limit]
    drawn = random.Random(seed).sample(range(len(questions)), sample)
    return [questions[number] for number in sorted(drawn)]


def hash_population(asked: Iterable[Question]) -> str:
    """A short hash of the questions that a figure is a mean over."""
    ids = "\n".join(question.id for question in asked)
    return hashlib.sha256(ids.encode()).hexdigest()[:16]
