"""Steps of rows that are decoded together: the next token of each, behind its cache. Knows nothing of answers.

On a GPU a step is bound by its host, which launches some 3,000 small kernels: gemma-2-9b-it's takes 60 ms, of which an
H100 works 16. So there a step is recorded once (a CUDA graph) and then replayed. For that shapes stay as they are: the
cache has room for all steps from the start, and the mask keeps them from what is not there yet.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import StaticLayer

from experiment import say
from experiment.intervention.ablations import Mask
from experiment.intervention.forward import SplicedModel, layers_of
from experiment.intervention.memory import is_out_of_memory
from experiment.intervention.sparse import SparseActivations, join

Pass = Callable[[], Float[Tensor, "row vocab"]]


class FixedLayer(StaticLayer):
    """A layer's keys and values with room behind them: a step writes into it, and copies nothing that is there."""

    keys: Tensor  # there from the start, other than those of a StaticLayer
    values: Tensor

    def __init__(self, keys: list[Tensor], values: list[Tensor], width: int, room: int):
        """keys, values: [row, head, pos, d_head] of several pieces, each put at the right end of `width` positions."""
        super().__init__(width + room)
        self.keys = _put_together(keys, width, room)
        self.values = _put_together(values, width, room)
        self.device = self.keys.device
        self.cumulative_length = torch.tensor(width, device=self.device)
        self.is_initialized = True

    def batch_select_indices(self, indices: Int[Tensor, "left"]) -> None:
        self.keys = self.keys[indices]
        self.values = self.values[indices]


def _put_together(pieces: list[Tensor], width: int, room: int) -> Float[Tensor, "row head width+room d_head"]:
    rows = sum(len(piece) for piece in pieces)
    _, heads, _, d_head = pieces[0].shape
    together = pieces[0].new_zeros(rows, heads, width + room, d_head)
    first = 0
    for piece in pieces:
        together[first : first + len(piece), :, width - piece.shape[2] : width] = piece
        first += len(piece)
    return together


def record(step: Pass) -> Pass:
    """What a CUDA device does in a step, to be replayed: it reads and writes the same tensors again."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()

    def replay() -> Float[Tensor, "row vocab"]:
        graph.replay()
        return logits

    return replay


class Steps:
    """The steps of some rows, until some of them leave.

    cache: of FixedLayers.  attention: [row, pos], without the room.
    """

    def __init__(self, model: SplicedModel, cache: DynamicCache, attention: Int[Tensor, "row pos"], mask: Mask | None):
        self.model = model
        self.cache = cache
        self.attention = attention
        self.mask = mask
        self.positions = attention.sum(1, keepdim=True)
        self.ids = torch.zeros_like(self.positions)
        width = layers_of(cache)[0].max_cache_len
        room = attention.new_ones(len(attention), width - attention.shape[1])
        self.visible = torch.cat([attention, room], 1)  # what is not there yet, the cache's length keeps from sight
        self.count = 0
        self._read: list[SparseActivations] = []  # of the last step, if that was run as it is
        self._residual: Tensor | None = None  # [row, *d_in]; and if it was replayed
        self._replay: Pass | None = None

    def run(self, tokens: list[int]) -> Float[Tensor, "row vocab"]:
        """The logits behind these tokens, one of each row. On a CUDA device they hold until the next step."""
        self.ids.copy_(torch.tensor(tokens).unsqueeze(1))
        # The first step is run as it is: it readies what a recording must not, and some rows need no second one.
        if self.count == 1 and self.model.can_record:
            self._try_to_record()
        self.count += 1
        if self._replay is not None:
            return self._replay()
        return self._step()

    def read(self) -> SparseActivations:
        """What the SAE read in the last step, row by row."""
        if self._replay is None:
            return join(self._read)
        assert self._residual is not None
        stands = self.model.where_sae_applies(self.ids, self.visible)
        return self.model.splice.encode(self._residual.clone(), stands.flatten())

    def leave(self, rows: Int[Tensor, "left"]) -> "Steps":
        """Those of these rows alone."""
        for layer in layers_of(self.cache):
            layer.batch_select_indices(rows.to(layer.keys.device))
        attention = torch.cat([self.attention, self.attention.new_ones(len(self.attention), self.count)], 1)
        mask = self.mask and self.mask.take(rows)
        return Steps(self.model, self.cache, attention[rows.to(attention.device)], mask)

    def _step(self) -> Float[Tensor, "row vocab"]:
        self._read = []
        logits = self.model.forward(
            self.ids, self.visible, self.cache, self.mask, read=self._read, positions=self.positions
        )
        self.positions.add_(1)
        return logits

    def _step_whole(self) -> Float[Tensor, "row vocab"]:
        """The same in what may be recorded."""
        logits, self._residual = self.model.forward_whole(self.ids, self.visible, self.cache, self.mask, self.positions)
        self.positions.add_(1)
        return logits

    def _try_to_record(self) -> None:
        try:
            self._replay = record(self._step_whole)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self.model.can_record = False
            reason = str(error).partition("\n")[0]
            say(f"The steps of this model and SAE cannot be recorded ({reason}): they are run one by one, and slower.")
