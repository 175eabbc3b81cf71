"""Questions per second: the naive loop, plain Transformers without an SAE, and what the three rounds do.

    python benchmarks/throughput.py --demo                                     # the bundled model, on the CPU
    python benchmarks/throughput.py --shape gemma-3-270m --width 65536         # a shape that a CPU can do
    python benchmarks/throughput.py --shape narrow                             # many small layers: the host's own work
    python benchmarks/throughput.py --shape gemma-2-9b-it --device cuda        # the paper's shape, on a GPU
    python benchmarks/throughput.py --shape gemma-2-9b-it --device cuda --compare-sae-dtypes tf32 float16

With --shape nothing is downloaded: a Gemma 2 of that shape with random weights, a random JumpReLU SAE, prompts of
SQuAD's lengths, 12 new tokens. The masked answers of random models differ from the unmasked ones nearly always: the
worst case, for unmasked answers serve as drafts.

All rows are of the same questions, one after the other, --repeats times after a warm-up: medians, also of the times
over plain in each turn, so that a machine that is faster now and slower then does not show. Plain Transformers run in a
process of their own. Seconds in the SAE (encoding, decoding) are those of one more run, in which forward passes are
counted too: wide ones, over prompts and drafts (above or below the SAE alone, and those of gradients, are passes as
well), and steps, in which each answer gets one token.

With --shape on the CPU, also what a step costs: the CPU time of the thread that takes it, TopK masked and in plain
Transformers, for a single answer, whose step is nearly all the host's own work, and for those of one batch.
"""

import concurrent.futures
import copy
import dataclasses
import functools
import math
import multiprocessing
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import workloads  # first: it finds the project's modules, and readies PyTorch's memory

# isort: split
import command_line
import plain
import torch
from accelerate.utils.memory import release_memory
from command_line import Asked
from measures import Figures, Stopwatch, look_inside, measure, measure_step, on_cuda, peak_gb, reset_peak
from tqdm import tqdm
from workloads import Found, Workload

from experiment import guard, say
from experiment.hub import prepare_libraries
from experiment.intervention import plan
from experiment.intervention.forward import SplicedModel
from experiment.intervention.rows import Answer
from experiment.intervention.splice import Splice
from experiment.masks import SIDES

SQUAD_QUESTIONS = 10_570
FURTHER_K = ("20", "10")  # beside 50%
# Rows of the table, besides the naive loop's.
PLAIN = "plain generate, no SAE"
ROUND_1 = "round 1, ranked"
TOPK = "TopK masked, K = 50%"
BOTTOMK = "BottomK masked, K = 50%"
FURTHER = f"each further K ({', '.join(FURTHER_K)})"
GRADSAE = "GradSAE's ranking"


@dataclass(frozen=True)
class Bench:
    """What all rows have in common.

    first, batches: numbers of questions, of round 1 and of masked rounds, which run the drafts too.  found: of each
    question, its round 1.
    """

    work: Workload
    first: list[list[int]]
    batches: list[list[int]]
    found: list[Found]


def prepare(asked: Asked) -> Bench:
    """Loads model and SAE, and runs round 1 once."""
    chosen = asked.options()
    prepare_libraries(chosen)
    if asked.shape is None:
        work = workloads.load_demo(chosen)
    else:
        shape = workloads.SHAPES[asked.shape]
        shape = dataclasses.replace(shape, d_sae=asked.width or shape.d_sae)
        work = workloads.load_shape(shape, chosen, asked.questions)
    lengths = [len(prompt) for prompt in work.prompts]
    first = plan.plan_batches(lengths, asked.batch_tokens, work.contexts)
    say("Round 1, for drafts and lists ...")
    found = workloads.round_1(work, first)
    with_drafts = [length + len(one.tokens) for length, one in zip(lengths, found)]
    batches = plan.plan_batches(with_drafts, asked.batch_tokens, work.contexts)
    return Bench(work, first, batches, found)


def list_pieces(bench: Bench) -> dict[str, Callable[[], Any]]:
    """What is done for each of our rows."""
    round_1 = functools.partial(workloads.round_1, bench.work, bench.first)
    masked = functools.partial(workloads.masked_round, bench.work, bench.batches, bench.found)
    return {
        ROUND_1: round_1,
        TOPK: functools.partial(masked, "topk"),
        BOTTOMK: functools.partial(masked, "bottomk"),
        FURTHER: functools.partial(masked, "topk", ("50%", *FURTHER_K)),
        GRADSAE: functools.partial(round_1, ("baseline", "gradsae")),
    }


# ---------------------------------------------------------------------------------------------------------------------
# What is measured


def take_turns(asked: Asked, apart: Executor, pieces: dict[str, Callable[[], Any]]) -> dict[str, Figures]:
    """The rows: plain Transformers, then each of the pieces of work, and all of it again, --repeats times.

    apart: the process of plain Transformers.
    """
    release_memory()  # of the warm-up: both processes are on one device
    say("Loading and warming up plain Transformers ...")
    passes = apart.submit(plain.count_all, asked).result()
    seconds: dict[str, list[float]] = {name: [] for name in (PLAIN, *pieces)}
    peaks: dict[str, list[float]] = {name: [] for name in (PLAIN, *pieces)}
    for turn in range(1, asked.repeats + 1):
        for name in tqdm(seconds, desc=f"Turn {turn} of {asked.repeats}"):
            if name == PLAIN:
                took, peak = apart.submit(plain.measure_all, asked).result()
            else:
                took, peak = measure(pieces[name], asked.device)
            seconds[name].append(took)
            peaks[name].append(peak)
    rows = {name: Figures(seconds[name], peak=max(peaks[name])) for name in seconds}
    rows[PLAIN] = dataclasses.replace(rows[PLAIN], passes=passes)
    return rows


def complete(asked: Asked, bench: Bench, pieces: dict[str, Callable[[], Any]], rows: dict[str, Figures]) -> None:
    """Adds passes and seconds in the SAE to our rows; of two rows leaves what they add to another one."""
    for name, piece in tqdm(pieces.items(), desc="Passes, and seconds in the SAE"):
        passes, sae = look_inside(piece, asked.device, bench.work.model)
        rows[name] = dataclasses.replace(rows[name], passes=passes, sae=sae)
    rows[FURTHER] = rows[FURTHER].beyond(rows[TOPK], len(FURTHER_K))
    rows[GRADSAE] = rows[GRADSAE].beyond(rows[ROUND_1])


def measure_naive(asked: Asked, bench: Bench, top: list[Answer]) -> tuple[Figures, int]:
    """What the naive loop would be for all questions, and how many of its answers `top` has."""
    work = bench.work
    count = asked.naive_questions
    numbers = random.Random(3).sample(range(len(bench.found)), count)  # of all lengths
    latents = [bench.found[number].latents("topk", "50%") for number in numbers]
    short = dataclasses.replace(work, new_tokens=1)
    workloads.naive_loop(short, numbers[:1], latents)  # a warm-up
    reset_peak(asked.device)
    watch = Stopwatch(asked.device)
    generated = watch.call(workloads.naive_loop, work, tqdm(numbers, desc="Naive loop"), latents)
    seconds = watch.seconds * len(bench.found) / count
    figures = Figures([seconds] * asked.repeats, peak=peak_gb(asked.device))
    same = 0
    for number, tokens in zip(numbers, generated):
        same += tokens == top[number].tokens
    return figures, same


@dataclass(frozen=True)
class StepTimes:
    """CPU seconds of a step in each turn. answers: how many of them got a token in it."""

    answers: int
    ours: list[float]
    plain: list[float]


def measure_steps(asked: Asked, bench: Bench, apart: Executor) -> list[StepTimes]:
    """Steps of a single answer, and steps of a batch's. apart: the process of plain Transformers."""
    batch = bench.first[0]
    found = []
    for numbers in (batch[:1], batch):
        times = StepTimes(len(numbers), [], [])
        for _ in tqdm(range(asked.repeats), desc=f"Steps, answers in each: {len(numbers)}"):
            theirs = apart.submit(plain.measure_step_of, asked, numbers).result()
            times.plain.append(theirs)
            ours = _measure_our_step(bench, numbers)
            times.ours.append(ours)
        found.append(times)
    return found


def _measure_our_step(bench: Bench, numbers: Sequence[int]) -> float:
    """CPU seconds of a step in which these questions are answered together, TopK masked."""
    work = bench.work.take(numbers)
    found = []
    for number in numbers:
        one = bench.found[number]
        begun = dataclasses.replace(one, tokens=one.tokens[:1])  # so short a draft leaves all further tokens to steps
        found.append(begun)
    whole = [list(range(len(numbers)))]
    masked = functools.partial(workloads.masked_round, work, whole, found, "topk")
    return measure_step(work.model.lm, masked)


def compare(asked: Asked, sae_dtype: str, bench: Bench, top: list[Answer]) -> str:
    """What changes with the SAE in another precision than float32, in a line. top: TopK's answers in float32."""
    say(f"SAE in {sae_dtype} ...")
    work = bench.work
    prepare_libraries(asked.options(sae_dtype))
    sae = copy.deepcopy(work.model.splice.sae).to(dtype=getattr(torch, sae_dtype.replace("tf32", "float32")))
    model = SplicedModel(work.model.model, Splice(sae))
    model.end_ids = work.model.end_ids
    other = dataclasses.replace(work, model=model)
    theirs = workloads.round_1(other, bench.first)
    (their_top,) = workloads.masked_round(other, bench.batches, bench.found, "topk")
    prepare_libraries(asked.options())
    shared = []
    for which in SIDES:
        both = 0
        ours = 0
        for one, other_one in zip(bench.found, theirs):
            latents = set(one.latents(which, "50%"))
            ours += len(latents)
            both += len(latents & set(other_one.latents(which, "50%")))
        shared.append(both / max(1, ours))
    return (
        f"SAE in {sae_dtype}, the same as in float32: answers {agreement(bench.found, theirs)}, with TopK masked "
        f"{agreement(top, their_top)}; TopK latents {shared[0]:.1%}, BottomK latents {shared[1]:.1%}"
    )


def agreement(some: Sequence[Found | Answer], others: Sequence[Found | Answer]) -> str:
    """The share of questions whose answers are the same."""
    same = [one.tokens == other.tokens for one, other in zip(some, others)]
    return f"{statistics.mean(same):.1%}"


# ---------------------------------------------------------------------------------------------------------------------
# What is printed


def describe(asked: Asked, bench: Bench) -> str:
    """What was run, in two lines."""
    length = statistics.mean(len(prompt) for prompt in bench.work.prompts)
    active = statistics.mean(one.active for one in bench.found)
    device = f"{torch.get_num_threads()} CPU threads"
    if on_cuda(asked.device):
        device = torch.cuda.get_device_name(asked.device)
    return (
        f"{len(bench.found)} questions of {length:.0f} prompt tokens; {len(bench.first)} batches in round 1, "
        f"{len(bench.batches)} in a masked round, of at most {asked.batch_tokens} tokens\n"
        f"{device}; {asked.dtype}, SAE in {asked.sae_dtype}: {bench.work.model.splice.d_sae} latents, "
        f"{active:.0f} active at the last position"
    )


def print_table(count: int, rows: dict[str, Figures]) -> None:
    """count: of questions.  rows: the naive loop's first."""
    naive, *_ = rows.values()
    head = "questions/s   / naive  time / plain  wide passes   steps  seconds in SAE  peak GB"
    print(f"\n{'':28}  {head}")
    for name, row in rows.items():
        seconds = statistics.median(row.seconds)
        over_plain = statistics.median(ours / theirs for ours, theirs in zip(row.seconds, rows[PLAIN].seconds))
        cells = [
            _cell(count / seconds, 11, 2),
            _cell(naive.seconds[0] / seconds, 8, 1),
            _cell(over_plain, 12, 2),
            _cell(row.passes.wide, 11, 1),
            _cell(row.passes.steps, 6, 1),
            _cell(row.sae, 14, 2),
            _cell(row.peak, 7, 2),
        ]
        print(f"{name:28}  " + "  ".join(cells))
    print()


def _cell(value: float, width: int, digits: int) -> str:
    """A figure of the table; a dash where there is none."""
    text = "-" if math.isnan(value) else f"{value:.{digits}f}"
    return text.rjust(width)


def print_steps(steps: list[StepTimes]) -> None:
    """In milliseconds; ours over plain Transformers'."""
    print(f"{'CPU time of a step, in ms':28}  TopK masked  plain generate  time / plain")
    for times in steps:
        ours = 1000 * statistics.median(times.ours)
        theirs = 1000 * statistics.median(times.plain)
        ratio = statistics.median(our / their for our, their in zip(times.ours, times.plain))
        print(f"{'answers in the step: ' + str(times.answers):28}  {ours:11.2f}  {theirs:14.2f}  {ratio:12.2f}")
    print()


def print_whole_squad(count: int, rows: dict[str, Figures]) -> None:
    """How long all of SQuAD would take. count: of the questions that were measured."""
    for name, row in rows.items():
        minutes = SQUAD_QUESTIONS * statistics.median(row.seconds) / count / 60
        print(f"all {SQUAD_QUESTIONS} SQuAD questions, {name}: {minutes:.1f} min")


def run(asked: Asked, apart: Executor) -> None:
    """Measures, and prints. apart: the process of plain Transformers."""
    bench = prepare(asked)
    count = len(bench.found)
    pieces = list_pieces(bench)
    results = {name: piece() for name, piece in tqdm(pieces.items(), desc="Warm-up")}
    rows = take_turns(asked, apart, pieces)
    complete(asked, bench, pieces, rows)
    (top,) = results[TOPK]
    (bottom,) = results[BOTTOMK]
    naive, same = measure_naive(asked, bench, top)
    lines = [
        f"masked answers that are the unmasked one: TopK {agreement(bench.found, top)}, "
        f"BottomK {agreement(bench.found, bottom)}",
        f"TopK's answers that are the naive loop's: {same} of {asked.naive_questions}",
    ]
    if same < asked.naive_questions and asked.shape and asked.dtype != "float32":
        lines[-1] += f" (random weights' likeliest tokens may lie closer than {asked.dtype} rounds: compare in float32)"
    steps = []
    if asked.shape and not on_cuda(asked.device):
        steps = measure_steps(asked, bench, apart)
    for sae_dtype in asked.compare_sae_dtypes:
        lines.append(compare(asked, sae_dtype, bench, top))
    print(describe(asked, bench))
    print_table(count, {f"naive loop ({asked.naive_questions} questions)": naive} | rows)
    if steps:
        print_steps(steps)
    print("\n".join(lines))
    if asked.shape:
        print_whole_squad(count, {name: rows[name] for name in pieces})


def main() -> None:
    asked = command_line.parse(__doc__)
    # A fresh process and not a fork of this one, so that it finds PyTorch's threads and CUDA untouched.
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
        run(asked, apart)


if __name__ == "__main__":
    sys.exit(guard(main))
