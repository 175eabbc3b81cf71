"""Several processes as real launchers start them: the files of one process, byte for byte.

Not in the default run, for each launch imports the libraries twice: `python -m pytest -m launchers`.
"""

import contextlib
import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT, run_script

import common
from experiment import options, rounds
from experiment.intervention.plan import Sizes

launchers = pytest.mark.launchers

ARGUMENTS = ["--demo", "--limit", "200", "--batch-tokens", "4096"]
TWO = ["--ranking", "baseline", "gradsae"]
STEPS = [
    ("baseline", TWO),
    ("baseline_after_false", [*TWO, "--k", "10", "50%"]),
    ("baseline_after_true", []),
]
BIN = pathlib.Path(sys.executable).parent
LAUNCHERS = {
    "torchrun": [BIN / "torchrun", "--nproc-per-node", "2", "--standalone"],  # --standalone: a free port
    # Without --multi_gpu it starts a single process where there is no GPU. Port 0: a free one.
    "accelerate": [
        *(BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    ],
}


def start(launcher, script, arguments, folder):
    """In a process group of its own, so that all of it can be killed."""
    command = [*launcher, ROOT / f"{script}.py", *arguments, "--output-dir", folder]
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
    """One process's files before and after each step."""
    folder, found, before = tmp_path_factory.mktemp("alone"), [], {}
    with pytest.MonkeyPatch.context() as patch:
        for script, more in STEPS:
            patch.setattr(sys, "argv", [f"{script}.py", *ARGUMENTS, *more, "--output-dir", str(folder)])
            __import__(script).main()
            found.append((before, contents(folder)))
            before = found[-1][1]
    return found


@launchers
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_leave_the_files_of_one(launcher, alone, tmp_path):
    for (script, more), (_, expected) in zip(STEPS, alone):
        process = start(LAUNCHERS[launcher], script, [*ARGUMENTS, *more], tmp_path)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert out.count("Unmasked EM / F1 / named") == 1  # one of them speaks
        assert "process 1 of 2" in err
        assert contents(tmp_path) == expected


@launchers
def test_two_machines(alone, tmp_path):
    """Two agents of torchrun that know of each other only by an address, and share the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    machine = [BIN / "torchrun", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    machine += ["--rdzv-endpoint", address, "--rdzv-id", "x", "--node-rank"]
    for (script, more), (_, expected) in zip(STEPS, alone):
        arguments = [*ARGUMENTS, *more]
        processes = [start([*machine, number], script, arguments, tmp_path) for number in range(2)]
        (out, err), (other_out, other_err) = sorted((p.communicate(timeout=300) for p in processes), reverse=True)
        assert [process.returncode for process in processes] == [0, 0], err + other_err
        assert (
            "Unmasked EM / F1 / named" in out
            and other_out == ""
            and "process 1 of 2" in err
            and "process" not in other_err
        )
        assert contents(tmp_path) == expected


@launchers
@pytest.mark.parametrize("number", range(len(STEPS)))
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_killed_and_resumed_by_one_process(launcher, number, alone, tmp_path, monkeypatch, capsys):
    (script, more), (before, expected) = STEPS[number], alone[number]
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    process = start(LAUNCHERS[launcher], script, [*ARGUMENTS, *more], tmp_path)
    while not list(tmp_path.glob("*.part1.jsonl")):
        assert process.poll() is None
        time.sleep(0.005)
    kill_all(process, tmp_path)
    assert process.returncode == -signal.SIGKILL
    left = contents(tmp_path)
    names = [name for name in expected if name.endswith(".jsonl") and name not in before]
    lines = [content for name, content in left.items() if ".jsonl" in name and name not in before]
    assert 0 < sum(content.count(b"\n") for content in lines) < sum(expected[name].count(b"\n") for name in names)
    code, _, err = run_script(script, [*ARGUMENTS, *more, "--output-dir", tmp_path], monkeypatch, capsys)
    assert code == 0, err
    assert contents(tmp_path) == expected


def kill_all(process, folder):
    """A launcher gives each of its processes a group of its own: those that have the folder in their command line.

    Until they are gone, they hold its lock.
    """
    os.killpg(process.pid, signal.SIGKILL)
    while numbers := [
        int(path.parent.name) for path in pathlib.Path("/proc").glob("[0-9]*/cmdline") if names(path, folder)
    ]:
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.05)
    process.communicate()


def names(path, folder):
    try:
        return str(folder).encode() in path.read_bytes().split(b"\0")
    except OSError:  # it has ended meanwhile
        return False


@launchers
def test_a_mistake_is_one_line(tmp_path):
    arguments = [*ARGUMENTS, "--activations", "missing.json"]
    process = start(LAUNCHERS["torchrun"], "baseline_after_false", arguments, tmp_path)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0 and err.count("missing.json: there is no such file") == 1
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("batches_per_group", [1, 2, 8])
@pytest.mark.parametrize("budget, workers, most", [(16384, 2, 0.56), (2000, 2, 0.51), (2000, 4, 0.27)])
def test_work_is_split_evenly(demo_questions, budget, workers, most, batches_per_group):
    """Of all the demo's questions in its own batches, and of many small ones; whatever a group holds."""
    experiment = common.prepare(options.parse(["--demo"], "", masks=None))
    sizes = Sizes(budget, budget, batches_per_group * budget)
    shares = []
    for worker in range(workers):
        state = SimpleNamespace(process_index=worker, num_processes=workers, wait_for_everyone=lambda: None)
        shares.append(rounds.plan_work(dataclasses.replace(experiment, state=state), sizes, experiment.asked, {}))
    ids = [question.id for share in shares for work in share for question in work.questions]
    assert sorted(ids) == sorted(question.id for question in demo_questions)
    tokens = [sum(experiment.lengths[question.id] for work in share for question in work.questions) for share in shares]
    assert max(tokens) <= most * sum(tokens), tokens
