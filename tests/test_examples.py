"""The examples, by the commands and links that README gives; a ranking of one's own in all three rounds."""

import hashlib
import json
import re
import subprocess
import sys

import oracle
import pytest
import torch
from conftest import ROOT, run_script

import common
from examples import interactive
from experiment import own_rankings, prompts

README = (ROOT / "README.md").read_text(encoding="utf-8")
BY_ANSWER = "examples/own_ranking.py:by_answer"
CONSTANT = """
import torch

def constant(model, sequences, seed):
    scores = torch.zeros(len(sequences.rows), model.splice.d_sae)
    scores[:, [3, 5, 4]] = torch.tensor([1.0, 3.0, 2.0])
    return {}
"""


@pytest.fixture(autouse=True)
def fresh_files():
    """A file of rankings is read once per process: here every test is one."""
    own_rankings.load.cache_clear()
    own_rankings._read.cache_clear()


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(script, *arguments): a demo round of a few questions, from the top of the project. As run_script gives it."""
    monkeypatch.chdir(ROOT)

    def check(script, *arguments):
        given = ["--demo", "--limit", 12, "--output-dir", tmp_path / "out", *arguments]
        return run_script(script, given, monkeypatch, capsys)

    return check


def test_quickstart_is_the_first_that_readme_shows():
    """On its first screen, with the command that runs it here."""
    [command] = re.findall(r"^ {4}python (-m examples\.\w+)$", README, re.MULTILINE)
    assert README.index("examples/quickstart.py") < 3500 and command == "-m examples.quickstart"
    code = (ROOT / "examples/quickstart.py").read_text(encoding="utf-8")
    assert len(code.splitlines()) <= 32
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    latents, clean, masked = done.stdout.splitlines()
    assert len(json.loads(latents.partition(":")[2])) == 10
    assert common.parse_answer(clean) == "Fistad"
    assert common.parse_answer(masked) != "Fistad"


def test_asking_from_python_is_asking_in_a_round(demo, demo_questions):
    """Answers, mean activations and masked answers of a naive loop."""
    model, tokenizer = demo
    naive = model.model, model.splice.sae
    for question in demo_questions[:3]:
        prompt = oracle.encode_prompt(tokenizer, question.context, question.question)
        answer = oracle.generate(*naive, tokenizer, prompt)
        asked = interactive.ask(model, tokenizer, question.context, question.question)
        assert asked == prompts.decode(tokenizer, answer)
        scores = interactive.mean_activations(model, tokenizer, question.context, question.question)
        assert torch.allclose(scores, oracle.activations(*naive, prompt + answer[:-1]).mean(0), atol=1e-5)
        latents = scores.topk(10).indices.tolist()
        masked = interactive.ask(model, tokenizer, question.context, question.question, latents)
        assert masked == prompts.decode(tokenizer, oracle.generate(*naive, tokenizer, prompt, latents))


def test_a_ranking_of_ones_own(run, tmp_path, demo, demo_questions):
    """README's: in all three rounds, beside the baseline; what the run says; scores that are right."""
    assert re.search(rf"\[examples/own_ranking\.py\].*\n+.*--ranking baseline {re.escape(BY_ANSWER)}", README)
    for script in ("baseline", "baseline_after_false", "baseline_after_true"):
        code, out, err = run(script, "--ranking", "baseline", BY_ANSWER)
        assert code == 0, err
    assert re.search(r"^by_answer  ", out, re.MULTILINE) and "BottomK: EM" in out
    content = json.loads((tmp_path / "out" / "activations_by_answer.json").read_text())
    source = (ROOT / "examples/own_ranking.py").read_bytes()
    assert content["run"]["ranking"] == "by_answer"
    assert content["run"]["ranking_digest"] == hashlib.sha256(source).hexdigest()
    entries = json.loads((tmp_path / "out" / "results.json").read_text())
    journals = {entry["journal"] for entry in entries if entry["run"]["ranking"] == "by_answer"}
    names = ["predictions_by_answer.jsonl", "predictions_by_answer_false.jsonl", "predictions_by_answer_true.jsonl"]
    assert journals == set(names)
    assert entries[0]["statistics"]["overlap"].keys() == {"by_answer"}
    model, tokenizer = demo
    for sample in content["samples"][:4]:
        question = next(q for q in demo_questions if q.id == sample["id"])
        prompt = oracle.encode_prompt(tokenizer, question.context, question.question)
        end = prompts.find_bracket(tokenizer, sample["tokens"])
        acts = oracle.activations(model.model, model.splice.sae, prompt + sample["tokens"][:end])
        scores = acts[len(prompt) :].mean(0)
        best = [scores[latent].item() for latent in sample["topk"][:6]]
        assert best == pytest.approx(scores.topk(6).values.tolist(), rel=1e-4)


def test_another_function_in_the_file_is_another_run(run, tmp_path):
    """Round 2 names the digests; round 1 goes on with nothing of what the file held before."""
    file = tmp_path / "mine.py"
    file.write_text(CONSTANT.format("scores"))
    ranking = ["--ranking", f"{file}:constant"]
    assert run("baseline", *ranking)[0] == 0
    samples = json.loads((tmp_path / "out" / "activations_constant.json").read_text())["samples"]
    assert samples[0]["topk"] == [5, 4, 3] and samples[0]["bottomk"] == [3, 4, 5]
    assert run("baseline_after_false", *ranking)[0] == 0
    file.write_text(CONSTANT.format("-scores"))
    own_rankings._read.cache_clear()
    for script in ("baseline", "baseline_after_false"):
        code, _, err = run(script, *ranking)
        assert code == 2 and re.search(r'ranking "constant" \(content \w{8}\), now "constant" \(content \w{8}\)', err)
        assert len(err.splitlines()) == 1
    assert run("baseline", *ranking, "--overwrite")[0] == 0


def test_its_seed_is_part_of_the_run(run, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(CONSTANT.format("scores + seed"))
    assert run("baseline", "--ranking", f"{file}:constant")[0] == 0
    code, _, err = run("baseline", "--ranking", f"{file}:constant", "--seed", 7)
    assert code == 2 and "ranking_seed 42, now 7" in err


@pytest.mark.parametrize(
    ("gives", "says"),
    [
        ("scores.log() * 0", "gives scores that are not a number (NaN), first for question questions-"),
        ("scores[0]", r"gives (512,), not a tensor of scores [sequence, d_sae], here ("),
        ("scores.T", "not a tensor of scores"),
        ("scores.tolist()", "gives list, not a tensor of scores"),
        ("None", "gives NoneType, not a tensor of scores"),
    ],
)
def test_scores_that_are_none(gives, says, run, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(CONSTANT.format(gives))
    code, _, err = run("baseline", "--ranking", f"{file}:constant")
    assert code == 2 and says in err.splitlines()[-1] and err.splitlines()[-1].startswith("baseline.py: --ranking ")
    assert not list((tmp_path / "out").glob("*.json*"))


WRITES = """
from experiment.intervention.rankings import mean

def scaled(model, sequences, seed):
    values = sequences.ranked.latents.values
    values /= 2
    return mean(model, sequences.ranked)
"""


def test_activations_are_not_written_into(run, tmp_path):
    """They are other rankings' too, whose lists would be wrong without a word."""
    file = tmp_path / "mine.py"
    file.write_text(WRITES)
    code, _, err = run("baseline", "--ranking", f"{file}:scaled", "baseline")
    assert code == 2 and "writes into the activations that it is given: clone() them first" in err.splitlines()[-1]
    assert not list((tmp_path / "out").glob("activations*"))


MISTAKES = {
    "no file": ("{folder}/nowhere.py:f", "nowhere.py: cannot be read (No such file or directory)"),
    "a folder": ("{folder}/folder.py:f", "folder.py: cannot be read (Is a directory)"),
    "no function": ("{folder}/mine.py:by_size", "mine.py: has no function by_size (nearest: by_sizes"),
    "a value": ("{folder}/mine.py:VALUE", "mine.py: has no function VALUE"),
    "not Python": ("{folder}/broken.py:f", "broken.py: is not Python (invalid syntax"),
    "null bytes": ("{folder}/binary.py:f", "binary.py: is not Python ("),
    "no FUNCTION": ("{folder}/mine.py", "invalid choice: '"),
    "no name": ("{folder}/mine.py:by-sizes", "invalid choice: '"),
    "a round's word": ("{folder}/mine.py:by_mean", "name it without direction, false, keep, mean, true"),
    "a name that is taken": ("{folder}/mine.py:Random", "files are named after the function, as of random"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case, run, tmp_path, monkeypatch):
    """One line, before anything slow is imported."""
    monkeypatch.setattr(common, "prepare", None)
    (tmp_path / "folder.py").mkdir()
    functions = [f"def {name}(model, sequences, seed): pass\n" for name in ("by_sizes", "by_mean", "Random")]
    (tmp_path / "mine.py").write_text("VALUE = 3\n" + "".join(functions))
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "binary.py").write_bytes(b"\0")
    given, says = MISTAKES[case]
    for script in ("baseline", "baseline_after_false"):
        code, out, err = run(script, "--ranking", given.format(folder=tmp_path))
        assert (code, out) == (2, "") and says in err and len(err.splitlines()) == 1, err
    assert not (tmp_path / "out").exists()


def test_two_functions_of_one_name(run, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text("def f(model, sequences, seed): pass\n")
    code, _, err = run("baseline", "--ranking", f"{tmp_path}/one.py:f", f"{tmp_path}/two.py:f")
    assert code == 2 and "two.py:f: files are named after the function, as of" in err


def test_what_goes_wrong_inside_traces_back(run, tmp_path, monkeypatch):
    """It is code of the person's, who has to see where. A file that cannot be executed costs no loading."""
    file = tmp_path / "mine.py"
    file.write_text("def f(model, sequences, seed):\n    raise ZeroDivisionError('inside')\n")
    with pytest.raises(ZeroDivisionError, match="inside"):
        run("baseline", "--ranking", f"{file}:f")
    own_rankings.load.cache_clear()
    own_rankings._read.cache_clear()
    file.write_text("import no_such_package\ndef f(model, sequences, seed):\n    pass\n")
    monkeypatch.setattr(common, "load", None)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        run("baseline", "--ranking", f"{file}:f", "--overwrite")
