"""Batched greedy answers with the SAE spliced in. Knows nothing of files, options or SQuAD.

One loop makes every answer: propose, run, keep.

Propose: in round 1 the opening, tokens with which most answers begin; in rounds 2 and 3 the draft, which is an
    unmasked answer. What a wide pass reads behind a prompt is the row's proposal, whichever of the two it is.
Run: one wide pass over each prompt and its proposal, a batch of rows at a time; before it, one over what all prompts
    begin with, or those of each context, where that saves more than a pass costs. Below the SAE nothing depends on a
    mask: those layers run once per batch, those above once per mask.
Keep: what the model itself says, up to and including its first token that differs from the proposal.

Rows that have not ended then wait in a pool, over batches and masks, each with its own mask and cache: on a GPU a step
of many rows takes little longer than one of a few. Once the pool is full, or the group of batches ends, its rows are
decoded together: a step reads the last token of each row, with nothing proposed behind it, and keeps one more.
"""

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from experiment import own_mistakes
from experiment.intervention.ablations import Ablation, Mask
from experiment.intervention.caches import go_on_from, new_cache
from experiment.intervention.forward import Outputs, SplicedModel
from experiment.intervention.layout import PASS_ON_CPU, PASS_ON_GPU, Layout, Prefixes, choose_shared
from experiment.intervention.memory import halve_on_oom
from experiment.intervention.pool import Limits, Pool
from experiment.intervention.rows import NO_TOKEN, Answer, Row, cut_at_end, pick_log_probs, pick_tokens
from experiment.intervention.sequences import ReadInPass, SequenceActivations
from experiment.intervention.sparse import SparseActivations, join

Item = TypeVar("Item")


@dataclass(frozen=True)
class Group:
    """Questions whose answers are made together: lists with an item per question.

    prompts: token ids.  contexts: what names each one's context; prompts on one context share what they begin with.
    batches: numbers of questions, those that are run at once.  drafts: token ids of unmasked answers, possibly none;
    for masked answers alone.  masks: what each one ablates of each question.
    """

    prompts: list[list[int]]
    contexts: list[Hashable]
    batches: list[list[int]]
    drafts: list[list[int]] = field(default_factory=list)
    masks: list[Ablation] = field(default_factory=list)


@own_mistakes()
@torch.no_grad()
def answer(
    model: SplicedModel,
    group: Group,
    limits: Limits,
    opening: Sequence[int] = (),
    on_ended: Callable[[int], None] = lambda count: None,
) -> tuple[list[Answer], SequenceActivations]:
    """Greedy answers with nothing masked, one per question, and what the SAE read in prompts and answers.

    opening: where the model says the same, its tokens take no step each.
    on_ended: called with how many answers have ended since it was called last.
    Raises UserError where a single question does not fit into memory, or logits are not finite.
    """
    proposal = [*opening[: limits.max_new_tokens - 1], NO_TOKEN]
    rows = [Row(prompt, proposal) for prompt in group.prompts]
    pool = Pool(model, limits, on_ended, keeps_encoded=True)
    parts: list[ReadInPass] = []

    def run(batch: list[int]) -> None:
        some = [rows[number] for number in batch]
        contexts = [group.contexts[number] for number in batch]
        part = _run_unmasked(model, some, batch, contexts, pool)
        parts.append(part)

    with model.ready():
        for batch in group.batches:
            halve_on_oom(run, batch, pool.make_room)
        pool.decode()
    numbers = {id(row): number for number, row in enumerate(rows)}  # by id: a Row has no hash
    for step_rows, latents in pool.encoded:
        of_step = [numbers[id(row)] for row in step_rows]
        parts.append(ReadInPass.of_step(of_step, latents))
    lengths = [len(row.cached) for row in rows]
    read = SequenceActivations.collect(parts, lengths)
    return [row.answer() for row in rows], read


@own_mistakes()
@torch.no_grad()
def answer_masked(
    model: SplicedModel,
    group: Group,
    limits: Limits,
    means: Float[Tensor, "d_sae"] | None = None,
    on_ended: Callable[[int], None] = lambda count: None,
) -> list[list[Answer]]:
    """Greedy answers under each mask of the group: [mask][question].

    Where a question has a draft, the answer's log probabilities are of the draft's tokens under the mask.
    means: what masked latents are set to; None: zero.  on_ended, errors: as of `answer`.
    """
    pool = Pool(model, limits, on_ended)
    rows_of: list[dict[int, Row]] = [{} for _ in group.masks]  # of each mask, by question

    def run(batch: list[int]) -> None:
        # All masks; where memory ran out and this is a half, or the same batch again, those that are not through yet.
        left = []
        for number, rows in enumerate(rows_of):
            if batch[0] not in rows:
                left.append(number)
        for number, of_batch in _run_masked(model, group, batch, left, means, pool):
            rows_of[number].update(zip(batch, of_batch))

    with model.ready():
        for batch in group.batches:
            halve_on_oom(run, batch, pool.make_room)
        pool.decode()
    questions = range(len(group.prompts))
    answers = []
    for rows in rows_of:
        in_order = [rows[question].answer() for question in questions]
        answers.append(in_order)
    return answers


# ---------------------------------------------------------------------------------------------------------------------
# The wide pass


def _run_unmasked(
    model: SplicedModel,
    rows: list[Row],
    numbers: list[int],
    contexts: list[Hashable],
    pool: Pool,
) -> ReadInPass:
    """A batch's prompts and what is proposed behind them, with nothing masked. Returns what the SAE read.

    numbers: the rows' in the group.
    """
    layout = build_layout(model, rows, contexts)
    *prefixes, rests = layout.levels
    cache = new_cache(model.lm)
    encoded: list[SparseActivations] = []
    for level in prefixes:
        go_on_from(level, cache)
        model.forward(level.ids, level.attention, cache, encoded=encoded)
    go_on_from(rests, cache)
    outputs = find_outputs(rows)
    logits = model.forward(rests.ids, rests.attention, cache, outputs=outputs, encoded=encoded)
    latents = join(encoded)
    attention = keep_agreed(rows, logits, layout.attention, cache, None, pool)
    return ReadInPass.of_batch(numbers, layout.places, attention, latents)


def _run_masked(
    model: SplicedModel,
    group: Group,
    batch: list[int],
    masks: list[int],
    means: Float[Tensor, "d_sae"] | None,
    pool: Pool,
) -> Iterator[tuple[int, list[Row]]]:
    """Yields the number of each of these masks and the batch's rows under it. Below the SAE the batch is run once."""
    rows = []
    contexts = []
    for number in batch:
        draft = cut_at_end(group.drafts[number], model.end_ids)
        proposal = draft or [NO_TOKEN]
        rows.append(Row(group.prompts[number], proposal))
        contexts.append(group.contexts[number])
    shares_beginnings = model.boundary is not None
    layout = build_layout(model, rows, contexts if shares_beginnings else None)
    outputs = find_outputs(rows)
    below = model.forward_below(layout)
    for number in masks:
        ablation = group.masks[number].take(batch)
        mask = model.splice.mask(ablation, means)
        logits, cache = model.forward_above(below, mask, outputs)
        of_mask = [Row(row.prompt, row.proposal) for row in rows]
        keep_agreed(of_mask, logits, below.attention, cache, mask, pool)
        del logits, cache
        yield number, of_mask


def build_layout(model: SplicedModel, rows: list[Row], contexts: list[Hashable] | None) -> Layout:
    """Where the rows' sequences stand in a batch.

    contexts: as of a Group; None: nothing is shared.
    """
    sequences = [row.sequence for row in rows]
    prefixes: list[Prefixes] = []
    if contexts is not None:
        limits = [len(row.prompt) - 1 for row in rows]  # a token at least is left to go on from
        pass_cost = PASS_ON_GPU
        if model.device.type == "cpu":
            pass_cost = PASS_ON_CPU
        prefixes = choose_shared(sequences, limits, contexts, model.window, pass_cost)
    return Layout(sequences, model.pad_id, model.device, prefixes)


def find_outputs(rows: list[Row]) -> Outputs:
    """Row and column, counted from the end, of each position that says a place of a proposal, row by row.

    On the CPU: from there they index what is on any device. With --device-map auto the last layer may be on another one
    than the first.
    """
    numbers: list[int] = []
    columns: list[int] = []
    for number, row in enumerate(rows):
        length = len(row.proposal)
        numbers += [number] * length
        columns += range(-length, 0)
    return torch.tensor(numbers), torch.tensor(columns)


def keep_agreed(
    rows: list[Row],
    logits: Float[Tensor, "output vocab"],
    attention: Int[Tensor, "row pos"],
    cache: DynamicCache,
    mask: Mask | None,
    pool: Pool,
) -> Int[Tensor, "row pos"]:
    """Keeps of each row's proposal what the model says itself; rows that have not ended go to the pool.

    logits: at `find_outputs`, the rows' one after the other.
    Returns the attention without what proposals have behind their first difference.
    """
    lengths = [len(row.proposal) for row in rows]
    said = split_list(pick_tokens(logits), lengths)
    targets: list[int] = []
    for row, of_row in zip(rows, said):
        targets += row.targets(of_row)
    target_ids = torch.tensor(targets, device=logits.device)
    log_probs = split_list(pick_log_probs(logits, target_ids).tolist(), lengths)
    width = attention.shape[1]
    ends = []  # of what is kept: [row], a column
    for row, of_row, log_probs_of_row in zip(rows, said, log_probs):
        row.keep(of_row, log_probs_of_row)
        ends.append(width - len(row.proposal) + len(row.tokens))
    columns = torch.arange(width, device=attention.device)
    ends_of_rows = torch.tensor(ends, device=attention.device)
    is_kept = columns < ends_of_rows.unsqueeze(1)
    attention = attention * is_kept
    pool.add(rows, cache, attention, mask)
    return attention


def split_list(values: list[Item], lengths: list[int]) -> list[list[Item]]:
    """A list in parts of these lengths, one after the other."""
    left = iter(values)
    return [list(itertools.islice(left, length)) for length in lengths]
