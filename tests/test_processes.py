"""Two processes under torchrun and under accelerate launch: the demo's files of one process, byte for byte.

Not in the default run, for each launch imports the libraries twice: `python -m pytest -m launchers`.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, run_script

pytestmark = pytest.mark.launchers

ARGUMENTS = ["--demo"]  # all of it
STEPS = [
    ("baseline", []),
    ("baseline_after_false", []),
    ("baseline_after_true", []),
    ("baseline", ["--ranking", "gradsae"]),
]
BIN = pathlib.Path(sys.executable).parent
LAUNCHERS = {
    "torchrun": [BIN / "torchrun", "--nproc-per-node", "2"],
    # Without --multi_gpu it starts a single process where there is no GPU.
    "accelerate": [
        *(BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
    ],
}


def start(launcher, script, arguments, folder):
    """In a process group of its own, so that all of it can be killed."""
    command = [*LAUNCHERS[launcher], ROOT / f"{script}.py", *arguments, "--output-dir", folder]
    return subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
        cwd=folder,
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process's files after each round, and after GradSAE's ranking; and what each printed."""
    folder, found = tmp_path_factory.mktemp("alone"), {}
    with pytest.MonkeyPatch.context() as patch:
        for script, more in STEPS:
            patch.setattr(sys, "argv", [f"{script}.py", *ARGUMENTS, *more, "--output-dir", str(folder)])
            assert __import__("common").guard(__import__(script).main) == 0
            found[script, *more] = contents(folder)
    return found


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_leave_the_files_of_one(launcher, alone, tmp_path):
    for script, more in STEPS:
        process = start(launcher, script, [*ARGUMENTS, *more], tmp_path)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert sum(line.startswith("ranking ") for line in out.splitlines()) == 1 and "process 1 of 2" in err
        assert contents(tmp_path) == alone[script, *more]


@pytest.mark.parametrize("number", range(len(STEPS)))
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_killed_and_resumed_by_one_process(launcher, number, alone, tmp_path, monkeypatch, capsys):
    script, more = STEPS[number]
    before = alone[STEPS[number - 1][0], *STEPS[number - 1][1]] if number else {}
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    process = start(launcher, script, [*ARGUMENTS, *more], tmp_path)
    while sum(path.read_bytes().count(b"\n") > 1 for path in tmp_path.glob("*.process*.jsonl")) < 2:
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    # The launcher gives each of its processes a group of its own; until they are gone, they hold the folder's lock.
    while subprocess.run(["pkill", "-KILL", "-f", str(tmp_path)]).returncode == 0:
        time.sleep(0.05)
    process.communicate()
    parts = [path.read_bytes().splitlines() for path in tmp_path.glob("*.process*.jsonl")]
    shares = [sum(line.startswith(b'{"id"') for line in part) for part in parts]
    assert len(shares) == 2 and min(shares) > 0 and sum(shares) < 595
    arguments = [*ARGUMENTS, *more, "--output-dir", tmp_path]
    code, _, err = run_script(script, arguments, monkeypatch, capsys)
    assert code == 0 and f"{sum(shares)} of " in err, err
    assert contents(tmp_path) == alone[script, *more]


def test_a_mistake_is_one_line(tmp_path):
    process = start("torchrun", "baseline_after_false", [*ARGUMENTS, "--activations", "missing.json"], tmp_path)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0 and err.count("missing.json: there is no such file") == 1
    assert contents(tmp_path) == {}


def test_work_is_split_evenly(demo_questions):
    """Of all the demo's questions in its own batches, and of many small ones."""
    import common
    from experiment import generation

    tokenizer = common.load_tokenizer(common.parse_options(["--demo"], "", masks=False))
    template = common.choose_template("auto", tokenizer)
    lengths = [len(common.tokenize(tokenizer, common.build_prompt(template, q.context, q.question)))
               for q in demo_questions]  # fmt: skip
    for budget, workers, most in ((16384, 2, 0.56), (2000, 2, 0.51), (2000, 4, 0.27)):
        plan = generation.plan_batches(lengths, budget)
        tokens = [sum(lengths[i] for batch in plan[worker::workers] for i in batch) for worker in range(workers)]
        assert max(tokens) <= most * sum(tokens), json.dumps(tokens)
