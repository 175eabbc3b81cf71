"""Rounds that are killed, interrupted, run twice at a time or out of disk: nothing is lost, nothing is mixed.

The default run kills each round at one of the 20 moments; `python -m pytest -m kills` at the others.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT

ARGUMENTS = ["--demo", "--limit", "100", "--batch-tokens", "1600"]
JOURNALS = {
    "baseline": "predictions_baseline.jsonl",
    "baseline_after_false": "predictions_false.jsonl",
    "baseline_after_true": "predictions_true.jsonl",
}
ROUNDS = list(JOURNALS)
MOMENTS = range(20)
USUAL = {11}  # the moment of the default run


class Scripts:
    """Starts scripts by way of the zygote, one at a time."""

    def __init__(self, folder):
        self.folder = folder
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "zygote.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        assert self.process.stdout.readline() == "ready\n"

    def start(self, script, arguments, limit=None, processes=1):
        """Returns the ids of the processes."""
        out, err = self.folder / "stdout", self.folder / "stderr"
        self.output_dir = str(arguments[arguments.index("--output-dir") + 1])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        job = {"script": script, "arguments": [*map(str, arguments)], "limit": limit, "processes": processes}
        self.process.stdin.write(json.dumps(job | {"port": port, "stdout": str(out), "stderr": str(err)}) + "\n")
        self.process.stdin.flush()
        return [int(number) for number in self.process.stdout.readline().split()]

    def wait(self):
        """Exit code, standard output and standard error of what was started (of several processes the code that they
        share); its folder's name left out."""
        (code,) = {int(number) for number in self.process.stdout.readline().split()}
        out, err = ((self.folder / name).read_text() for name in ("stdout", "stderr"))
        return code, out.replace(self.output_dir, ""), err

    def run(self, script, arguments, limit=None, processes=1):
        self.start(script, arguments, limit, processes)
        return self.wait()


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    found = Scripts(tmp_path_factory.mktemp("scripts"))
    yield found
    found.process.kill()


@pytest.fixture(scope="module")
def whole(scripts, tmp_path_factory):
    """Each round uninterrupted: the folder's files before and after it, and how long it took."""
    folder, found = tmp_path_factory.mktemp("whole"), {}
    for script in ROUNDS:
        before, start = contents(folder), time.perf_counter()
        code, out, err = scripts.run(script, [*ARGUMENTS, "--output-dir", folder])
        assert code == 0, err
        found[script] = (before, contents(folder), time.perf_counter() - start, out)
    return found


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def lay_out(folder, files):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("moment", [pytest.param(m, marks=() if m in USUAL else pytest.mark.kills) for m in MOMENTS])
@pytest.mark.parametrize("script", ROUNDS)
def test_killed_and_resumed(scripts, whole, tmp_path, script, moment):
    before, after, seconds, table = whole[script]
    lay_out(tmp_path / "out", before)
    arguments = [*ARGUMENTS, "--output-dir", tmp_path / "out"]
    (process,) = scripts.start(script, arguments)
    time.sleep(seconds * (moment + 0.5) / len(MOMENTS))
    with contextlib.suppress(ProcessLookupError):  # it was faster this time
        os.kill(process, signal.SIGKILL)
    code, _, _ = scripts.wait()
    assert code in (-signal.SIGKILL, 0)
    left = {name for name in contents(tmp_path / "out") if name.endswith(".part")}
    code, out, err = scripts.run(script, arguments)
    assert (code, out) == (0, table), err
    found = {name: content for name, content in contents(tmp_path / "out").items() if name not in left}
    assert found == after


@pytest.mark.parametrize("script", ROUNDS)
def test_two_processes(scripts, whole, tmp_path, script):
    """The files of one, also when they are killed half-way and one goes on. test_processes.py: under real launchers."""
    before, after, _, table = whole[script]
    lay_out(tmp_path / "out", before)
    arguments = [*ARGUMENTS, "--output-dir", tmp_path / "out"]
    code, out, err = scripts.run(script, arguments, processes=2)
    assert (code, out) == (0, table) and "process 1 of 2" in err
    assert contents(tmp_path / "out") == after

    lay_out(tmp_path / "out", before)
    processes = scripts.start(script, arguments, processes=2)
    while sum(path.read_bytes().count(b"\n") > 1 for path in (tmp_path / "out").glob("*.process*.jsonl")) < 2:
        time.sleep(0.002)
    for process in processes:
        os.kill(process, signal.SIGKILL)
    assert scripts.wait()[0] == -signal.SIGKILL
    assert len(list((tmp_path / "out").glob("*.process*.jsonl"))) == 2
    code, out, err = scripts.run(script, arguments)
    assert (code, out) == (0, table) and "questions are in" in err
    assert contents(tmp_path / "out") == after


@pytest.mark.parametrize("script", ROUNDS[:2])
def test_ctrl_c(scripts, whole, tmp_path, script):
    before, after, _, table = whole[script]
    lay_out(tmp_path / "out", before)
    arguments = [*ARGUMENTS, "--output-dir", tmp_path / "out"]
    (process,) = scripts.start(script, arguments)
    while not (tmp_path / "out" / JOURNALS[script]).exists():  # the first batch is done
        time.sleep(0.002)
    os.kill(process, signal.SIGINT)
    code, out, err = scripts.wait()
    assert code == 130 and "the same command goes on" in err and "Traceback" not in err
    code, out, err = scripts.run(script, arguments)
    assert (code, out) == (0, table)
    assert contents(tmp_path / "out") == after


def test_two_writers(scripts, whole, tmp_path):
    """A round is refused while another process lives that writes in its folder, and not when that one was killed."""
    before, after, _, table = whole["baseline"]
    lay_out(tmp_path / "out", before)
    hold = "import sys, time, filelock\nlock = filelock.FileLock(sys.argv[1])\n"
    hold += "lock.acquire()\nprint(flush=True)\ntime.sleep(99)"
    lock = tmp_path / "out" / ".lock"
    with subprocess.Popen([sys.executable, "-c", hold, lock], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        code, out, err = scripts.run("baseline", [*ARGUMENTS, "--output-dir", tmp_path / "out"])
        holder.kill()
    assert (code, out, len(err.splitlines())) == (2, "", 1) and "another round is writing here" in err
    assert contents(tmp_path / "out") == before
    code, out, err = scripts.run("baseline", [*ARGUMENTS, "--output-dir", tmp_path / "out"])
    assert (code, out) == (0, table)
    assert contents(tmp_path / "out") == after


@pytest.mark.parametrize("script", ROUNDS)
def test_full_disk(scripts, whole, tmp_path, script):
    """No file may grow beyond a part of the journal's size: one line, and the rest is there when there is room."""
    before, after, _, table = whole[script]
    lay_out(tmp_path / "out", before)
    arguments = [*ARGUMENTS, "--output-dir", tmp_path / "out"]
    size = len(after[JOURNALS[script]])
    code, out, err = scripts.run(script, arguments, limit=size * 2 // 3)
    assert code == 2 and "cannot be written" in err and "Traceback" not in err
    kept = (tmp_path / "out" / JOURNALS[script]).read_bytes()
    assert size // 4 < len(kept) < size and after[JOURNALS[script]].startswith(kept)
    code, out, err = scripts.run(script, arguments)
    assert (code, out) == (0, table)
    assert contents(tmp_path / "out") == after


def test_interrupted_overwrite_keeps_the_old_files(scripts, whole, tmp_path):
    _, after, seconds, table = whole["baseline"]
    lay_out(tmp_path / "out", after)
    arguments = [*ARGUMENTS, "--max-new-tokens", "12", "--overwrite", "--output-dir", tmp_path / "out"]
    (process,) = scripts.start("baseline", arguments)
    time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    scripts.wait()
    assert contents(tmp_path / "out") == after
    code, out, err = scripts.run("baseline", [*ARGUMENTS, "--output-dir", tmp_path / "out"])
    assert (code, out) == (0, table) and "is finished" in err


def test_read_only_folder(scripts, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (tmp_path / "out").mkdir(mode=0o500)
    code, out, err = scripts.run("baseline", [*ARGUMENTS, "--output-dir", tmp_path / "out"])
    assert code == 2 and "cannot be" in err


def test_output_dir_is_a_file(scripts, tmp_path):
    (tmp_path / "out").write_text("")
    code, out, err = scripts.run("baseline", [*ARGUMENTS, "--output-dir", tmp_path / "out"])
    assert code == 2 and "--output-dir" in err and len(err.splitlines()) == 1
