"""Works off a round's questions in batches: resumed, shared among processes, halved where memory runs out."""

import contextlib
import datetime
import os
import sys

from accelerate import PartialState
from accelerate.utils.memory import release_memory, should_reduce_batch_size
from tqdm import tqdm

from experiment import UserError, generation, say

FEW = 16  # one question in so many may keep a batch no longer: to begin its answer again later costs less


class Crew:
    """The processes that a launcher (torchrun, accelerate launch) started for one round; without one, this process.

    number: this one's, 0 for the one that speaks and writes the results.  size: how many there are.
    device: this one's own.
    """

    def __init__(self, device):
        self.number, self.size, self.device = 0, 1, device
        self.wait = self.end = lambda: None  # wait: until all of them have come as far; end: no more of that
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # One may wait for another for hours: the libraries give up after 10 minutes.
            state = PartialState(cpu=device == "cpu", timeout=datetime.timedelta(days=30))
            self.number, self.size = state.process_index, state.num_processes
            self.wait, self.end = state.wait_for_everyone, state.destroy_process_group
            if device == "cuda":
                self.device = f"cuda:{state.local_process_index}"
        self.is_first = self.number == 0

    @contextlib.contextmanager
    def heard(self):
        """A mistake that shows in one process alone is told by that one; all others by the first."""
        try:
            yield
        except UserError as error:
            if not self.is_first:
                print(f"process {self.number + 1} of {self.size}: {error}", file=sys.stderr, flush=True)
            raise

    def gather(self, journal):
        """Puts together what all processes have written; afterwards each knows it."""
        if self.size > 1:
            self.wait()
            if self.is_first:
                journal.absorb_parts()
            self.wait()
            if not self.is_first:
                journal.reload()


def work_off(crew, asked, lengths, journal, work, label, budget, contexts=None):
    """Answers every question that `journal` lacks.  work(batch, few): numbers in `asked` -> records, with None for the
    at most `few` answers that are unfinished when all others have ended.

    lengths: tokens of each.  budget, contexts: as in `generation.plan_batches`.
    The batches depend on the questions alone, and one with an unfinished question runs again whole: half-precision
    answers depend a little on the batch, so an interrupted run ends in the same bytes as an uninterrupted one.
    A batch lasts as long as its longest answer. So its last few are put off (the journal says which), and generated
    from the start, together, when all others are done.
    Several processes take the batches in turn; which one answers a batch changes nothing.
    """
    if len(journal):
        say(f"{len(journal)} of {len(asked)} questions are in {journal.path} already")
    if crew.size > 1:
        label += f", process 1 of {crew.size}"
    work = halved_when_memory_runs_out(work)
    plans = []
    with tqdm(desc=label, unit="question", smoothing=0.1, disable=not crew.is_first) as bar:
        for first in (True, False):
            left = [i for i, question_id in enumerate(asked.ids) if first or journal.put_off(question_id)]
            keys = contexts and [contexts[i] for i in left]
            plan = generation.plan_batches([lengths[i] for i in left], budget, keys)
            plan = [[left[i] for i in batch] for batch in plan]
            plans.append(plan)
            share = plan[crew.number :: crew.size]
            if first:
                bar.reset(total=sum(map(len, share)))
                bar.update(sum(asked.ids[i] in journal for batch in share for i in batch))
            mine = journal if crew.size == 1 else journal.part(crew.number)
            for batch in share:
                ids = [asked.ids[i] for i in batch]
                if all(i in journal or first and journal.put_off(i) for i in ids):
                    continue
                before = len(mine)
                with crew.heard():
                    found = work(batch, len(batch) // FEW if first else 0)
                    late = [question_id for question_id, record in zip(ids, found) if record is None]
                    mine.append([record for record in found if record], [late])
                bar.update(len(mine) - before)
            crew.gather(journal)
    if crew.is_first:
        journal.arrange(*([[asked.ids[i] for i in batch] for batch in plan] for plan in plans))
    crew.gather(journal)


def halved_when_memory_runs_out(work):
    """`work` in parts: after an out-of-memory error in halves, quarters ..., from then on. Says so each time."""
    largest = None

    def in_parts(batch, few):
        nonlocal largest
        while True:
            size = min(len(batch), largest or len(batch))
            try:
                return [r for start in range(0, len(batch), size) for r in work(batch[start : start + size], few)]
            except Exception as error:
                if size == 1 or not should_reduce_batch_size(error):
                    raise
            largest = size // 2
            release_memory()
            say(f"Out of memory with {size} questions in a batch: going on with {largest}; nothing is lost.")

    return in_parts
