"""Rows that go on wait for one another, and are decoded together. Knows nothing of proposals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate.utils.memory import release_memory
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from experiment.intervention.ablations import Mask
from experiment.intervention.forward import SplicedModel, layers_of, new_cache, pick_positions
from experiment.intervention.layout import Layout, close_gaps
from experiment.intervention.memory import halve_on_oom, is_out_of_memory, memory_errors, say_split
from experiment.intervention.rows import Row, pick_log_probs, pick_tokens
from experiment.intervention.sparse import SparseActivations
from experiment.intervention.steps import FixedLayer, Steps

IN_POOL = "answers that go on together"


@dataclass(frozen=True)
class Limits:
    """max_new_tokens: the longest answer.  pool_tokens: how many tokens of caches may wait to be decoded together.

    A batch's rows wait as wide as the longest of them; decoded, they are as wide as the longest of all, and have room
    for an answer besides.
    """

    max_new_tokens: int
    pool_tokens: int


@dataclass(frozen=True)
class Waiting:
    """Rows of one batch and mask that go on. keys, values: of each layer, [row, head, pos, d_head]; attention: [row,
    pos], rows padded on the left and without gaps."""

    rows: list[Row]
    keys: list[Float[Tensor, "row head pos d_head"]]
    values: list[Float[Tensor, "row head pos d_head"]]
    attention: Int[Tensor, "row pos"]
    mask: Mask | None


class Pool:
    """Rows that go on wait here, over batches and masks, until enough of them are there to be decoded together.

    read: the rows of each step and what the SAE read in it; with keeps_read alone.
    """

    def __init__(self, model: SplicedModel, limits: Limits, on_ended: Callable[[int], None], keeps_read: bool = False):
        self.model = model
        self.limits = limits
        self.on_ended = on_ended
        self.capacity = limits.pool_tokens
        self.waiting: list[Waiting] = []
        self.keeps_read = keeps_read
        self.read: list[tuple[list[Row], SparseActivations]] = []

    def add(self, rows: list[Row], cache: DynamicCache, attention: Int[Tensor, "row pos"], mask: Mask | None) -> None:
        """Takes over those rows of a batch that have not ended, with their part of the batch's cache."""
        going = [number for number, row in enumerate(rows) if not self._has_ended(row)]
        if going:
            piece = take_rows(rows, going, cache, attention, mask)
            tokens = sum(one.attention.numel() for one in self.waiting)
            if tokens + piece.attention.numel() > self.capacity:
                self.decode()
            self.waiting.append(piece)
        self.on_ended(len(rows) - len(going))

    def make_room(self) -> bool:
        """Decodes what waits, so that its memory is free. Whether there was anything."""
        if not self.waiting:
            return False
        self.decode()
        return True

    def decode(self) -> None:
        """Decodes all that waits to its end. Where memory runs out, the pool takes half as much from then on."""
        pieces = self.waiting
        self.waiting = []
        if not pieces:
            return
        rows = [row for piece in pieces for row in piece.rows]
        mask = join_masks([piece.mask for piece in pieces])
        try:
            cache, attention = join_caches(self.model, pieces, self.limits.max_new_tokens)
            self._decode_greedily(rows, Steps(self.model, cache, attention, mask))
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        pieces.clear()
        release_memory()
        self.capacity //= 2
        say_split(len(rows), IN_POOL)

        def go_on(numbers: Sequence[int]) -> None:
            self._start_again(rows, mask, numbers)

        half = len(rows) // 2
        with memory_errors():  # not a batch's: to split that would leave these rows without an end
            for numbers in (range(half), range(half, len(rows))):
                if numbers:
                    halve_on_oom(go_on, list(numbers), name=IN_POOL)

    def _start_again(self, rows: list[Row], mask: Mask | None, numbers: Sequence[int]) -> None:
        """Goes on with some of the rows, whose caches are lost: what they have said so far stays."""
        going = [number for number in numbers if not self._has_ended(rows[number])]
        if not going:
            return
        some = [rows[number] for number in going]
        index = torch.tensor(going)
        mask_of_some = mask and mask.take(index)
        sequences = [row.prompt + row.tokens[:-1] for row in some]
        layout = Layout(sequences, self.model.pad_id, self.model.device)
        cache = new_cache(self.model.lm)
        self.model.forward(layout.ids, layout.attention, cache, mask_of_some)
        pieces = [take_rows(some, list(range(len(some))), cache, layout.attention, mask_of_some)]
        cache, attention = join_caches(self.model, pieces, self.limits.max_new_tokens)
        self._decode_greedily(some, Steps(self.model, cache, attention, mask_of_some))

    def _decode_greedily(self, rows: list[Row], steps: Steps) -> None:
        """Greedy steps until all rows have ended. Those that have ended leave once they are half of what is there."""
        while True:
            places = [place for place, row in enumerate(rows) if not self._has_ended(row)]
            if not places:
                return
            if 2 * len(places) <= len(rows):
                steps = steps.leave(torch.tensor(places))
                rows = [rows[place] for place in places]
            logits = steps.run([row.tokens[-1] for row in rows])
            chosen = pick_tokens(logits)
            log_probs = [0.0] * len(rows)
            if not all(row.is_draft for row in rows):
                log_probs = pick_log_probs(logits, torch.tensor(chosen, device=logits.device)).tolist()
            if self.keeps_read:
                self.read.append((list(rows), steps.read()))
            going = [not self._has_ended(row) for row in rows]
            for row, goes_on, token, log_prob in zip(rows, going, chosen, log_probs):
                if goes_on:
                    row.append(token, log_prob)
            self.on_ended(sum(goes_on and self._has_ended(row) for row, goes_on in zip(rows, going)))

    def _has_ended(self, row: Row) -> bool:
        return row.has_ended(self.model.end_ids, self.limits.max_new_tokens)


def take_rows(
    rows: list[Row], going: list[int], cache: DynamicCache, attention: Int[Tensor, "row pos"], mask: Mask | None
) -> Waiting:
    """These rows of a batch, their caches without the places that no attention goes to."""
    index = torch.tensor(going, device=attention.device)
    columns, attention = close_gaps(attention[index])
    keys = []
    values = []
    for layer in layers_of(cache):
        keys.append(pick_positions(layer.keys, index, columns))
        values.append(pick_positions(layer.values, index, columns))
    taken = mask and mask.take(index)
    return Waiting([rows[number] for number in going], keys, values, attention, taken)


def join_caches(model: SplicedModel, pieces: list[Waiting], room: int) -> tuple[DynamicCache, Int[Tensor, "row pos"]]:
    """One cache of all that waits, with room for so many steps, and its attention.

    Takes the pieces' tensors away, layer by layer.
    """
    width = max(piece.attention.shape[1] for piece in pieces)
    cache = new_cache(model.lm)
    for number in range(len(cache.layers)):
        keys = [piece.keys.pop(0) for piece in pieces]
        values = [piece.values.pop(0) for piece in pieces]
        cache.layers[number] = FixedLayer(keys, values, width, room)
    attention = []
    for piece in pieces:
        padding = width - piece.attention.shape[1]
        attention.append(torch.nn.functional.pad(piece.attention, (padding, 0)))
    return cache, torch.cat(attention)


def join_masks(masks: list[Mask | None]) -> Mask | None:
    """The rows of several masks as one."""
    there = [mask for mask in masks if mask is not None]  # all of them or none
    return Mask.join(there) if there else None
