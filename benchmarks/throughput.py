"""Questions a second: the naive loop, plain Transformers without an SAE, and what the three rounds do.

    python benchmarks/throughput.py --demo                                     # the bundled model, on the CPU
    python benchmarks/throughput.py --shape gemma-3-270m --width 65536         # a shape that a CPU can do
    python benchmarks/throughput.py --shape narrow                             # many small layers: the host's own work
    python benchmarks/throughput.py --shape gemma-2-9b-it --device cuda        # the paper's shape, on a GPU
    python benchmarks/throughput.py --shape gemma-2-9b-it --device cuda --compare-sae-dtypes tf32 float16

With --shape nothing is downloaded: a Gemma 2 of that shape with random weights, a random JumpReLU SAE, prompts of
SQuAD's lengths, 12 new tokens. The masked answers of random models differ from the unmasked ones nearly always: the
worst case, for unmasked answers serve as drafts. All rows are of the same questions, one after the other, --repeats
times after a warm-up: medians, also of the times over plain in each turn, so that a machine that is faster now and
slower then does not show. Plain Transformers run in a process of their own, which has no TransformerLens in it: that
changes Gemma 2's attention. Seconds in the SAE (encoding, decoding) are those of one more run, in which forward passes
are counted too: wide ones, over prompts and drafts (above or below the SAE alone, and those of gradients, are passes as
well), and steps, in which each answer gets one token.
"""

import argparse
import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import math
import multiprocessing
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import workloads  # first: it finds the project's modules, and readies PyTorch's memory

# isort: split
import torch
import transformers
from accelerate.utils.memory import release_memory

import common
from experiment import guard, options
from experiment.demo import bundled
from experiment.hub import prepare_libraries
from experiment.intervention import plan
from experiment.intervention.forward import SplicedModel
from experiment.intervention.splice import Splice

PLAIN = {}  # in the process of plain Transformers: what generates all answers
SQUAD_QUESTIONS = 10_570
FURTHER_K = ("20", "10")  # beside 50%
SIZES = {  # questions, those of the naive loop, and tokens in a batch, where not asked for
    None: (640, 24, 16384),  # the demo
    "gemma-2-9b-it": (640, 8, 32768),
    "gemma-3-270m": (32, 4, 4096),
    "tiny": (12, 2, 1024),
    "narrow": (80, 4, 4096),
}


@dataclass
class Passes:
    """How many forward passes there were: wide ones, and steps, which run one token per row behind its cache."""

    wide: float = 0
    steps: float = 0

    def count(self, module: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Counts one more pass: a hook before a Transformers model."""
        cache = named["past_key_values"]
        goes_on = cache is not None and cache.get_seq_length() > 0
        if goes_on and named["input_ids"].shape[1] == 1:
            self.steps += 1
        else:
            self.wide += 1


@dataclass(frozen=True)
class Figures:
    """Of all questions: seconds in each turn, forward passes, seconds in the SAE's encode and reconstruct, and peak
    memory in GB."""

    seconds: list[float]
    passes: Passes = field(default_factory=lambda: Passes(math.nan, math.nan))
    sae: float = math.nan
    peak: float = math.nan

    def beyond(self, other: "Figures", parts: int = 1) -> "Figures":
        """What was done more than `other`, one of so many parts of it."""
        seconds = [(ours - theirs) / parts for ours, theirs in zip(self.seconds, other.seconds)]
        wide = (self.passes.wide - other.passes.wide) / parts
        steps = (self.passes.steps - other.passes.steps) / parts
        return Figures(seconds, Passes(wide, steps), (self.sae - other.sae) / parts, self.peak)


class Stopwatch:
    """Adds up the seconds of its calls, what they leave in a CUDA device's queue included."""

    def __init__(self, device):
        self.device, self.seconds = device, 0.0

    def call(self, function, *args):
        wait = functools.partial(torch.cuda.synchronize, self.device) if on_cuda(self.device) else lambda: None
        wait()
        start = time.perf_counter()
        result = function(*args)
        wait()
        self.seconds += time.perf_counter() - start
        return result


def measure(function, device):
    """Seconds and peak memory of a piece of work, the only one on the device."""
    peak_gb(device, reset=True)
    watch = Stopwatch(device)
    watch.call(function)
    peak = peak_gb(device)
    release_memory()  # of a CUDA device, for the other process
    return watch.seconds, peak


@contextlib.contextmanager
def count_passes(lm: torch.nn.Module) -> Iterator[Passes]:
    """Of a Transformers model, for as long as the block lasts."""
    passes = Passes()
    with lm.register_forward_pre_hook(passes.count, with_kwargs=True):
        yield passes


def look_inside(function: Callable[[], Any], device: str, model: SplicedModel) -> tuple[Passes, float]:
    """Forward passes, and seconds in the SAE, in a run by itself: waiting for the device at every step costs time.

    Steps are not recorded there: of what is replayed nothing can be counted.
    """
    watch = Stopwatch(device)
    splice = model.splice
    can_record = model.can_record
    model.can_record = False
    for name in ("encode", "reconstruct"):
        setattr(splice, name, functools.partial(watch.call, getattr(splice, name)))
    with count_passes(model.lm) as passes:
        function()
    del splice.encode, splice.reconstruct
    model.can_record = can_record
    return passes, watch.seconds


def on_cuda(device):
    return torch.device(device).type == "cuda"


def peak_gb(device, reset=False):
    """Peak memory: of the tensors on a CUDA device, or of the whole process, which Linux alone tells."""
    if on_cuda(device):
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 1e9
    process = Path("/proc/self")
    if not process.exists():
        return math.nan
    if reset:
        (process / "clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+([0-9]+)", (process / "status").read_text())[1]) * 1024 / 1e9


def read_options(args, sae_dtype=None):
    """The Options of a round on this device, in these precisions."""
    chosen = ["--device", args.device, "--dtype", args.dtype, "--sae-dtype", sae_dtype or args.sae_dtype]
    return options.parse(["--demo", *chosen, "--limit", str(args.questions)], "", masks=None)


def load_plain(args: argparse.Namespace) -> Passes:
    """Makes plain Transformers ready in this process, which is theirs, and warm: `measure_plain` runs them. Their
    forward passes."""
    chosen = read_options(args)
    prepare_libraries(chosen)
    tokenizer, dtype = common.load_tokenizer(chosen), getattr(torch, chosen.dtype)
    if args.demo:
        auto, folder = transformers.AutoModelForCausalLM, bundled(chosen.model)
        lm = auto.from_pretrained(folder, dtype=dtype, attn_implementation="eager").to(args.device)
        (prompts, _), new_tokens = workloads.demo_prompts(chosen, tokenizer), chosen.max_new_tokens
    else:
        lm = workloads.make_lm(workloads.SHAPES[args.shape], args.device, dtype)
        (prompts, _), new_tokens = workloads.make_prompts(args.questions, lm.config.vocab_size), workloads.NEW_TOKENS
    common.configure_generation(lm, tokenizer)
    if args.shape:
        lm.generation_config.eos_token_id = [lm.config.vocab_size]  # nothing, as for ours
    batches = plan.plan_batches([len(prompt) for prompt in prompts], args.batch_tokens, range(len(prompts)))
    PLAIN["generate"] = functools.partial(workloads.plain_generate, lm, prompts, batches, new_tokens)
    with count_passes(lm) as passes:
        measure_plain(args)
    return passes


def measure_plain(args):
    return measure(PLAIN["generate"], args.device)


def load(args):
    chosen = read_options(args)
    prepare_libraries(chosen)
    if args.demo:
        return workloads.load_demo(chosen)
    shape = workloads.SHAPES[args.shape]
    return workloads.load_shape(dataclasses.replace(shape, d_sae=args.width or shape.d_sae), chosen, args.questions)


def measure_rows(args, apart):
    """How many questions there are, {row: Figures}, and lines to print. apart: the process of plain Transformers."""
    work = load(args)
    lengths = [len(prompt) for prompt in work.prompts]
    first = plan.plan_batches(lengths, args.batch_tokens, work.contexts)
    found = workloads.round_1(work, first)
    with_drafts = [length + len(f.tokens) for length, f in zip(lengths, found)]
    batches = plan.plan_batches(with_drafts, args.batch_tokens, work.contexts)
    names = ("plain generate, no SAE", "round 1, ranked", "TopK masked, K = 50%", "BottomK masked, K = 50%")
    plain, round_1, top, bottom = names
    further, by_gradient = f"each further K ({', '.join(FURTHER_K)})", "GradSAE's ranking"
    masked = functools.partial(workloads.masked_round, work, batches, found)
    pieces = {
        round_1: functools.partial(workloads.round_1, work, first),
        top: functools.partial(masked, "topk"),
        bottom: functools.partial(masked, "bottomk"),
        further: functools.partial(masked, "topk", ("50%", *FURTHER_K)),
        by_gradient: functools.partial(workloads.round_1, work, first, ("baseline", "gradsae")),
    }
    results = {name: piece() for name, piece in pieces.items()}  # and a warm-up
    rows = take_turns(args, apart, plain, pieces)
    for name, piece in pieces.items():
        passes, sae = look_inside(piece, args.device, work.model)
        rows[name] = dataclasses.replace(rows[name], passes=passes, sae=sae)
    rows[further] = rows[further].beyond(rows[top], len(FURTHER_K))
    rows[by_gradient] = rows[by_gradient].beyond(rows[round_1])
    (top_answers,), (bottom_answers,) = results[top], results[bottom]
    naive, same = measure_naive(args, work, found, top_answers)
    lines = [
        f"{len(lengths)} questions of {statistics.mean(lengths):.0f} prompt tokens; {len(first)} batches in round 1, "
        f"{len(batches)} in a masked round, of at most {args.batch_tokens} tokens",
        f"{name_device(args.device)}; {args.dtype}, SAE in {args.sae_dtype}: {work.model.splice.d_sae} latents, "
        f"{statistics.mean(f.active for f in found):.0f} active at the last position",
        f"masked answers that are the unmasked one: TopK {agreement(found, top_answers)}, "
        f"BottomK {agreement(found, bottom_answers)}",
        f"TopK's answers that are the naive loop's: {same} of {args.naive_questions}",
    ]
    lines += [compare(args, dtype, work, first, batches, found, top_answers) for dtype in args.compare_sae_dtypes]
    return len(lengths), naive | rows, lines


def take_turns(args, apart, plain, pieces):
    """{row: Figures}: plain Transformers, then each of the pieces of work, and all of it again, --repeats times."""
    release_memory()  # of the warm-up: both processes are on one device
    passes = apart.submit(load_plain, args).result()
    turns = []
    for _ in range(args.repeats):
        turns.append({plain: apart.submit(measure_plain, args).result()})
        turns[-1] |= {name: measure(piece, args.device) for name, piece in pieces.items()}
    rows = {}
    for name in turns[0]:
        seconds = [turn[name][0] for turn in turns]
        rows[name] = Figures(seconds, peak=max(turn[name][1] for turn in turns))
    rows[plain] = dataclasses.replace(rows[plain], passes=passes)
    return rows


def measure_naive(args, work, found, top):
    """The row of the naive loop: what it would be for all questions. And how many of its answers `top` has."""
    numbers = random.Random(3).sample(range(len(found)), args.naive_questions)  # of all lengths
    latents, watch = [found[i].latents("topk", "50%") for i in numbers], Stopwatch(args.device)
    workloads.naive_loop(dataclasses.replace(work, new_tokens=1), numbers[:1], latents)  # warm-up
    peak_gb(args.device, reset=True)
    generated = watch.call(workloads.naive_loop, work, numbers, latents)
    figures = Figures([watch.seconds * len(found) / len(numbers)] * args.repeats, peak=peak_gb(args.device))
    same = sum(tokens == top[i].tokens for i, tokens in zip(numbers, generated))
    return {f"naive loop ({len(numbers)} questions)": figures}, same


def compare(args, sae_dtype, work, first, batches, found, top):
    """What changes with the SAE in another precision than float32, in a line. found, top: what float32 gives."""
    prepare_libraries(read_options(args, sae_dtype))
    sae = copy.deepcopy(work.model.splice.sae).to(dtype=getattr(torch, sae_dtype.replace("tf32", "float32")))
    model = SplicedModel(work.model.model, Splice(sae))
    model.end_ids = work.model.end_ids
    other = dataclasses.replace(work, model=model)
    theirs, (their_top,) = workloads.round_1(other, first), workloads.masked_round(other, batches, found, "topk")
    prepare_libraries(read_options(args))
    shared = []
    for which in ("topk", "bottomk"):
        pairs = [(set(f.latents(which, "50%")), set(theirs[i].latents(which, "50%"))) for i, f in enumerate(found)]
        shared.append(sum(len(ours & others) for ours, others in pairs) / max(1, sum(len(ours) for ours, _ in pairs)))
    return (
        f"SAE in {sae_dtype}, the same as in float32: answers {agreement(found, theirs)}, with TopK masked "
        f"{agreement(top, their_top)}; TopK latents {shared[0]:.1%}, BottomK latents {shared[1]:.1%}"
    )


def agreement(some, others):
    """The share of questions whose answers are the same."""
    return f"{statistics.mean(a.tokens == b.tokens for a, b in zip(some, others)):.1%}"


def name_device(device):
    return torch.cuda.get_device_name(device) if on_cuda(device) else f"{torch.get_num_threads()} CPU threads"


# ---------------------------------------------------------------------------------------------------------------------


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--demo", action="store_true", help="the bundled model, SAE and questions")
    what.add_argument("--shape", choices=tuple(workloads.SHAPES), help="random weights in this shape")
    parser.add_argument("--width", type=int, help="latents of a shape's SAE (default: the shape's own)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=options.FLOATS, help="(default: float32; on CUDA float16)")
    parser.add_argument("--sae-dtype", choices=(*options.FLOATS, "tf32"), default="float32")
    parser.add_argument("--compare-sae-dtypes", nargs="+", choices=("float16", "bfloat16", "tf32"), default=[])
    parser.add_argument("--questions", type=int)
    parser.add_argument("--naive-questions", type=int, help="of these, for the naive loop")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int)
    args = parser.parse_args()
    if args.compare_sae_dtypes and args.sae_dtype != "float32":
        parser.error("--compare-sae-dtypes: the others are compared with --sae-dtype float32")
    args.dtype = args.dtype or ("float16" if args.device.startswith("cuda") else "float32")
    for name, size in zip(("questions", "naive_questions", "batch_tokens"), SIZES[args.shape]):
        setattr(args, name, getattr(args, name) or size)
    args.naive_questions = min(args.naive_questions, args.questions)
    for dtype in (args.sae_dtype, *args.compare_sae_dtypes):
        read_options(args, dtype)  # refuses tf32 where there is none
    return args


def print_table(args, n, rows, lines):
    naive, plain, *_ = rows.values()
    head = "questions/s   / naive  time / plain  wide passes   steps  seconds in SAE  peak GB"
    print("\n".join(lines[:2]), f"\n\n{'':28}  {head}")
    for name, found in rows.items():
        seconds = statistics.median(found.seconds)
        over_plain = statistics.median(ours / theirs for ours, theirs in zip(found.seconds, plain.seconds))
        print(
            f"{name:28}  {n / seconds:11.2f}  {naive.seconds[0] / seconds:8.1f}  {over_plain:12.2f}  "
            f"{found.passes.wide:11.1f}  {found.passes.steps:6.1f}  {found.sae:14.2f}  {found.peak:7.2f}"
        )
    print("\n" + "\n".join(lines[2:]))
    if args.shape:
        for name, found in list(rows.items())[2:]:
            minutes = SQUAD_QUESTIONS * statistics.median(found.seconds) / n / 60
            print(f"all {SQUAD_QUESTIONS} SQuAD questions, {name}: {minutes:.1f} min")


def main():
    args = parse_arguments()
    # A fresh process and not a fork of this one, so that it finds PyTorch's threads and CUDA untouched.
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
        print_table(args, *measure_rows(args, apart))


if __name__ == "__main__":
    sys.exit(guard(main))
