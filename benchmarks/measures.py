"""What is measured of a piece of work: seconds, memory, forward passes, and the CPU time of a step."""

import contextlib
import functools
import itertools
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import release_memory

from experiment.intervention.forward import SplicedModel

Result = TypeVar("Result")
PROCESS = Path("/proc/self")  # Linux alone has it


@dataclass
class Passes:
    """How many forward passes there were: wide ones, and steps, which run one token per row behind its cache."""

    wide: float = 0
    steps: float = 0


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
        sae = (self.sae - other.sae) / parts
        return Figures(seconds, Passes(wide, steps), sae, self.peak)


class Stopwatch:
    """Adds up the seconds of its calls, what they leave in a CUDA device's queue included."""

    def __init__(self, device: str):
        self.device = device
        self.seconds = 0.0

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        self._wait()
        start = time.perf_counter()
        result = function(*arguments)
        self._wait()
        self.seconds += time.perf_counter() - start
        return result

    def _wait(self) -> None:
        if on_cuda(self.device):
            torch.cuda.synchronize(self.device)


def measure(function: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds, and peak memory in GB, of a piece of work, the only one on the device."""
    reset_peak(device)
    watch = Stopwatch(device)
    watch.call(function)
    peak = peak_gb(device)
    release_memory()  # of a CUDA device, for the other process
    return watch.seconds, peak


def look_inside(function: Callable[[], object], device: str, model: SplicedModel) -> tuple[Passes, float]:
    """Forward passes, and seconds in the SAE, in a run by itself: waiting for the device at every step costs time.

    Steps are not recorded there: of what is replayed nothing can be counted.
    """
    watch = Stopwatch(device)
    splice = model.splice
    can_record = model.can_record
    model.can_record = False
    for name in ("encode", "reconstruct"):
        timed = functools.partial(watch.call, getattr(splice, name))
        setattr(splice, name, timed)
    with count_passes(model.lm) as passes:
        function()
    for name in ("encode", "reconstruct"):
        delattr(splice, name)
    model.can_record = can_record
    return passes, watch.seconds


@contextlib.contextmanager
def count_passes(lm: torch.nn.Module) -> Iterator[Passes]:
    """Of a Transformers model, for as long as the block lasts."""
    passes = Passes()

    def count(is_step: bool) -> None:
        if is_step:
            passes.steps += 1
        else:
            passes.wide += 1

    with _at_each_pass(lm, count):
        yield passes


def measure_step(lm: torch.nn.Module, generate: Callable[[], object]) -> float:
    """CPU seconds of a step: the median, from the beginning of one step's forward pass to that of the next one's.

    So what is done with a step's logits is in it, and wide passes are not. On the CPU alone: a host that waits for its
    device may count as busy.
    generate: answers of several tokens, in one batch, with a Transformers model.
    """
    starts: list[float] = []

    def note(is_step: bool) -> None:
        if is_step:
            starts.append(time.thread_time())

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that this thread, whose time is read, does all of it
    with _at_each_pass(lm, note):
        generate()
    torch.set_num_threads(threads)
    steps = [end - start for start, end in itertools.pairwise(starts)]
    return statistics.median(steps)


@contextlib.contextmanager
def _at_each_pass(lm: torch.nn.Module, note: Callable[[bool], None]) -> Iterator[None]:
    """Calls note(is_step) as each forward pass of a Transformers model begins."""

    def look(module: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        cache = named["past_key_values"]
        is_step = False
        if cache is not None and named["input_ids"].shape[1] == 1:
            is_step = bool(cache.get_seq_length() > 0)
        note(is_step)

    with lm.register_forward_pre_hook(look, with_kwargs=True):
        yield


def on_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def reset_peak(device: str) -> None:
    """From here on `peak_gb` counts."""
    if on_cuda(device):
        torch.cuda.reset_peak_memory_stats(device)
    elif PROCESS.exists():
        (PROCESS / "clear_refs").write_text("5")


def peak_gb(device: str) -> float:
    """Peak memory: of the tensors on a CUDA device, or of the whole process, which Linux alone tells."""
    if on_cuda(device):
        return torch.cuda.max_memory_allocated(device) / 1e9
    if not PROCESS.exists():
        return math.nan
    status = (PROCESS / "status").read_text()
    found = re.search(r"VmHWM:\s+([0-9]+)", status)
    assert found
    return int(found[1]) * 1024 / 1e9
