"""Bad inputs: each is refused with exit code 2 and one line that names it, and no file is changed. No input file makes
a reader raise anything but our own error."""

import json

import pytest
from conftest import ROOT, run_script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiment import UserError, questions, records

ROW = {"id": "1", "context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [0]}}
DATA = {  # name: (file name, content, what the line says)
    "empty jsonl": ("d.jsonl", "", "no question"),
    "no json": ("d.jsonl", "{", "line 1: is not JSON"),
    "second line no json": ("d.jsonl", json.dumps(ROW) + "\nnonsense\n", "line 2: is not JSON"),
    "a number a line": ("d.jsonl", "1\n", "line 1: lacks one"),
    "no id": ("d.jsonl", json.dumps({k: v for k, v in ROW.items() if k != "id"}), "'id'"),
    "id a number": ("d.jsonl", json.dumps(ROW | {"id": 1}), "must be strings"),
    "no context": ("d.jsonl", json.dumps({k: v for k, v in ROW.items() if k != "context"}), "'context'"),
    "no answers": ("d.jsonl", json.dumps(ROW | {"answers": None}), "lacks one"),
    "answers a text": ("d.jsonl", json.dumps(ROW | {"answers": {"text": "a"}}), "must be strings"),
    "id twice": ("d.jsonl", json.dumps(ROW) + "\n" + json.dumps(ROW), "line 2: the id '1' stands twice"),
    "all unanswerable": ("d.jsonl", json.dumps(ROW | {"answers": {"text": []}}), "no question with a ground truth"),
    "half a character": ("d.jsonl", json.dumps(ROW | {"id": "\ud800"}), "half a character"),
    "not utf-8": ("d.jsonl", b"\xff\xfe", "is not UTF-8"),
    "json: a number": ("d.json", "7", "no question"),
    "json: empty object": ("d.json", "{}", "form must be a list of questions, or SQuAD's"),
    "json: empty list": ("d.json", "[]", "no question"),
    "json: deep": ("d.json", "[" * 100_000, "is not JSON"),
    "json: qas a number": ("d.json", '{"data": [{"paragraphs": [{"context": "c", "qas": 3}]}]}', "neither a list"),
}
SAMPLE = {"id": "questions-000-0", "answer": "a", "em": 1.0, "f1": 1.0, "active": [1, 2], "topk": [1], "bottomk": [2]}
RUN = json.loads((ROOT / "activations_baseline.json").read_text())["run"]


def activations(run=None, **changed):
    return json.dumps({"run": RUN | (run or {}), "samples": [SAMPLE | changed]})


ACTIVATIONS = {
    "no json": ("{", "is not JSON"),
    "a number": ("3", "it is not round 1's file"),
    "an empty object": ("{}", "it is not round 1's file"),
    "no run": (json.dumps({"samples": [SAMPLE]}), "names no run"),
    "run a number": (json.dumps({"samples": [SAMPLE], "run": 3}), "names no run"),
    "no samples": (json.dumps({"run": RUN, "samples": []}), "holds no sample"),
    "sample a number": (json.dumps({"run": RUN, "samples": [1]}), "sample 1: lacks id"),
    "no answer": (json.dumps({"run": RUN, "samples": [{"id": "x"}]}), "lacks id or answer"),
    "topk a text": (activations(topk="12"), "topk is not a list"),
    "topk with a float": (activations(topk=[1.5]), "topk is not a list"),
    "topk negative": (activations(topk=[-1]), "topk is not a list"),
    "bottomk missing": (activations(bottomk=None), "bottomk is not a list"),
    "active with true": (activations(active=[True]), "active is not a list"),
    "id twice": (json.dumps({"run": RUN, "samples": [SAMPLE, SAMPLE]}), "sample 2: the id"),
    "another model": (activations({"model": "gemma-2-9b-it"}), 'model "gemma-2-9b-it", now "demo/model"'),
    "another SAE": (activations({"sae_id": "layer_20"}), 'sae_id "layer_20"'),
    "other questions": (activations({"questions": "0" * 64}), "questions"),
    "another dtype": (activations({"dtype": "float16"}), 'dtype "float16"'),
    "another prompt": (activations({"prompt_template": "{context}{question}"}), "prompt_template"),
    "another width": (activations({"d_sae": 7}), "d_sae 7"),
    "latent outside the SAE": (activations(topk=[10**9]), "names latent 1000000000"),
    "none of these questions": (activations(id="of another data set"), "none of its questions"),
    "theirs: a list of numbers": ("[1]", "entry 1: is not of the authors'"),
    "theirs: a list of lists": ('[{"prompt": [1]}]', "entry 1: is not of the authors'"),
    "theirs: no lists": ('[{"prompt": {}}]', "active is not a list"),
    "theirs: all empty": ("[{}, {}]", "holds no sample"),
    "theirs: other prompts": (
        '[{"prompt": {"original": [1], "have_gradient": [1], "no_gradient": [1]}}]',
        "none of its questions",
    ),
}
RECORD = {"id": "questions-000-0", "text": "t", "answer": "a", "em": 1.0, "f1": 1.0, "accuracy": 1.0}
JOURNALS = {
    "empty": ("", "line 1: names no run"),
    "no run": ("{}\n", "line 1: is damaged"),
    "damaged in the middle": ('{"run": {}}\nnonsense\n' + json.dumps(RECORD) + "\n", "line 2: is damaged"),
    "a list": ('{"run": {}}\n[]\n', "line 2: is damaged"),
    "no scores": ('{"run": {}}\n{"id": "1", "text": "", "answer": ""}\n', "line 2: is damaged"),
    "score of 7": ('{"run": {}}\n' + json.dumps(RECORD | {"em": 7.0}) + "\n", "line 2: is damaged"),
    "id twice": ('{"run": {}}\n' + 2 * (json.dumps(RECORD) + "\n"), "line 3: is damaged"),
    "another run's": (json.dumps({"run": RUN | {"demo": False, "model": "other"}}) + "\n", 'model "other"'),
    "not utf-8": (b'{"run": {}}\n\xff\n', "line 2: is damaged"),
}
RESULTS = {
    "no json": ("[", "is not JSON"),
    "an object": ("{}", "is not a file of results"),
    "a list of numbers": ("[1]", "is not a file of results"),
    "another run's": (json.dumps([{"run": {"model": "other"}, "round": "false", "k": "50%"}]), 'model "other"'),
}
TEMPLATES = {
    "no context": ("{question}", "{context} exactly once"),
    "no question": ("{context}", "{question} exactly once"),
    "context twice": ("{context}{context}{question}", "{context} exactly once"),
    "not utf-8": (b"\xff", "nor a text file"),
}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))


def assert_refused(script, arguments, says, tmp_path, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    arguments = ["--demo", "--output-dir", tmp_path, *arguments]
    code, out, err = run_script(script, arguments, monkeypatch, capsys)
    news = ("Loading ", "Round 1: ", str(tmp_path))  # what is going on, what was found; the error is the last line
    lines = [line for line in err.splitlines() if line and not line.startswith(news)]
    assert (code, out, len(lines)) == (2, "", 1), err
    assert says in lines[0] and lines[0].startswith(f"{script}.py: "), err
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    assert before == after


@pytest.mark.parametrize("case", DATA)
def test_data_sets(case, tmp_path, monkeypatch, capsys):
    name, content, says = DATA[case]
    write(tmp_path / name, content)
    assert_refused("baseline", ["--dataset", tmp_path / name], says, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_activations(case, tmp_path, monkeypatch, capsys):
    content, says = ACTIVATIONS[case]
    write(tmp_path / "activations_baseline.json", content)
    assert_refused("baseline_after_false", [], says, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("case", JOURNALS)
def test_journals(case, tmp_path, monkeypatch, capsys):
    content, says = JOURNALS[case]
    write(tmp_path / "predictions_baseline.jsonl", content)
    assert_refused("baseline", [], says, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("case", RESULTS)
def test_results(case, tmp_path, monkeypatch, capsys):
    content, says = RESULTS[case]
    write(tmp_path / "results.json", content)
    assert_refused("baseline", [], says, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("case", TEMPLATES)
def test_templates(case, tmp_path, monkeypatch, capsys):
    content, says = TEMPLATES[case]
    write(tmp_path / "template.txt", content)
    arguments = ["--prompt-template", tmp_path / "template.txt"]
    assert_refused("baseline", arguments, says, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("k", ["0", "0%", "51%", "-1", "1.5", "ten", "", "50 %"])
def test_k(k, tmp_path, monkeypatch, capsys):
    assert_refused("baseline_after_false", [f"--k={k}"], "--k", tmp_path, monkeypatch, capsys)


def test_no_activations(tmp_path, monkeypatch, capsys):
    assert_refused("baseline_after_true", [], "run baseline.py first", tmp_path, monkeypatch, capsys)


def test_overlong_prompt(tmp_path, monkeypatch, capsys):
    write(tmp_path / "long.jsonl", json.dumps(ROW | {"id": "the long one", "context": "The harp. " * 300}))
    arguments = ["--dataset", tmp_path / "long.jsonl"]
    assert_refused("baseline", arguments, "question the long one: its prompt of", tmp_path, monkeypatch, capsys)


def test_logits_that_are_not_finite(demo, tmp_path, monkeypatch, capsys):
    """An SAE that overflows: the round stops with one line, and writes no answer."""
    from test_loading import save_sae

    save_sae(tmp_path / "sae", bias=float("inf"))
    arguments = ["--sae-release", tmp_path / "sae", "--limit", "5"]
    assert_refused("baseline", arguments, "not finite", tmp_path, monkeypatch, capsys)


# --- any file at all --------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYS = ["id", "context", "question", "answers", "text", "data", "paragraphs", "qas", "is_impossible", "run", "samples"]
KEYS += ["answer", "em", "f1", "accuracy", "active", "topk", "bottomk", "original", "have_gradient", "no_gradient"]
KEYS += ["put_off", "round", "k", "demo", "model"]
NEAR = st.recursive(  # JSON made of the very names that the readers look for
    JSON,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=8),
    max_leaves=20,
)
CONTENT = (
    st.binary(max_size=200)
    | NEAR.map(lambda value: json.dumps(value).encode())
    | st.lists(NEAR, max_size=4).map(lambda values: b"\n".join(json.dumps(value).encode() for value in values) + b"\n")
)
READERS = {
    "d.json": lambda path: questions.load(str(path), ""),
    "d.jsonl": lambda path: questions.load(str(path), ""),
    "activations.json": lambda path: records.read_activations(path),
    "journal.jsonl": lambda path: records.Journal(path, {"model": "m"}, notify=lambda text: None),
    "results.json": lambda path: records.read_results(path, {"model": "m"}, False, lambda text: None),
}


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=CONTENT)
def test_readers_raise_nothing_else(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    try:
        READERS[name](tmp_path / name)
    except UserError as error:
        assert str(tmp_path / name) in str(error)
