"""Data sets in all their forms, and what outgrows memory: the same questions from each, and none of them kept there."""

import json
import tracemalloc

import pytest
from conftest import run_script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_inputs import RUN
from test_rounds import read_journal

from experiment import UserError, questions, records, streams

ROWS = [
    {"id": f"{c}-{q}", "context": f"Context {c}: “x”\u2028y", "question": f"Question {q}?",
     "answers": {"text": ["one", f"answer {q}"][: 2 - q % 2], "answer_start": [0, 3][: 2 - q % 2]}}
    for c in (4, 2, 4, 9) for q in range(c, c + 3)
]  # fmt: skip
ROWS = [row | {"id": f"{row['id']}-{number}"} for number, row in enumerate(ROWS)]
UNANSWERABLE = {"id": "none", "context": "c", "question": "q", "answers": {"text": [], "answer_start": []}}


def nested(rows):
    """SQuAD's own form: v2.0's, where an unanswerable question says so and may have answers that are only plausible."""
    data = []
    for row in rows:
        answers = [{"text": t, "answer_start": s} for t, s in zip(*row["answers"].values())]
        qa = {"id": row["id"], "question": row["question"], "answers": answers, "is_impossible": not answers}
        if not answers:
            qa["plausible_answers"] = [{"text": "perhaps", "answer_start": 0}]
        data.append({"title": "t", "paragraphs": [{"context": row["context"], "qas": [qa]}]})
    return {"version": "v2.0", "data": data, "more": [[1], {"data": 2}]}


def write(form, rows, folder):
    """The data set in one of its forms; returns what --dataset is given."""
    if form == "folder":
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(folder / "data" / "validation.parquet")
        return folder / "data"
    path = folder / ("questions.jsonl" if form == "lines" else "questions.json")
    if form == "lines":
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    elif form == "raw lines":
        path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows if form == "list" else nested(rows), indent=1), encoding="utf-8")
    return path


@pytest.mark.parametrize("form", ["lines", "list", "nested", "folder"])
def test_every_form_gives_the_same_questions(form, tmp_path):
    """A folder goes the way of a Hub data set."""
    rows = [*ROWS[:5], UNANSWERABLE, *ROWS[5:]]
    found, unanswerable, digest = questions.load(str(write(form, rows, tmp_path)), "validation")
    expected = [questions.Question(r["id"], r["context"], r["question"], tuple(r["answers"]["text"])) for r in ROWS]
    assert list(found) == expected and unanswerable == 1 and found.ids == [q.id for q in expected]
    for a, first in enumerate(expected):
        for b, second in enumerate(expected):
            assert (found.contexts[a] == found.contexts[b]) == (first.context == second.context)
    (tmp_path / "again.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    assert questions.load(str(tmp_path / "again.jsonl"), "")[2] == digest
    last = found.only([7, 2])
    assert list(last) == [expected[7], expected[2]] and len(last) == 2 and last.ids == [expected[7].id, expected[2].id]


def test_a_round_from_a_folder_and_from_nested_json(demo_questions, tmp_path, monkeypatch, capsys):
    """The demo's first questions by way of `datasets` and in SQuAD's form answer as they do line by line."""
    rows = [
        {"id": q.id, "context": q.context, "question": q.question,
         "answers": {"text": list(q.truths), "answer_start": [0] * len(q.truths)}}
        for q in demo_questions[:12]
    ]  # fmt: skip
    found = []
    for form in ("lines", "nested", "folder"):
        arguments = ["--demo", "--dataset", write(form, [*rows, UNANSWERABLE], tmp_path)]
        arguments += ["--split", "validation", "--output-dir", tmp_path / form]
        code, _, err = run_script("baseline", arguments, monkeypatch, capsys)
        assert code == 0 and "1 questions without a ground truth are left out" in err
        found.append(read_journal(tmp_path / form / "predictions_baseline.jsonl")[1])
    assert found[0] == found[1] == found[2] and len(found[0]) == 12


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("abcd"), inner, max_size=4),
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=JSON)
def test_pieces_are_what_json_load_gives(content, tmp_path):
    path = tmp_path / "any.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    expected = []
    if isinstance(content, list):
        expected = [(None, element) for element in content]
    elif isinstance(content, dict):
        for key, value in content.items():
            expected += [(key, element) for element in value] if isinstance(value, list) else [(key, value)]
    assert list(streams.pieces(path)) == expected


def test_a_spool_is_a_list(monkeypatch):
    spool, expected = streams.Spool(), []
    for number in range(300):  # three megabytes: memory's share is one
        expected.append({"number": number, "text": "ü\u2028" * 5000 if number % 2 else ""})
        spool.append(expected[-1])
        assert spool[number // 3] == expected[number // 3]
    assert len(spool) == 300 and list(spool) == expected
    for number in (300, -1):
        with pytest.raises(IndexError):
            spool[number]

    def full(data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spool._file, "write", full)
    with pytest.raises(UserError, match="No space left on device.*TMPDIR"):
        spool.append(1)


def peak(read, *arguments):
    """Bytes that were in use at most while `read` ran."""
    tracemalloc.start()
    read(*arguments)
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


@pytest.mark.parametrize("form", ["lines", "list", "nested", "activations"])
def test_memory_does_not_grow_with_the_texts(form, tmp_path):
    """From 600 to 1,600 questions of 6 KB each: what is kept of one is its id and a few numbers."""
    used = []
    for count in (600, 1600):
        if form == "activations":
            path = tmp_path / "activations.json"
            latents = list(range(60))
            samples = (
                {"id": f"question {n}", "answer": "a" * 1500, "active": latents, "topk": latents, "bottomk": latents}
                for n in range(count)
            )
            records.write_activations(path, RUN, samples)
            used.append(peak(records.read_activations, path))
        else:
            rows = [ROWS[0] | {"id": f"question {n}", "context": f"{n} " + "context " * 750} for n in range(count)]
            path = write(form, rows, tmp_path)
            del rows
            used.append(peak(questions.load, str(path), ""))
    assert used[1] - used[0] < 1000 * 500, used
