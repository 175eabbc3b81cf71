"""Rounds that are killed, interrupted, run twice at a time, out of disk or out of memory: nothing is lost or mixed.

The default run kills each round at one of 20 moments; `python -m pytest -m kills` at the others.
"""

import gc
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, answer, run_script

import baseline
import common
from experiment import guard, rounds
from experiment.intervention import effects, generate, modules, rankings
from experiment.intervention.forward import SplicedModel
from experiment.intervention.pool import Pool
from experiment.report import figure

ARGUMENTS = ["--demo", "--limit", "30", "--batch-tokens", "500"]  # six batches, each a group of its own
TWO = ["--ranking", "baseline", "gradsae"]
POOL = ["--pool-tokens", "1000"]  # three groups of two batches each
CASES = {  # script, more arguments, the case whose files it finds in its folder
    "round 1": ("baseline", [], None),
    "round 2": ("baseline_after_false", [], "round 1"),
    "round 3": ("baseline_after_true", [], "round 2"),
    "round 1, two rankings": ("baseline", TWO, None),
    "round 2, four masks": ("baseline_after_false", [*TWO, "--k", "10", "50%"], "round 1, two rankings"),
    "round 1, means": ("baseline", ["--ablation", "mean"], None),
    "round 1, a pool": ("baseline", [*TWO, *POOL], None),
    # Of the ranking by the next question's latents some questions are left out.
    "round 2, a pool": (
        "baseline_after_false",
        ["--ranking", "baseline", "other", "--control", "direction", *POOL],
        "round 1, a pool",
    ),
}
SEVERAL = ["round 1, two rankings", "round 2, four masks"]
POOLED = ["round 1, a pool", "round 2, a pool"]
MOMENTS = range(20)
USUAL = dict.fromkeys(CASES, 5) | {"round 2, a pool": 8}  # of the default run: in the middle of a group's lines
KILLS = [
    pytest.param(case, moment, marks=() if moment == USUAL[case] and case != "round 1, means" else pytest.mark.kills)
    for case in CASES
    for moment in MOMENTS
]


# ---------------------------------------------------------------------------------------------------------------------
# Scripts as processes


@dataclass
class Done:
    code: int | tuple  # of several processes a tuple, where they differ
    out: str  # the output folder's name left out
    err: str
    events: list[dict]


class Scripts:
    """Starts scripts by way of the zygote, one at a time."""

    def __init__(self, folder):
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "zygote.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def start(self, script, arguments, processes=1, limits=None, stops=None):
        """Returns the ids of the processes. limits, stops: see the zygote."""
        if not self.folder.joinpath("stdout").exists():
            assert self.process.stdout.readline() == "ready\n"
        self.output_dir = str(arguments[arguments.index("--output-dir") + 1])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        job = {"script": script, "arguments": [*map(str, arguments)], "processes": processes, "port": port}
        job |= {"limits": limits or {}, "stops": stops or {}}
        job |= {name: str(self.folder / name) for name in ("stdout", "stderr", "trace")}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return [int(number) for number in self.process.stdout.readline().split()]

    def wait(self):
        codes = tuple(map(int, self.process.stdout.readline().split()))
        out, err, trace = ((self.folder / name).read_text() for name in ("stdout", "stderr", "trace"))
        events = [json.loads(line) for line in trace.splitlines()]
        return Done(codes[0] if len({*codes}) == 1 else codes, out.replace(self.output_dir, ""), err, events)

    def run(self, script, arguments, processes=1, limits=None, stops=None):
        self.start(script, arguments, processes, limits, stops)
        return self.wait()


def stop(kind, number, when="after", cut=0, signal=signal.SIGKILL):
    return {"kind": kind, "number": number, "when": when, "cut": cut, "signal": signal}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    found = Scripts(tmp_path_factory.mktemp("scripts"))
    yield found
    found.process.kill()


@dataclass
class Whole:
    """An uninterrupted round: the folder's files before and after it, what it printed, and what it did."""

    before: dict[str, bytes]
    after: dict[str, bytes]
    out: str
    events: list[dict]


@pytest.fixture(scope="module")
def whole(scripts, tmp_path_factory):
    """The Whole of a case, made when it is first asked for."""
    known = {}

    def make(case):
        if case not in known:
            script, more, earlier = CASES[case]
            before = make(earlier).after if earlier else {}
            folder = lay_out(tmp_path_factory.mktemp("whole") / "out", before)
            done = scripts.run(script, [*ARGUMENTS, *more, "--output-dir", folder])
            assert done.code == 0, done.err
            known[case] = Whole(before, contents(folder), done.out, done.events)
        return known[case]

    return make


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def assert_same(folder, files):
    """The same files, but for the last digits of what was computed in batches of another width: log probabilities, and
    what a mask removes."""
    found = contents(folder)
    assert found.keys() == files.keys()
    for name in files:
        if found[name] != files[name] and not name.endswith((".png", ".pdf", ".html")):
            assert are_close(parse(name, found[name]), parse(name, files[name])), name


def parse(name, content):
    lines = content.decode().splitlines()
    if name.endswith(".csv"):
        rows = (line.split(",") for line in lines)
        return [[float(cell) if re.fullmatch(r"-?[0-9]+\.[0-9e-]+", cell) else cell for cell in row] for row in rows]
    if name.endswith(".json"):
        return json.loads(content)
    return [json.loads(line) for line in lines] if name.endswith(".jsonl") else lines


def are_close(one, other):
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) < 2e-4
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and are_close([*one.values()], [*other.values()])
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(are_close, one, other))
    return one == other


def lay_out(folder, files):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Killed, and started again


def choose_stop(events, moment):
    """Where a round is killed at a moment, and what it has done by then: a stop, events, and the bytes cut off.

    Moment 0 is the first forward pass. The others lie evenly among all that comes to disk, up to the last file of
    results: before it does, after it, or in the middle of it.
    """
    if moment == 0:
        return stop("pass", 0, "before"), []
    writes = [number for number, event in enumerate(events) if event["kind"] != "pass"]
    place = writes[(moment - 1) * (len(writes) - 1) // (len(MOMENTS) - 2)]
    event, earlier = events[place], events[:place]
    how = ("after", "before", "cut")[moment % 3]
    cut = 0
    if event["kind"] == "sync" and how == "cut":
        written = [other["size"] for other in earlier if other.get("name") == event["name"]]
        cut = (event["size"] - (written[-1] if written else 0)) // 2
    number = sum(other["kind"] == event["kind"] for other in earlier)
    if event["kind"] == "sync" or how == "after":  # what a process has written is there once it is killed
        earlier = [*earlier, event | {"size": event["size"] - cut}]
    return stop(event["kind"], number, "after" if how == "after" else "before", cut), earlier


def sizes_after(before, events):
    """The sizes of the files in a folder after these events."""
    sizes = {name: len(content) for name, content in before.items()}
    for event in events:
        if event["kind"] == "sync":
            sizes[event["name"]] = event["size"]
        elif event["kind"] == "move":
            sizes[event["name"]] = sizes.pop(event["name"] + ".part")
    return sizes


def count_passes(events, only_wide=False):
    """How many forward passes there are among events. only_wide: over more than one position of each row."""
    passes = [event for event in events if event["kind"] == "pass"]
    return sum(event["size"][1] > 1 or not only_wide for event in passes)


def find_group(events, finished):
    """The first event of the group of batches that a round is in after so many events: a pass that follows a write."""
    begins = (n for n in range(finished + 1) if [e["kind"] == "pass" for e in events[max(0, n - 1) : n + 1]] == [0, 1])
    return max(begins, default=0)


@pytest.mark.parametrize("case, moment", KILLS)
def test_killed_and_resumed(scripts, whole, tmp_path, case, moment):
    script, more, _ = CASES[case]
    expected = whole(case)
    where, done_by_then = choose_stop(expected.events, moment)
    folder = lay_out(tmp_path / "out", expected.before)
    arguments = [*ARGUMENTS, *more, "--output-dir", folder]
    killed = scripts.run(script, arguments, stops={0: where})
    assert killed.code == -signal.SIGKILL, killed.err
    left = contents(folder)
    assert {name: len(content) for name, content in left.items()} == sizes_after(expected.before, done_by_then)
    if moment == USUAL[case]:  # in the middle of the round, and of a line
        (name,) = [name for name, content in left.items() if not content.endswith(b"\n") and name.endswith(".jsonl")]
        assert 4 < left[name].count(b"\n") < expected.after[name].count(b"\n") - 4
    resumed = scripts.run(script, arguments)
    assert (resumed.code, resumed.out) == (0, expected.out), resumed.err
    assert contents(folder) == expected.after
    finished = len(done_by_then) - bool(where["cut"])
    assert count_passes(resumed.events) <= count_passes(expected.events[find_group(expected.events, finished) :])


@pytest.mark.parametrize("when", ["in the middle", pytest.param("at the end", marks=pytest.mark.kills)])
@pytest.mark.parametrize("case", POOLED)
def test_killed_in_the_pool(scripts, whole, tmp_path, case, when):
    """At a step of rows of several batches, and masks, that go on together: what earlier groups have is there, and the
    group is begun again, to the same bytes."""
    script, more, _ = CASES[case]
    expected = whole(case)
    events = expected.events
    wide = max(event["size"][0] for event in events if event["kind"] == "pass" and event["size"][1] > 1)
    second = find_group(events, next(n for n, event in enumerate(events) if event["kind"] == "move") + 20)
    steps = [
        place
        for place in range(second, len(events))
        if events[place]["kind"] == "pass" and events[place]["size"][1] == 1 and events[place]["size"][0] > wide
    ]
    place = steps[len(steps) // 2 if when == "in the middle" else -1]
    folder = lay_out(tmp_path / "out", expected.before)
    arguments = [*ARGUMENTS, *more, "--output-dir", folder]
    killed = scripts.run(script, arguments, stops={0: stop("pass", count_passes(events[:place]), "before")})
    assert killed.code == -signal.SIGKILL, killed.err
    left = contents(folder)
    assert {name: len(content) for name, content in left.items()} == sizes_after(expected.before, events[:place])
    fresh = [name for name in left.keys() - expected.before.keys() if name.endswith(".jsonl")]
    assert len(fresh) == (2 if case == POOLED[0] else 4)
    for name in fresh:
        lines = left[name].splitlines()
        assert 5 < len(lines) < len(expected.after[name].splitlines())
        assert {*lines} <= {*expected.after[name].splitlines()}  # whole ones, of groups that were done
    resumed = scripts.run(script, arguments)
    assert (resumed.code, resumed.out) == (0, expected.out), resumed.err
    assert contents(folder) == expected.after
    assert count_passes(resumed.events) == count_passes(events[find_group(events, place) :])


# The demo without --demo, which says how large batches are.
AUTO = ["--model", "demo/model", "--sae-release", "demo/sae", "--dataset", "demo/questions.jsonl", "--device", "cpu"]
AUTO += ["--dtype", "float32", "--limit", "30", "--ablation", "mean"]
SIZES = ["--batch-tokens", "500", "--pool-tokens", "1000"]
TOLD = "500 tokens in a batch, 1000 in answers that go on together."


def test_sizes_are_taken_from_the_journal(scripts, tmp_path):
    """A round that is begun with sizes, and goes on without, keeps to them: killed in its second group of batches, and
    before the means are read. It ends in the same bytes."""
    folder = tmp_path / "out"
    arguments = [*AUTO, "--output-dir", folder]
    before = {}
    for script, name in (("baseline", "baseline"), ("baseline_after_false", "false_mean")):
        lay_out(folder, before)
        done = scripts.run(script, [*arguments, *SIZES])
        assert done.code == 0 and TOLD in done.err, done.err
        expected = contents(folder)
        head = json.loads(expected[f"predictions_{name}.jsonl"].splitlines()[0])
        assert (head["run"]["batch_tokens"], head["run"]["pool_tokens"]) == (500, 1000)
        stops = [stop("sync", 1)]
        moved = [event["name"] for event in done.events if event["kind"] == "move"]
        if script == "baseline":
            stops.append(stop("move", moved.index("activations_baseline.json")))
        for where in stops:
            lay_out(folder, before)
            killed = scripts.run(script, [*arguments, *SIZES], stops={0: where})
            assert killed.code == -signal.SIGKILL, killed.err
            resumed = scripts.run(script, arguments)
            assert (resumed.code, resumed.out) == (0, done.out) and TOLD in resumed.err, resumed.err
            assert contents(folder) == expected
        before = expected


def test_sizes_that_are_given_count(scripts, tmp_path):
    """Also where a round goes on: what is finished stays, and the journal says what the rest was made with."""
    folder = lay_out(tmp_path / "out", {})
    arguments = [*AUTO, "--output-dir", folder]
    assert scripts.run("baseline", [*arguments, *SIZES], stops={0: stop("sync", 1)}).code == -signal.SIGKILL
    _, *lines = (folder / "predictions_baseline.jsonl").read_bytes().splitlines()
    assert len(lines) == 20  # of two groups
    done = scripts.run("baseline", [*arguments, "--batch-tokens", "700", "--pool-tokens", "800"])
    assert done.code == 0 and "700 tokens in a batch, 800 in answers that go on together." in done.err, done.err
    head, *after = (folder / "predictions_baseline.jsonl").read_bytes().splitlines()
    run = json.loads(head)["run"]
    assert (run["batch_tokens"], run["pool_tokens"]) == (700, 800)
    assert len(after) == 30 and {*lines} < {*after}
    (entry,) = json.loads((folder / "results.json").read_text())
    assert (entry["run"]["batch_tokens"], entry["run"]["pool_tokens"]) == (700, 800)


def test_another_ranking_later(scripts, whole, tmp_path):
    """Round 1 with two rankings where it had been finished with one: the files of both at once."""
    expected, first = whole("round 1, two rankings"), whole("round 1")
    folder = lay_out(tmp_path / "out", first.after)
    done = scripts.run("baseline", [*ARGUMENTS, *TWO, "--output-dir", folder])
    assert (done.code, done.out) == (0, expected.out), done.err
    assert_same(folder, expected.after)
    for name in ("predictions_baseline.jsonl", "activations_baseline.json", "results.json", "results.csv"):
        assert (folder / name).read_bytes() == expected.after[name]
    assert count_passes(done.events) == count_passes(expected.events)  # answered again, for that costs a round at most


def test_other_options_do_not_go_on(scripts, tmp_path, monkeypatch, capsys):
    """A killed round is refused to any run but its own; in batches of another size it goes on."""
    folder = tmp_path / "out"
    arguments = ["--demo", "--output-dir", folder, "--batch-tokens", "500", "--ranking", "random", "--limit", "30"]
    assert scripts.run("baseline", arguments, stops={0: stop("sync", 3)}).code == -signal.SIGKILL
    left = contents(folder)
    assert left.keys() == {"predictions_random.jsonl"}
    others = {
        "ranking_seed": ["--seed", "7"],
        "limit": ["--limit", "29"],
        "max_new_tokens": ["--max-new-tokens", "49"],
        "dtype": ["--dtype", "bfloat16"],
        "sae_dtype": ["--sae-dtype", "float16"],
        "error_term": ["--error-term", "keep"],
        "exclude_special_tokens": ["--exclude-special-tokens"],
    }
    for name, more in others.items():
        code, out, err = run_script("baseline", [*arguments, *more], monkeypatch, capsys)
        assert (code, out, len(err.splitlines())) == (2, "", 1), name
        assert "jsonl: is of another run" in err and f"{name} " in err
        assert contents(folder) == left
    done = scripts.run("baseline", [*arguments, "--batch-tokens", "700"])
    assert done.code == 0 and contents(folder).keys() > left.keys(), done.err
    assert contents(folder)["predictions_random.jsonl"].count(b"ranking_seed") == 1


SHORTER = ["--max-new-tokens", "12"]


def test_interrupted_overwrite(scripts, whole, tmp_path):
    """Until the first batch is done the old files stay; from then on the new run goes on, without --overwrite."""
    old = whole("round 3")
    arguments = [*ARGUMENTS, *SHORTER, "--output-dir", tmp_path / "out"]
    lay_out(tmp_path / "out", old.after)
    done = scripts.run("baseline", [*arguments, "--overwrite"])
    new = contents(tmp_path / "out")
    assert done.code == 0 and new.keys() == old.after.keys(), done.err
    changed = {name for name in new if new[name] != old.after[name]}
    assert changed >= {"predictions_baseline.jsonl", "activations_baseline.json", "results.json", "results.csv"}

    folder = lay_out(tmp_path / "out", old.after)
    killed = scripts.run("baseline", [*arguments, "--overwrite"], stops={0: stop("move", 0, "before")})
    left = contents(folder)
    assert killed.code == -signal.SIGKILL and len(left.pop("predictions_baseline.jsonl.part")) > 1000
    assert left == old.after
    again = scripts.run("baseline", [*ARGUMENTS, "--output-dir", folder])
    assert again.code == 0 and "is finished" in again.err and not count_passes(again.events)

    folder = lay_out(tmp_path / "out", old.after)
    killed = scripts.run("baseline", [*arguments, "--overwrite"], stops={0: stop("sync", 2)})
    left = contents(folder)
    assert killed.code == -signal.SIGKILL
    assert {name for name in left if left[name] != old.after[name]} == {"predictions_baseline.jsonl"}
    refused = scripts.run("baseline", [*ARGUMENTS, "--output-dir", folder])  # the old options
    assert refused.code == 2 and "is of another run (max_new_tokens 12, now 50)" in refused.err
    assert contents(folder) == left
    resumed = scripts.run("baseline", arguments)
    assert (resumed.code, resumed.out) == (0, done.out), resumed.err
    assert contents(folder) == new
    assert count_passes(resumed.events) == count_passes(done.events) - count_passes(killed.events)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


@pytest.mark.parametrize("case", SEVERAL + POOLED)
def test_two_processes(scripts, whole, tmp_path, case):
    """The files of one process, also where they share each group. test_processes.py: under real launchers."""
    script, more, _ = CASES[case]
    expected = whole(case)
    folder = lay_out(tmp_path / "out", expected.before)
    done = scripts.run(script, [*ARGUMENTS, *more, "--output-dir", folder], processes=2)
    assert (done.code, done.out) == (0, expected.out) and "process 1 of 2" in done.err, done.err
    assert contents(folder) == expected.after
    is_shared = case in POOLED  # of each group's rows those of one process go on together
    shares = []
    for process in range(2):
        shares.append(count_passes((e for e in done.events if e["process"] == process), only_wide=is_shared))
    assert sum(shares) == count_passes(expected.events, only_wide=is_shared) and min(shares) > 0.3 * sum(shares)


@pytest.mark.parametrize(
    "case, processes",
    [
        (SEVERAL[0], 1),
        pytest.param(SEVERAL[0], 3, marks=pytest.mark.kills),
        pytest.param(SEVERAL[1], 1, marks=pytest.mark.kills),
        pytest.param(SEVERAL[1], 3, marks=pytest.mark.kills),
        (POOLED[1], 1),
        pytest.param(POOLED[0], 3, marks=pytest.mark.kills),
    ],
)
def test_two_processes_killed(scripts, whole, tmp_path, case, processes):
    """Gone on with by one, and by three, from a part of each, a line of both torn."""
    script, more, _ = CASES[case]
    expected, journals = whole(case), 2 if case in (SEVERAL[0], POOLED[0]) else 4
    folder = lay_out(tmp_path / "out", expected.before)
    arguments = [*ARGUMENTS, *more, "--output-dir", folder]
    # Of the second group's journals the first one is torn; of the third's, the last.
    stops = {0: stop("sync", journals, "before", cut=20), 1: stop("sync", 3 * journals - 1, "before", cut=20)}
    killed = scripts.run(script, arguments, processes=2, stops=stops)
    assert killed.code == -signal.SIGKILL, killed.err
    left = contents(folder)
    torn = [name for name, content in left.items() if not content.endswith(b"\n") and ".jsonl" in name]
    assert len(torn) == 2 and sum(".part1." in name for name in torn) == 1
    parts = {name for name in left if ".part1." in name}
    assert len(parts) == journals and parts.isdisjoint(expected.after)
    resumed = scripts.run(script, arguments, processes=processes)
    assert (resumed.code, resumed.out) == (0, expected.out), resumed.err
    assert resumed.err.count("its last line was cut off") == 2
    assert contents(folder) == expected.after


def test_killed_again(scripts, whole, tmp_path):
    """Two processes, twice in the middle of a line: nothing is written behind what was cut off. Three go on."""
    expected = whole("round 2")
    folder = lay_out(tmp_path / "out", expected.before)
    arguments = [*ARGUMENTS, "--output-dir", folder]
    for _ in range(2):
        stops = {process: stop("sync", 1, "before", cut=20) for process in range(2)}
        killed = scripts.run("baseline_after_false", arguments, processes=2, stops=stops)
        assert killed.code == -signal.SIGKILL, killed.err
        for name in ("predictions_false.jsonl", "predictions_false.part1.jsonl"):
            *lines, torn = (folder / name).read_bytes().split(b"\n")
            assert len(torn) > 20 and all(map(json.loads, lines))
    resumed = scripts.run("baseline_after_false", arguments, processes=3)
    assert (resumed.code, resumed.out) == (0, expected.out) and "process 1 of 3" in resumed.err, resumed.err
    assert contents(folder) == expected.after


@pytest.mark.parametrize("when", [pytest.param("before", marks=pytest.mark.kills), "after"])
def test_killed_while_parts_are_joined(scripts, whole, tmp_path, when):
    case = SEVERAL[0]
    script, more, _ = CASES[case]
    expected = whole(case)
    folder = lay_out(tmp_path / "out", expected.before)
    arguments = [*ARGUMENTS, *more, "--output-dir", folder]
    killed = scripts.run(script, arguments, processes=2, stops={0: stop("move", 2, when)})
    assert killed.code == (-signal.SIGKILL, 0)  # the other one had done its share
    left = contents(folder)
    assert {"predictions_baseline.part1.jsonl", "predictions_gradsae.part1.jsonl"} <= left.keys()
    assert (left["predictions_baseline.jsonl"] == expected.after["predictions_baseline.jsonl"]) == (when == "after")
    resumed = scripts.run(script, arguments)
    assert (resumed.code, resumed.out) == (0, expected.out) and not count_passes(resumed.events), resumed.err
    assert contents(folder) == expected.after


def test_full_disk_in_one_of_two_processes(scripts, whole, tmp_path):
    """The one that cannot write says so; what the other one did is kept."""
    case = "round 1"
    expected = whole(case)
    arguments = [*ARGUMENTS, "--output-dir", lay_out(tmp_path / "out", {})]
    size = len(expected.after["predictions_baseline.jsonl"])
    done = scripts.run("baseline", arguments, processes=2, limits={1: size // 4})
    assert done.code == (1, 2) and done.err.count("process 2: ") == 1 and "cannot be written" in done.err
    kept = (tmp_path / "out" / "predictions_baseline.jsonl").read_bytes()
    assert len(kept) > size // 3
    resumed = scripts.run("baseline", arguments)
    assert (resumed.code, resumed.out) == (0, expected.out), resumed.err
    assert contents(tmp_path / "out") == expected.after


def test_a_mistake_of_one_process_alone(demo, monkeypatch, capsys):
    """It is told where it is made, and not a second time by the script."""
    model, _ = demo
    run = model.lm.forward
    overflow = float("inf")
    monkeypatch.setattr(model.lm, "forward", lambda **given: SimpleNamespace(logits=run(**given).logits + overflow))
    for process, says in (("0", ""), ("1", "process 2: ")):
        monkeypatch.setenv("RANK", process)
        assert guard(lambda: answer(model, [[1]], [""], 5)) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and err.count("not finite") == 1 and err.startswith(says)


# ---------------------------------------------------------------------------------------------------------------------
# Ctrl-C, two writers, no room


@pytest.mark.parametrize(
    "case, where",
    [
        ("round 1", stop("pass", 20, "before", signal=signal.SIGINT)),  # in the middle of an answer
        ("round 2", stop("sync", 7, "before", signal=signal.SIGINT)),  # as results.json is written
        pytest.param("round 3", stop("sync", 2, "after", signal=signal.SIGINT), marks=pytest.mark.kills),  # the journal
    ],
)
def test_ctrl_c(scripts, whole, tmp_path, case, where):
    script, _, _ = CASES[case]
    expected = whole(case)
    folder = lay_out(tmp_path / "out", expected.before)
    arguments = [*ARGUMENTS, "--output-dir", folder]
    done = scripts.run(script, arguments, stops={0: where})
    assert done.code == 130 and "the same command goes on" in done.err and "Traceback" not in done.err
    assert contents(folder).keys() <= expected.after.keys()  # nothing half written beside them
    assert 0 < count_passes(done.events)
    done = scripts.run(script, arguments)
    assert (done.code, done.out) == (0, expected.out)
    assert contents(folder) == expected.after


def test_two_writers(scripts, whole, tmp_path, monkeypatch, capsys):
    """A round is refused while another one lives in its folder, and not when that one was killed."""
    expected = whole("round 1")
    arguments = [*ARGUMENTS, "--output-dir", lay_out(tmp_path / "out", {})]
    (process,) = scripts.start("baseline", arguments, stops={0: stop("sync", 1, signal=signal.SIGSTOP)})
    wait_until_stopped(process)
    before = contents(tmp_path / "out")
    for script in ("baseline", "baseline_after_false"):
        code, out, err = run_script(script, [*arguments, "--overwrite"], monkeypatch, capsys)
        if script == "baseline":
            assert (code, out, len(err.splitlines())) == (2, "", 1) and "another round is writing here" in err
        else:  # has nothing to read yet
            assert code == 2
        assert contents(tmp_path / "out") == before
    os.kill(process, signal.SIGKILL)
    assert scripts.wait().code == -signal.SIGKILL
    done = scripts.run("baseline", arguments)
    assert (done.code, done.out) == (0, expected.out)
    assert contents(tmp_path / "out") == expected.after


def wait_until_stopped(process):
    while pathlib.Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
        time.sleep(0.01)


@pytest.mark.parametrize("case", ["round 1", "round 2"])
def test_full_disk(scripts, whole, tmp_path, case):
    """No file may grow beyond a part of the journal's size: one line, and the rest is there when there is room."""
    script, more, _ = CASES[case]
    expected = whole(case)
    folder = lay_out(tmp_path / "out", expected.before)
    arguments = [*ARGUMENTS, *more, "--output-dir", folder]
    name = max((name for name in expected.after.keys() - expected.before.keys() if name.endswith(".jsonl")), key=str)
    size = len(expected.after[name])
    done = scripts.run(script, arguments, limits={0: size * 2 // 3})
    assert done.code == 2 and "cannot be written" in done.err and "Traceback" not in done.err
    lines = (folder / name).read_bytes().split(b"\n")[:-1]
    assert len(lines) > 5 and {*lines} < {*expected.after[name].split(b"\n")}
    done = scripts.run(script, arguments)
    assert (done.code, done.out) == (0, expected.out)
    assert contents(folder) == expected.after


def test_no_folder_to_write_in(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", "/sys"):
        code, out, err = run_script("baseline", [*ARGUMENTS, "--output-dir", folder], monkeypatch, capsys)
        assert (code, out, len(err.splitlines())) == (2, "", 1) and f"{folder}: cannot be written" in err


# ---------------------------------------------------------------------------------------------------------------------
# Out of memory

ERRORS = {
    "PyTorch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has a total capacity"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}
WIDE = ["--demo", "--limit", "45", "--batch-tokens", "2000", "--max-new-tokens", "12"]  # batches of 20, 20 and 5
# gradsae would have two latents whose scores differ by a millionth: in batches of another width they change places.
WIDE += ["--ranking", "baseline", "gradsae-answer"]


class Memory:
    """A device on which passes of one kind with more than `most` rows do not fit.

    kinds: "prompt" of unmasked answers, "below" and "above" of masked ones, "step" of both, "again" of rows that a pool
    goes on with in halves, "gradient".
    Keeps every pass as (kind, rows), and in `work` all that was begun as [what, prompts, whether it fit, whether rows
    of other batches or masks were waiting when it began]: "answer" and "answer_masked", the wide passes of a batch,
    "decode", the steps of rows that go on together, until none is left that others do not join, and "gradients".
    In `ended` the prompts of the rows that have ended in steps.
    """

    def __init__(self, monkeypatch, kind=None, most=0, error=None):
        self.kind, self.most, self.error = kind, most, error
        self.passed, self.work, self.ended = [], [], []
        self.watch_passes(monkeypatch)
        self.watch_work(monkeypatch)

    def watch_passes(self, monkeypatch):
        run, start_again, forward_above = SplicedModel._run, Pool._start_again, SplicedModel.forward_above
        inside = []  # which of these is under way

        def within(name, function):
            def watched(*arguments):
                inside.append(name)
                try:
                    return function(*arguments)
                finally:
                    inside.pop()

            return watched

        def watched(model, ids, attention, cache, replace, *others):
            if torch.is_grad_enabled():
                kind = "gradient"
            elif ids.shape[1] == 1:
                kind = "step"
            elif replace is modules.keep:
                kind = "below"
            else:
                kind = inside[-1] if inside else "prompt"
            self.passed.append((kind, len(ids)))
            if kind != self.kind or len(ids) <= self.most:
                return run(model, ids, attention, cache, replace, *others)
            # In the middle of the pass: hooks are in place, a part of the cache is written.
            layer = model.lm.get_decoder().layers[0 if kind == "below" else -1]
            with layer.register_forward_pre_hook(self.fail):
                return run(model, ids, attention, cache, replace, *others)

        monkeypatch.setattr(SplicedModel, "_run", watched)
        monkeypatch.setattr(SplicedModel, "forward_above", within("above", forward_above))
        monkeypatch.setattr(Pool, "_start_again", within("again", start_again))

    def fail(self, module, arguments):
        raise self.error

    def watch_work(self, monkeypatch):
        run_unmasked, run_masked = generate._run_unmasked, generate._run_masked
        decode, gradients = Pool._decode_greedily, rankings.gradients

        def answer(model, rows, numbers, contexts, pool):
            entry = self.begin("answer", [row.prompt for row in rows], pool)
            found = run_unmasked(model, rows, numbers, contexts, pool)
            entry[2] = True
            return found

        def answer_masked(model, group, batch, masks, means, pool):
            entry = self.begin("answer_masked", [group.prompts[number] for number in batch], pool)
            yield from run_masked(model, group, batch, masks, means, pool)
            entry[2] = True

        going_on = []  # rows that were left when half of those that were decoded together had ended

        def decode_together(pool, rows, *arguments):
            entry = None
            if not {id(row) for row in rows} <= {*going_on}:
                entry = self.begin("decode", [row.prompt for row in rows], pool)
            going_on.clear()
            left = decode(pool, rows, *arguments)
            if entry:
                entry[2] = True
            if left is not None:
                going_on.extend(map(id, left.rows))
            self.ended += [row.prompt for row in rows if id(row) not in going_on]
            return left

        def find_gradients(model, sequences, *arguments):
            entry = self.begin("gradients", sequences)
            found = gradients(model, sequences, *arguments)
            entry[2] = True
            return found

        monkeypatch.setattr(generate, "_run_unmasked", answer)
        monkeypatch.setattr(generate, "_run_masked", answer_masked)
        monkeypatch.setattr(Pool, "_decode_greedily", decode_together)
        monkeypatch.setattr(rankings, "gradients", find_gradients)

    def begin(self, what, prompts, pool=None):
        self.work.append([what, list(map(tuple, prompts)), False, bool(pool and pool.waiting)])
        return self.work[-1]

    def sizes(self, what):
        return [(len(prompts), fits) for name, prompts, fits, _ in self.work if name == what]

    def answered(self, what):
        """All that fit, one after the other; of rows that go on together those that have ended."""
        if what == "decode":
            return self.ended
        return [prompt for name, prompts, fits, _ in self.work if fits and name == what for prompt in prompts]


WORK = ("answer", "answer_masked", "decode", "gradients")


def halve(size, fits):
    """The sizes that a batch is tried in, and whether each fits."""
    return [(size, True)] if fits(size) else [(size, False), *halve(size // 2, fits), *halve(size - size // 2, fits)]


def check_halves(size, entries):
    """Takes from `entries` of a Memory's work those of a batch of this size: it is tried whole, where rows are waiting
    again when these have ended, and then in halves."""
    _, prompts, fits, waits = next(entries)
    assert len(prompts) == size
    if fits:
        return
    parts = [size] if waits else [size // 2, size - size // 2]
    for part in parts:
        check_halves(part, entries)


def hasten(patch, model):
    """The model is not loaded anew for each round, and no figure is drawn."""
    patch.setattr(common, "load", lambda options, tokenizer: model)
    patch.setattr(figure, "draw", lambda entries: {})


@pytest.fixture(scope="module")
def roomy(demo, tmp_path_factory):
    """Rounds 1 and 2 with memory enough, two rankings each: the folder before and after each, and the Memory."""
    found, folder = {}, tmp_path_factory.mktemp("roomy")
    gc.freeze()  # each error has all garbage collected: half a second among what the tests have imported
    for script in ("baseline", "baseline_after_false"):
        with pytest.MonkeyPatch.context() as patch:
            memory, before = Memory(patch), contents(folder)
            hasten(patch, demo[0])
            patch.setattr(sys, "argv", [script, *WIDE, "--output-dir", str(folder)])
            __import__(script).main()
            found[script] = before, contents(folder), memory
    yield found
    gc.unfreeze()


@pytest.mark.parametrize(
    "script, kind, most, what, error",
    [
        ("baseline", "prompt", 7, "answer", "PyTorch"),
        ("baseline", "step", 7, "decode", "cuBLAS"),
        ("baseline", "gradient", 1, "gradients", "PyTorch"),
        ("baseline_after_false", "below", 7, "answer_masked", "cuBLAS"),
        ("baseline_after_false", "above", 7, "answer_masked", "PyTorch"),
        ("baseline_after_false", "step", 4, "decode", "PyTorch"),
    ],
)
def test_out_of_memory(roomy, demo, tmp_path, monkeypatch, capsys, script, kind, most, what, error):
    """A batch that does not fit is split in two, and again; the next one begins whole; nothing else is run twice. Nor
    are the prompts of rows that go on together: these are split among themselves."""
    before, after, enough = roomy[script]
    folder = lay_out(tmp_path / "out", before)
    hasten(monkeypatch, demo[0])
    memory = Memory(monkeypatch, kind, most, ERRORS[error])
    code, _, err = run_script(script, [*WIDE, "--output-dir", folder], monkeypatch, capsys)
    assert code == 0, err
    assert_same(folder, after)
    failed = [entry for entry in memory.work if not entry[2]]
    told = err.count("they are split in two")
    assert len(failed) >= 3 and told == sum(not waits for *_, waits in failed)
    for other in WORK:
        if other == "decode":  # each once, in another order: half a batch's rows go on before the other half is there
            assert sorted(memory.answered(other)) == sorted(enough.answered(other))
            continue
        assert memory.answered(other) == enough.answered(other)  # each once, in the same order
        if other != what:
            assert memory.sizes(other) == enough.sizes(other)
    # Each batch is tried whole, and then in halves.
    entries = iter([entry for entry in memory.work if entry[0] == what])
    if what == "decode":
        for entry in entries:
            check_halves(len(entry[1]), itertools.chain([entry], entries))
    else:
        for size, _ in enough.sizes(what):
            check_halves(size, entries)
    assert next(entries, None) is None
    if what != "decode":
        assert all(fits == (size <= most) for size, fits in memory.sizes(what))
    limits = [rows for name, rows in memory.passed if name == kind]
    assert sum(rows > most for rows in limits) == len(failed)  # a batch ends where it fails


@pytest.mark.parametrize("error, most", [(RuntimeError("shapes cannot be multiplied"), 7), (ERRORS["PyTorch"], 0)])
def test_what_no_split_helps_ends_the_round(roomy, demo, tmp_path, monkeypatch, capsys, error, most):
    """An error that is not about memory is raised at once; where a batch of one does not fit, a line says what helps.
    Nothing is lost by either."""
    before, after, enough = roomy["baseline_after_false"]
    folder = lay_out(tmp_path / "out", before)
    hasten(monkeypatch, demo[0])
    memory = Memory(monkeypatch)
    command = "baseline_after_false", [*WIDE, "--output-dir", folder], monkeypatch, capsys

    def fail_from_the_second_batch(*arguments, then=generate._run_masked):
        if memory.work:
            memory.kind, memory.most, memory.error = "above", most, error
        return then(*arguments)

    monkeypatch.setattr(generate, "_run_masked", fail_from_the_second_batch)
    if most == 0:
        code, out, err = run_script(*command)
        assert (code, out) == (2, "")
        assert re.match(r"baseline_after_false.py: out of memory, .*--device-map auto", err.splitlines()[-1])
        assert "what was finished is kept" in err and "Traceback" not in err
    else:
        with pytest.raises(RuntimeError) as caught:
            run_script(*command)
        assert caught.value is error
    first, *rest = memory.sizes("answer_masked")
    whole_size = enough.sizes("answer_masked")[1][0]
    tried = [whole_size]
    while most == 0 and tried[-1] > 1:
        tried.append(tried[-1] // 2)
    assert first == (enough.sizes("answer_masked")[0][0], True) and rest == [(size, False) for size in tried]
    lines = (folder / "predictions_gradsae-answer_false.jsonl").read_bytes().splitlines()
    assert len(lines) == 1 + first[0]
    monkeypatch.undo()
    hasten(monkeypatch, demo[0])
    assert run_script("baseline_after_false", *command[1:])[0] == 0
    assert contents(folder) == after


def test_a_gradient_that_does_not_fit_splits_the_batch_around_it(roomy, demo, tmp_path, monkeypatch, capsys):
    """One question's gradient, while all that the whole batch is ranked by is in memory: with half of that it may fit.
    Nothing is answered again."""
    _, after, enough = roomy["baseline"]
    hasten(monkeypatch, demo[0])
    memory = Memory(monkeypatch, "gradient", 0, ERRORS["PyTorch"])
    ranked = []

    def fit_in_half_a_batch(experiment, group, answers, records, read, batch, then=baseline.find_sequences):
        ranked.append(len(batch))
        memory.most = 0 if len(batch) > 10 else 100
        return then(experiment, group, answers, records, read, batch)

    monkeypatch.setattr(baseline, "find_sequences", fit_in_half_a_batch)
    code, _, err = run_script("baseline", [*WIDE, "--output-dir", tmp_path], monkeypatch, capsys)
    assert code == 0, err
    assert_same(tmp_path, after)
    expected = []
    for size, _ in enough.sizes("answer"):
        expected += halve(size, lambda n: n <= 10)
    assert ranked == [size for size, _ in expected] and len(ranked) > len(enough.sizes("answer"))
    for what in ("answer", "decode"):
        assert memory.sizes(what) == enough.sizes(what)


def test_no_memory_for_the_model(tmp_path, monkeypatch, capsys):
    def load(options, tokenizer):
        raise ERRORS["PyTorch"]

    monkeypatch.setattr(common, "load", load)
    code, out, err = run_script("baseline", [*WIDE, "--output-dir", tmp_path / "out"], monkeypatch, capsys)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert "baseline.py: out of memory" in err and "--device-map auto" in err
    assert not contents(tmp_path / "out")


def watch_bar(monkeypatch):
    """A list that gets how far the bar is moved each time."""
    moves = []

    class Bar(rounds.tqdm):
        def update(self, n=1):
            moves.append(n)
            return super().update(n)

    monkeypatch.setattr(rounds, "tqdm", Bar)
    return moves


@pytest.mark.parametrize("fails", [False, True])
def test_the_bar_moves_with_every_answer(roomy, demo, tmp_path, monkeypatch, capsys, fails):
    """By the answers that have ended, each once, also of a batch that is split; a mask that rankings share counts for
    all of them once its group is done."""
    before, _, enough = roomy["baseline_after_false"]
    folder = lay_out(tmp_path / "out", before)
    hasten(monkeypatch, demo[0])
    moves, above = watch_bar(monkeypatch), 0

    def forward_above(*arguments, then=SplicedModel.forward_above):
        nonlocal above
        above += 1
        if fails and above == 2:
            raise ERRORS["PyTorch"]
        return then(*arguments)

    monkeypatch.setattr(SplicedModel, "forward_above", forward_above)
    arguments = [*WIDE, "--k", "0", "50%", "--output-dir", folder]  # K = 0 is one mask for both rankings
    code, _, err = run_script("baseline_after_false", arguments, monkeypatch, capsys)
    assert code == 0, err
    sizes = [size for size, _ in enough.sizes("answer_masked")]
    assert (above > 3 * len(sizes)) == fails
    moves = [n for n in moves if n]
    assert min(moves) > 0 and len(moves) > 4 * len(sizes)
    shown = list(itertools.accumulate(moves))
    for number, size in enumerate(sizes):
        done = 4 * sum(sizes[:number])
        place = shown.index(done + 3 * size)  # all that is run of this batch
        assert shown[place + 1] == done + 4 * size
    assert shown[-1] == 4 * sum(sizes)


def test_the_bar_of_round_1(demo, tmp_path, monkeypatch, capsys):
    """A question counts once, however many rankings share its answer. Where effects are measured, which takes most of
    the time, the bar moves with these: evenly over a batch's right answers, for the wrong ones take no time."""
    hasten(monkeypatch, demo[0])
    moves = watch_bar(monkeypatch)
    code, _, err = run_script("baseline", [*WIDE, "--output-dir", tmp_path / "two"], monkeypatch, capsys)
    assert code == 0 and "45/45" in err, err
    moves = [n for n in moves if n]
    assert sum(moves) == 45 and 3 < len(moves) and max(moves) < 20

    moves = watch_bar(monkeypatch)
    shown, expected = [], []  # when each right answer's effects begin to be measured
    batches = iter([(0, 20), (20, 20), (40, 5)])
    batch = None

    def measure_sequence(model, sequences, number, *given, then=effects._measure_sequence):
        nonlocal batch
        if number == 0:
            batch = next(batches)
        done, size = batch
        shown.append(sum(moves))
        expected.append(done + number * size / len(sequences.rows))
        return then(model, sequences, number, *given)

    monkeypatch.setattr(effects, "_measure_sequence", measure_sequence)
    given = [*WIDE, "--ranking", "baseline", "effect", "--effects", "2", "--output-dir", tmp_path / "effect"]
    code, _, err = run_script("baseline", given, monkeypatch, capsys)
    assert code == 0 and "45/45" in err, err
    assert shown == pytest.approx(expected, abs=1) and next(batches, None) is None
    assert 10 < len(expected) < 45 and sum(moves) == 45
