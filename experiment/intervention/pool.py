"""Rows that go on wait for one another, and are decoded together. Knows nothing of proposals.

A row goes on if its answer has not ended with the wide pass over its prompt and proposal (`generate`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate.utils.memory import release_memory
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from experiment.intervention.ablations import Mask
from experiment.intervention.caches import layers_of, new_cache, pick_positions
from experiment.intervention.forward import SplicedModel
from experiment.intervention.layout import Layout, close_gaps
from experiment.intervention.memory import halve_on_oom, is_out_of_memory, memory_errors, say_split
from experiment.intervention.rows import Row, pick_log_probs, pick_tokens
from experiment.intervention.sparse import SparseActivations
from experiment.intervention.steps import FixedLayer, Steps

IN_POOL = "answers that go on together"


@dataclass(frozen=True)
class Limits:
    """max_new_tokens: the longest answer.  pool_tokens: how many places the caches of waiting rows may have together.

    A row has as many places as the widest of them. Decoded, it has room for the rest of an answer besides.
    """

    max_new_tokens: int
    pool_tokens: int


@dataclass(frozen=True)
class Waiting:
    """Rows that go on, and their cache: those of one batch and mask, or what is left of rows decoded together.

    keys, values: of each layer.  attention: 1 at tokens and 0 at padding; rows are padded on the left and without gaps.
    """

    rows: list[Row]
    keys: list[Float[Tensor, "row head pos d_head"]]
    values: list[Float[Tensor, "row head pos d_head"]]
    attention: Int[Tensor, "row pos"]
    mask: Mask | None


class Pool:
    """Rows that go on wait here, over batches and masks, until enough of them are there to be decoded together.

    Where room is needed, they are decoded until half of them have ended. The others wait again, and go on with what
    comes: alone they would take as many steps, and each costs more per row the fewer rows there are. An H100 takes
    25 ms for 93 rows of gemma-2-9b-it's shape, and 40 for 221.

    on_ended: called with how many rows have ended since it was called last.  capacity: how many places may wait, as of
    Limits.  encoded: the rows of each step, and the latents at the one position that each row has in it; with
    keeps_encoded alone.
    """

    def __init__(
        self,
        model: SplicedModel,
        limits: Limits,
        on_ended: Callable[[int], None],
        keeps_encoded: bool = False,
    ):
        self.model = model
        self.limits = limits
        self.on_ended = on_ended
        self.capacity = limits.pool_tokens
        self.waiting: list[Waiting] = []
        self.keeps_encoded = keeps_encoded
        self.encoded: list[tuple[list[Row], SparseActivations]] = []

    def add(
        self,
        rows: list[Row],
        cache: DynamicCache,
        attention: Int[Tensor, "row pos"],
        mask: Mask | None,
    ) -> None:
        """Takes over those rows of a batch that have not ended, with their part of its cache, of which nothing is left.

        What waits already is decoded first where there would be too much of it.
        """
        going = self._find_going(rows)
        if going:
            # Before they are taken: their part of the cache is a copy, and what waits need not be there beside it.
            lengths = attention.sum(1)[going]
            width = int(lengths.max())
            while self.waiting and self._count_places(len(going), width) > self.capacity:
                self._decode_half()
            piece = take_rows(rows, going, cache, attention, mask)
            self.waiting.append(piece)
        self.on_ended(len(rows) - len(going))

    def _count_places(self, count: int, width: int) -> int:
        """How many places what waits would have beside so many rows of this width."""
        for piece in self.waiting:
            count += len(piece.rows)
            width = max(width, piece.attention.shape[1])
        return count * width

    def make_room(self) -> bool:
        """Decodes what waits, so that its memory is free. Returns whether there was anything."""
        if not self.waiting:
            return False
        self.decode()
        return True

    def decode(self) -> None:
        """Decodes all that waits to its end. Errors: as of `_decode_half`."""
        while self.waiting:
            self._decode_half()

    def _decode_half(self) -> None:
        """Decodes what waits until half of it has ended, and the rest waits again. Where memory runs out, all of it is
        decoded to its end, and the pool takes half as much from then on.

        Raises UserError where even one row does not fit into memory, or logits are not finite.
        """
        pieces = self.waiting
        self.waiting = []
        rows = [row for piece in pieces for row in piece.rows]
        mask = join_masks([piece.mask for piece in pieces])
        room = self._find_room(rows)
        try:
            left = self._decode_greedily(rows, begin_steps(self.model, pieces, mask, room))
            if left is not None:
                self.waiting.append(left)
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        pieces.clear()  # what the failed try has not taken of their caches: all is read again
        release_memory()
        self.capacity //= 2
        say_split(len(rows), IN_POOL)

        def go_on(numbers: list[int]) -> None:
            self._start_again(rows, mask, numbers)

        everyone = list(range(len(rows)))
        half = len(rows) // 2
        with memory_errors():  # not a batch's: to split that would leave these rows without an end
            for numbers in (everyone[:half], everyone[half:]):
                if numbers:
                    halve_on_oom(go_on, numbers, name=IN_POOL)

    def _start_again(self, rows: list[Row], mask: Mask | None, numbers: list[int]) -> None:
        """Decodes some of the rows to their end, whose caches are lost: what they have said so far stays."""
        some = [rows[number] for number in numbers]
        going = self._find_going(some)
        if not going:
            return
        left = [some[number] for number in going]
        if mask is not None:
            index = torch.tensor(numbers)
            mask = mask.take(index[going])
        piece: Waiting | None = self._read_again(left, mask)
        while piece is not None:
            room = self._find_room(piece.rows)
            piece = self._decode_greedily(piece.rows, begin_steps(self.model, [piece], piece.mask, room))

    def _read_again(self, rows: list[Row], mask: Mask | None) -> Waiting:
        """The rows with a cache again, from one pass over their prompts and what they have said."""
        sequences = [row.cached for row in rows]
        layout = Layout(sequences, self.model.pad_id, self.model.device)
        cache = new_cache(self.model.lm)
        self.model.forward(layout.ids, layout.attention, cache, mask)
        everyone = list(range(len(rows)))
        return take_rows(rows, everyone, cache, layout.attention, mask)

    def _find_room(self, rows: list[Row]) -> int:
        """How many steps it takes at most until all of these rows have ended."""
        shortest = min(len(row.tokens) for row in rows)
        return self.limits.max_new_tokens - shortest

    def _decode_greedily(self, rows: list[Row], steps: Steps) -> Waiting | None:
        """Greedy steps until half of the rows have ended. Returns the others; None where all have."""
        while True:
            going = self._find_going(rows)
            if not going:
                return None
            if 2 * len(going) <= len(rows):
                return take_rows(rows, going, steps.cache, steps.attention_so_far, steps.mask)
            last_tokens = [row.tokens[-1] for row in rows]
            logits = steps.run(last_tokens)
            tokens = pick_tokens(logits)
            log_probs = [0.0] * len(rows)  # enough for drafts, whose rows keep none of a step's
            if not all(row.is_draft for row in rows):
                chosen = torch.tensor(tokens, device=logits.device)
                log_probs = pick_log_probs(logits, chosen).tolist()
            if self.keeps_encoded:
                # Last of what memory may run out in: a row that starts again takes this step again.
                latents = steps.encode()
                self.encoded.append((rows, latents))
            self._append(rows, tokens, log_probs)

    def _append(self, rows: list[Row], tokens: list[int], log_probs: list[float]) -> None:
        """Each row's next token, but for those that have ended."""
        ended = 0
        for row, token, log_prob in zip(rows, tokens, log_probs):
            if self._has_ended(row):
                continue
            row.append(token, log_prob)
            if self._has_ended(row):
                ended += 1
        self.on_ended(ended)

    def _find_going(self, rows: list[Row]) -> list[int]:
        """The numbers of those rows that have not ended."""
        return [number for number, row in enumerate(rows) if not self._has_ended(row)]

    def _has_ended(self, row: Row) -> bool:
        return row.has_ended(self.model.end_ids, self.limits.max_new_tokens)


def take_rows(
    rows: list[Row],
    going: list[int],
    cache: DynamicCache,
    attention: Int[Tensor, "row pos"],
    mask: Mask | None,
) -> Waiting:
    """Those of some rows that go on, their caches without the places that no attention goes to.

    rows, cache, attention, mask: of rows that were run together.  attention: without room.  going: numbers of rows.
    Takes the cache's layers away one by one, so that what is not taken of one is free before the next one is copied.
    """
    index = torch.tensor(going, device=attention.device)
    columns, attention = close_gaps(attention[index])
    keys = []
    values = []
    layers = layers_of(cache)
    while layers:
        layer = layers.pop(0)
        keys.append(pick_positions(layer.keys, index, columns))
        values.append(pick_positions(layer.values, index, columns))
    if mask is not None:
        mask = mask.take(index)
    taken = [rows[number] for number in going]
    return Waiting(taken, keys, values, attention, mask)


def begin_steps(
    model: SplicedModel,
    pieces: list[Waiting],
    mask: Mask | None,
    room: int,
) -> Steps:
    """The steps of all rows that wait, in one cache with room for so many. mask: of all these rows.

    Takes the pieces' tensors away, layer by layer: the memory of one layer at a time is needed twice.
    """
    width = max(piece.attention.shape[1] for piece in pieces)
    cache = new_cache(model.lm)
    layers = layers_of(cache)
    for number in range(len(layers)):
        keys = [piece.keys.pop(0) for piece in pieces]
        values = [piece.values.pop(0) for piece in pieces]
        layers[number] = FixedLayer(keys, values, width, room)
    attention = [_pad_left(piece.attention, width) for piece in pieces]
    return Steps(model, cache, torch.cat(attention), mask)


def _pad_left(attention: Int[Tensor, "row pos"], width: int) -> Int[Tensor, "row width"]:
    """An attention with padding in front."""
    padding = width - attention.shape[1]
    return F.pad(attention, (padding, 0))


def join_masks(masks: list[Mask | None]) -> Mask | None:
    """The rows of several masks as one; None without any. masks: none of them is None, or all are."""
    there = [mask for mask in masks if mask is not None]
    return Mask.join(there) if there else None
