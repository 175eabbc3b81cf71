"""Data sets in all their forms: the same questions from each, and a large one within memory and time."""

import gzip
import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from conftest import options as command_line

import common
from experiment import UserError, questions
from experiment.demo import bundled
from experiment.report import folders

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
            qa["answers"] = qa["plausible_answers"] = [{"text": "perhaps", "answer_start": 0}]
        data.append({"title": "t", "paragraphs": [{"context": row["context"], "qas": [qa]}]})
    return {"version": "v2.0", "data": data, "more": [[1], {"data": 2}]}


def write(form, rows, folder):
    """The data set in one of its forms; returns what --dataset is given."""
    if form in WRITERS:
        import datasets

        return WRITERS[form](datasets.Dataset.from_list(rows), folder)
    if form == "nested folder":
        (folder / "data").mkdir()
        (folder / "data" / "dev-v2.0.json").write_text(json.dumps(nested(rows)))
        return folder / "data"
    if form == "nested, compressed":
        with gzip.open(folder / "questions.json.gz", "wt") as file:
            json.dump(nested(rows), file)
        return folder / "questions.json.gz"
    if form == "lines, compressed":
        with gzip.open(folder / "questions (1).jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return folder / "questions (1).jsonl.gz"
    path = folder / ("questions.jsonl" if "lines" in form else "questions.json")
    if form == "lines":
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    elif form == "raw lines":
        path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    else:
        content = {"list": rows, "nested": nested(rows), "rows under data": {"data": rows}}
        if form == "answers as objects":
            content[form] = [row | {"answers": [{"text": text} for text in row["answers"]["text"]]} for row in rows]
        elif form == "answers as texts":
            content[form] = [row | {"answers": row["answers"]["text"]} for row in rows]
        path.write_text(json.dumps(content[form], indent=1), encoding="utf-8")
    return path


def save(write, path):
    write(path)
    return path


WRITERS = {
    "folder": lambda rows, folder: save(rows.to_parquet, folder / "data" / "validation.parquet").parent,
    "folder of CSV": lambda rows, folder: save(rows.to_csv, folder / "validation.csv").parent,
    "parquet": lambda rows, folder: save(rows.to_parquet, folder / "questions.parquet"),
    "CSV": lambda rows, folder: save(rows.to_csv, folder / "questions [1].csv"),
    "CSV, compressed": lambda rows, folder: compress(save(rows.to_csv, folder / "questions.csv")),
    "lines in a .json": lambda rows, folder: save(rows.to_json, folder / "questions.json"),
    "saved": lambda rows, folder: save(rows.save_to_disk, folder / "saved"),
    "arrow": lambda rows, folder: next(save(rows.save_to_disk, folder / "saved").glob("*.arrow")),
    "saved splits": lambda rows, folder: save(split(rows).save_to_disk, folder / "saved"),
}


def compress(path):
    compressed = path.with_name(path.name + ".gz")
    compressed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return compressed


def split(rows):
    import datasets

    return datasets.DatasetDict(train=rows.select([0]), validation=rows)


FORMS = ["lines", "raw lines", "list", "rows under data", "answers as objects", "answers as texts", "nested"]
FORMS += ["nested folder", "nested, compressed", "lines, compressed", *WRITERS]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_questions(form, tmp_path):
    """A folder goes the way of a Hub data set. A file, and what was saved of one split, is read whatever the split."""
    rows = [*ROWS[:5], UNANSWERABLE, *ROWS[5:]]
    loaded, unanswerable, sha = questions.load(str(write(form, rows, tmp_path)), "validation")
    expected = [questions.Question(r["id"], r["context"], r["question"], tuple(r["answers"]["text"])) for r in ROWS]
    assert loaded == expected and unanswerable == 1
    for first in loaded:
        for second in loaded:
            assert (first.context is second.context) == (first.context == second.context)
    (tmp_path / "again.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    assert questions.load(str(tmp_path / "again.jsonl"), "")[1:] == (0, sha)


def test_the_hash_is_that_of_earlier_files():
    """Files that are already out there are compared by it."""
    run = json.loads((ROOT / "activations_baseline.json").read_text())["run"]
    loaded, unanswerable, sha = questions.load(bundled("demo/questions.jsonl"), "")
    assert (len(loaded), unanswerable, sha) == (run["asked"], 0, run["questions"])


def test_the_hash_sees_every_part(tmp_path):
    def load(rows):
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return questions.load(str(tmp_path / "rows.jsonl"), "")[2]

    first, *rest = ROWS
    changed = [first | {name: "other"} for name in ("id", "context", "question")] + [
        first | {"answers": {"text": ["other"]}}, first | {"answers": {"text": [*first["answers"]["text"], "other"]}}
    ]  # fmt: skip
    shas = [load(rows) for rows in (ROWS, [*rest, first], rest, *([row, *rest] for row in changed))]
    assert len(set(shas)) == len(shas) == 8
    assert load([row | {"title": "other"} for row in ROWS]) == shas[0]


def test_a_data_set_that_needs_a_split(tmp_path):
    with pytest.raises(UserError, match="data: has the splits validation: give one as --split$"):
        questions.load(str(write("folder", ROWS, tmp_path)), "")
    with pytest.raises(UserError, match="data: has the splits validation: give one as --split .*train"):
        questions.load(str(tmp_path / "data"), "train")
    with pytest.raises(UserError, match="saved: has the splits train, validation: give one as --split"):
        questions.load(str(write("saved splits", ROWS, tmp_path)), "test")


def test_configurations(tmp_path):
    """They are named, and one of them is chosen."""
    for name in ("zh", "de"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text(json.dumps(ROWS[0] | {"id": name}))
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: zh\n  data_files:\n  - split: validation\n    path: zh/*.jsonl\n"
        "- config_name: de\n  data_files:\n  - split: validation\n    path: de/*.jsonl\n---\n"
    )
    for given in (None, "fr"):
        with pytest.raises(UserError, match="has the configurations zh, de: give one as --dataset-config, .* --split"):
            questions.load(str(tmp_path), "validation", given)
    for name in ("zh", "de"):
        (question,), *_ = questions.load(str(tmp_path), "validation", name)
        assert question.id == name
    with pytest.raises(UserError, match="--dataset-config zh: .*saved has no configurations: leave it out"):
        questions.load(str(write("saved splits", ROWS, tmp_path)), "validation", "zh")
    file = str(tmp_path / "zh" / "rows.jsonl")
    assert questions.load(file, "")[0][0].id == "zh"
    with pytest.raises(UserError, match="--dataset-config zh: .*rows.jsonl has no configurations: leave it out"):
        questions.load(file, "", "zh")


def test_the_command_line_chooses_a_configuration(tmp_path, monkeypatch):
    """It is in the run, with which the page reads the questions again."""
    asked = []

    def load(*arguments):
        asked.append(arguments)
        return [questions.Question("1", "c", "q", ("a",))], 0, "0f"

    monkeypatch.setattr(questions, "load", load)
    experiment = common.prepare(command_line("--dataset", "org/data", "--split", "test", "--dataset-config", "zh"))
    assert experiment.provenance.dataset_config == "zh"
    assert folders._load_questions(experiment.provenance.with_fields(questions="0f"))
    assert asked == [("org/data", "test", "zh")] * 2


def test_what_is_no_ground_truth(tmp_path):
    """Of an unanswerable question the answers are only plausible; a blank text is none."""
    rows = [ROWS[0], ROWS[1] | {"is_impossible": True}, ROWS[2] | {"answers": {"text": ["", "two"]}}]
    rows += [ROWS[3] | {"answers": {"text": [" "]}}, ROWS[4] | {"answers": None}]
    rows += [ROWS[5] | {"is_impossible": False}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loaded, unanswerable, _ = questions.load(str(tmp_path / "rows.jsonl"), "")
    assert [question.id for question in loaded] == [ROWS[n]["id"] for n in (0, 2, 5)] and unanswerable == 3
    assert loaded[1].truths == ("two",)


def test_cells_of_csv_are_texts(tmp_path):
    """Neither numbers nor missing, whatever they look like."""
    (tmp_path / "rows.csv").write_text(
        "id,context,question,answers,is_impossible\n"
        "007,1.50,1903,0070,False\n"
        "2,NA,null,NA,\n"
        '3,c,q,"{""text"": [""é, 1""]}",true\n'
        "4,c,q,,false\n"
        '5,c,q,"[""[x]""]",0\n'
    )
    loaded, unanswerable, _ = questions.load(str(tmp_path / "rows.csv"), "")
    assert loaded == [
        questions.Question("007", "1.50", "1903", ("0070",)),
        questions.Question("2", "NA", "null", ("NA",)),
        questions.Question("5", "c", "q", ("[x]",)),
    ]
    assert unanswerable == 2


def test_numbers_as_ids(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(nested([row | {"id": n} for n, row in enumerate(ROWS)])))
    loaded, *_ = questions.load(str(tmp_path / "rows.json"), "")
    assert [question.id for question in loaded] == [str(n) for n in range(len(ROWS))]
    (tmp_path / "twice.json").write_text(json.dumps([ROWS[0] | {"id": 7}, ROWS[1] | {"id": "7"}]))
    with pytest.raises(UserError, match="row 2: the id '7' stands twice"):
        questions.load(str(tmp_path / "twice.json"), "")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("d.jsonl", "[" * 100_000, "line 1: is not JSON"),
        ("d.json", "[" * 100_000, "is not JSON"),
        ("d.json", '{"data": [}', "is not JSON"),
        ("d.json", '"\udcff"', "is not JSON ('utf-8' codec"),
        ("d.json", '{"data": 3}', "neither a list of questions nor"),
        ("d.json", '{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "1"}]}]}]}', "id '1': lacks one of"),
        ("d.json", '{"data": [{"paragraphs": [{"qas": [{"id": "1"}]}]}]}', "neither a list of questions nor"),
        ("d.json", json.dumps([ROWS[0], ROWS[0] | {"id": "x", "context": ["c"]}]), "row 2: context, question"),
        ("d.json", json.dumps(nested([ROWS[0], ROWS[0]])), "id '4-4-0': the id '4-4-0' stands twice"),
        ("d.json", json.dumps(nested([UNANSWERABLE])), "no question with a ground truth in it"),
        ("d.json", json.dumps({"rows": ROWS}), "neither a list of questions nor"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as error:
        questions.load(str(tmp_path / name), "")
    assert str(tmp_path / name) in str(error.value) and says in str(error.value) and "\n" not in str(error.value)


def test_select():
    numbers = list(range(100))  # it does not look into them
    assert questions.select(numbers) == questions.select(numbers, 100) == questions.select(numbers, 101) == numbers
    assert questions.select(numbers, limit=3) == [0, 1, 2]
    drawn = questions.select(numbers, sample=10, seed=7)
    assert drawn == sorted(set(drawn)) and len(drawn) == 10 and drawn == questions.select(numbers, sample=10, seed=7)
    assert drawn != questions.select(numbers, sample=10, seed=8)
    assert questions.select(numbers, sample=100) == questions.select(numbers, sample=101) == numbers
    loaded, *_ = questions.load(bundled("demo/questions.jsonl"), "")
    drawn = [question.id for question in questions.select(loaded, sample=5, seed=7)]
    # As earlier versions drew them: a journal of theirs goes on with the same questions.
    assert drawn == ["questions-011-0", "questions-017-2", "questions-037-0", "questions-080-1", "questions-099-0"]


MEASURE = """
import sys
from experiment import questions
loaded, _, _ = questions.load(sys.argv[1], "validation")
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # resource's is the parent's too
print(len(loaded), len({id(question.context) for question in loaded}), int(peak.split()[1]) // 1024)
"""


@pytest.mark.parametrize("form", ["lines", "list", "folder"])
def test_a_hundred_thousand_questions_of_squads_size(form, tmp_path):
    """In less than 1 GB."""
    context, question = "context “x” " * 62, "why? " * 12
    start, between, end = ("[", ",", "]") if form == "list" else ("", "\n", "")
    path = tmp_path / ("questions.json" if form == "list" else "questions.jsonl")
    with open(path, "w") as file:
        for n in range(100_000):
            # By hand: json.dumps would take longer than what is measured.
            file.write(
                f'{between if n else start}{{"id": "{n:024}", "context": "{context}{n // 5}", '
                f'"question": "{question}{n}", "answers": {{"text": ["twenty letters long"]}}}}'
            )
        file.write(end)
    if form == "folder":
        path.rename(tmp_path / "validation.jsonl")
        path = tmp_path
    done = subprocess.run([sys.executable, "-c", MEASURE, path], cwd=ROOT, capture_output=True, text=True)
    shutil.rmtree(tmp_path)
    count, contexts, megabytes = map(int, done.stdout.split())
    assert (count, contexts) == (100_000, 20_000) and megabytes < 1000
