"""README's benchmark commands at a tiny size: every row and column of the table is there, with figures that can be."""

import contextlib
import functools
import io
import math
import re
import sys
import time

import pytest
import torch
from conftest import ROOT

from experiment import UserError, guard

COMMANDS = {
    "demo": ("--demo", "--questions", "16", "--naive-questions", "2", "--repeats", "1"),
    "shape": ("--shape", "tiny", "--questions", "6", "--naive-questions", "2", "--repeats", "1", "--width", "512")
    + ("--compare-sae-dtypes", "float16"),
}
ROWS = [
    "naive loop (2 questions)",
    "plain generate, no SAE",
    "round 1, ranked",
    "TopK masked, K = 50%",
    "BottomK masked, K = 50%",
    "each further K (20, 10)",
    "GradSAE's ranking",
]
# Wide passes and steps of each row between the naive loop and GradSAE. Of random answers, as those of the shape are,
# all take 11 steps, together; plain Transformers take as many in each of two batches.
PASSES = {
    "demo": [(1, 6), (2, 3), (3, 5), (3, 0), (1, 1.5)],
    "shape": [(2, 22), (3, 11), (5, 11), (5, 11), (2, 0)],
}


@pytest.fixture(scope="module")
def printed():
    """What the commands print, results and news, run in this process, which has the libraries loaded."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        patch.setenv("OMP_NUM_THREADS", "1")  # of the process that plain Transformers run in
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        import throughput

        for name, arguments in COMMANDS.items():
            patch.setattr(sys, "argv", ["throughput.py", *arguments])
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
                assert guard(throughput.main) == 0
            found[name] = out.getvalue(), err.getvalue()
        torch.set_num_threads(threads)
    return found


def read_table(text):
    """{row: {column: number}}."""
    head, *lines = text.split("\n\n")[1].splitlines()
    columns = re.split(r"\s{2,}", head.strip())
    table = {}
    for line in lines:
        cells = [math.nan if cell == "-" else float(cell) for cell in line[28:].split()]
        table[line[:28].rstrip()] = dict(zip(columns, cells, strict=True))
    return table


@pytest.mark.parametrize("name", COMMANDS)
def test_table(printed, name):
    assert "nan" not in printed[name][0]
    table = read_table(printed[name][0])
    assert list(table) == ROWS
    naive, plain, *ours = (table[row] for row in ROWS)
    columns = ["questions/s", "/ naive", "time / plain", "wide passes", "steps", "seconds in SAE", "peak GB"]
    assert list(naive) == columns
    assert naive["/ naive"] == plain["time / plain"] == 1
    for row, found in table.items():
        assert math.isnan(found["seconds in SAE"]) == (found in (naive, plain))
        assert math.isnan(found["wide passes"]) == math.isnan(found["steps"]) == (found is naive)
        assert 0.1 < found["peak GB"] < 5
        if row not in ROWS[-2:]:  # those are differences: another process's work may be in them
            assert 0.1 < found["questions/s"] < 1000
            assert found["/ naive"] == pytest.approx(found["questions/s"] / naive["questions/s"], rel=0.1, abs=0.1)
            assert found["time / plain"] == pytest.approx(plain["questions/s"] / found["questions/s"], rel=0.1, abs=0.1)
    assert [(table[row]["wide passes"], table[row]["steps"]) for row in ROWS[1:-1]] == PASSES[name]
    assert ours[-1]["wide passes"] >= 1 and ours[-1]["steps"] == 0
    questions = {"demo": 16, "shape": 6}[name]
    for found in ours[:3]:
        assert 0 <= found["seconds in SAE"] < 2 * questions / found["questions/s"]


def test_what_stands_around_the_table(printed):
    demo, shape = printed["demo"][0], printed["shape"][0]
    assert re.search(r"^16 questions of 9[0-9] prompt tokens; 1 batches in round 1, 1 in a masked round", demo)
    assert re.search(r"^6 questions of 1[0-9]{2} prompt tokens; .* of at most 1024 tokens", shape)
    for text, width in ((demo, 512), (shape, 512)):
        assert f"1 CPU threads; float32, SAE in float32: {width} latents" in text
        assert "TopK's answers that are the naive loop's: 2 of 2" in text
    assert re.search(r"that are the unmasked one: TopK [0-9.]+%, BottomK 100.0%", demo)
    assert re.search(r"SAE in float16, the same as in float32: answers ([0-9.]+%.*){4}", shape)
    assert [line.split(",", 1)[1].split(":")[0].strip() for line in shape.splitlines() if "SQuAD" in line] == [
        row.replace(": ", " ") for row in ROWS[2:]
    ]
    assert "SQuAD" not in demo


@pytest.mark.parametrize("name", COMMANDS)
def test_news(printed, name):
    """Every stage shows as it begins, on standard error alone: standard output begins with what was run."""
    out, err = printed[name]
    questions = {"demo": 16, "shape": 6}[name]
    assert out.startswith(f"{questions} questions of ")
    bars = ["Warm-up", "Turn 1 of 1", "Passes, and seconds in the SAE", "Naive loop"]
    says = ["Loading ", "Loaded in ", "Round 1, ", "Loading and warming up plain Transformers"]
    if name == "shape":
        bars += ["Steps, answers in each: 1", "Steps, answers in each: 5"]
        says.append("SAE in float16")
    for stage in bars:
        assert f"\r{stage}: 100%" in err and f"{stage}:" not in out
    for stage in says:
        assert f"\n{stage}" in f"\n{err}"


def test_steps(printed):
    """Ours beside plain Transformers', for a single answer and for those of a batch, in milliseconds."""
    head, *lines = printed["shape"][0].split("\n\n")[2].splitlines()
    assert re.split(r"\s{2,}", head) == ["CPU time of a step, in ms", "TopK masked", "plain generate", "time / plain"]
    found = []
    for line in lines:
        label, *cells = re.split(r"\s{2,}", line)
        ours, plain, ratio = map(float, cells)
        assert 0.2 < plain < 100 and 0.2 < ours < 100
        assert ratio == pytest.approx(ours / plain, abs=0.02 * ratio + 0.01)  # one turn, rounded
        found.append(label)
    assert found == ["answers in the step: 1", "answers in the step: 5"]
    assert "CPU time" not in printed["demo"][0]


def test_what_is_in_a_step(monkeypatch):
    """All of the thread's work from one step to the next, but no time in which it waits, and no wide pass."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import plain
    import workloads
    from measures import measure_step

    lm = workloads.make_lm(workloads.SHAPES["tiny"], "cpu", torch.float32)
    lm.generation_config.eos_token_id = None
    lm.generation_config.pad_token_id = 0
    prompts, _ = workloads.make_prompts(3, 1000)
    loaded = plain.Loaded(lm, prompts, [[0, 1, 2]], new_tokens=3)  # a wide pass and two steps: one begins after another
    passes = []

    def measure_with(after_pass):
        passes.clear()
        with lm.register_forward_hook(after_pass):
            return measure_step(lm, functools.partial(loaded.generate, [0, 1, 2]))

    def work(*_):
        passes.append(0.1 if passes else 0.5)  # CPU seconds
        end = time.thread_time() + passes[-1]
        while time.thread_time() < end:
            pass

    def wait(*_):
        passes.append(0.1)
        time.sleep(0.1)

    measure_with(wait)  # a warm-up
    own = measure_with(wait)
    assert passes == [0.1, 0.1, 0.1] and 0 < own < 0.05
    busy = measure_with(work)
    assert passes == [0.5, 0.1, 0.1] and 0.09 < busy - own < 0.15


def test_what_is_refused(monkeypatch):
    """TF32 where there is none, before anything is measured."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import command_line

    for option in ("--sae-dtype", "--compare-sae-dtypes"):
        monkeypatch.setattr(sys, "argv", ["throughput.py", "--demo", option, "tf32"])
        with pytest.raises(UserError, match="only a CUDA device has it"):
            command_line.parse(None)
