"""Rows that go on wait for one another, and are decoded together. Knows nothing of proposals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import release_memory
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from experiment.intervention.ablations import Mask
from experiment.intervention.forward import SplicedModel, layers_of, new_cache, pick_positions
from experiment.intervention.layout import Layout, close_gaps
from experiment.intervention.memory import halve_on_oom, is_out_of_memory, memory_errors, say_split
from experiment.intervention.rows import Row, pick_log_probs, pick_tokens
from experiment.intervention.sparse import SparseActivations, join

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
            self._decode_greedily(rows, mask, *join_caches(self.model, pieces, self.limits.max_new_tokens))
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
        self._decode_greedily(some, mask_of_some, cache, layout.attention)

    def _decode_greedily(
        self, rows: list[Row], mask: Mask | None, cache: DynamicCache, attention: Int[Tensor, "row pos"]
    ) -> None:
        """Greedy steps until all rows have ended. Those that have ended leave once they are half of what is there."""
        model = self.model
        while True:
            places = [place for place, row in enumerate(rows) if not self._has_ended(row)]
            if not places:
                return
            if 2 * len(places) <= len(rows):
                index = torch.tensor(places, device=attention.device)
                for layer in layers_of(cache):
                    layer.batch_select_indices(index.to(layer.keys.device))
                attention = attention[index]
                mask = mask and mask.take(index)
                rows = [rows[place] for place in places]
            ids = torch.tensor([row.tokens[-1:] for row in rows], device=attention.device)
            attention = torch.cat([attention, torch.ones_like(attention[:, :1])], 1)
            activations: list[SparseActivations] | None = [] if self.keeps_read else None
            logits = model.forward(ids, attention, cache, mask, read=activations)
            chosen = pick_tokens(logits)
            log_probs = [0.0] * len(rows)
            if not all(row.is_draft for row in rows):
                log_probs = pick_log_probs(logits, torch.tensor(chosen, device=logits.device)).tolist()
            going = [not self._has_ended(row) for row in rows]
            if activations is not None:
                self.read.append((list(rows), join(activations)))
            for row, goes_on, token, log_prob in zip(rows, going, chosen, log_probs):
                if goes_on:
                    row.append(token, log_prob)
            self.on_ended(sum(goes_on and self._has_ended(row) for row, goes_on in zip(rows, going)))

    def _has_ended(self, row: Row) -> bool:
        return row.has_ended(self.model.end_ids, self.limits.max_new_tokens)


class RoomyLayer(DynamicLayer):
    """A layer's keys and values with room behind them: a step writes into it, and copies nothing that is there."""

    keys: Tensor  # there from the start, other than those of a DynamicLayer
    values: Tensor

    def __init__(self, keys: list[Tensor], values: list[Tensor], width: int, room: int):
        """keys, values: [row, head, pos, d_head] of several pieces, each put at the right end of `width` positions."""
        super().__init__()
        self.lazy_initialization(keys[0], values[0])
        self._keys = _put_together(keys, width, room)
        self._values = _put_together(values, width, room)
        self._show(width)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        first = self.length
        new = key_states.shape[-2]
        self._keys.narrow(2, first, new).copy_(key_states)
        self._values.narrow(2, first, new).copy_(value_states)
        self._show(first + new)
        return self.keys, self.values

    def batch_select_indices(self, indices: Int[Tensor, "left"]) -> None:
        self._keys = self._keys[indices]
        self._values = self._values[indices]
        self._show(self.length)

    def _show(self, length: int) -> None:
        self.length = length
        self.keys = self._keys.narrow(2, 0, length)
        self.values = self._values.narrow(2, 0, length)


def _put_together(pieces: list[Tensor], width: int, room: int) -> Float[Tensor, "row head width+room d_head"]:
    rows = sum(len(piece) for piece in pieces)
    _, heads, _, d_head = pieces[0].shape
    together = pieces[0].new_zeros(rows, heads, width + room, d_head)
    first = 0
    for piece in pieces:
        together[first : first + len(piece), :, width - piece.shape[2] : width] = piece
        first += len(piece)
    return together


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
        cache.layers[number] = RoomyLayer(keys, values, width, room)
    attention = []
    for piece in pieces:
        padding = width - piece.attention.shape[1]
        attention.append(torch.nn.functional.pad(piece.attention, (padding, 0)))
    return cache, torch.cat(attention)


def join_masks(masks: list[Mask | None]) -> Mask | None:
    """The rows of several masks as one."""
    there = [mask for mask in masks if mask is not None]  # all of them or none
    return Mask.join(there) if there else None
