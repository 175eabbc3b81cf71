"""Steps of rows that are decoded together: the next token of each, behind its cache. Knows nothing of answers.

On a GPU a step is bound by its host, which launches some 3,000 small kernels: gemma-2-9b-it's takes 60 ms, of which an
H100 works 16. So there a step is recorded once (a CUDA graph) and then replayed: the device does the same again, with
the same tensors, whatever they hold by then. For that nothing changes its shape or its place in memory from step to
step: the cache has room for all steps from the start, and notes on the device how much of it is filled.
"""

import contextlib
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import StaticLayer

from experiment import say
from experiment.intervention.ablations import Mask
from experiment.intervention.caches import layers_of
from experiment.intervention.forward import SplicedModel
from experiment.intervention.memory import is_out_of_memory
from experiment.intervention.sparse import SparseActivations, join

Step = Callable[[], Float[Tensor, "row vocab"]]  # the logits behind the tokens that lie ready


class FixedLayer(StaticLayer):
    """A layer's keys and values with room behind them: a step writes into it, and copies nothing that is there.

    keys, values: [row, head, pos, d_head], there from the start, other than a StaticLayer's.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, keys: list[Tensor], values: list[Tensor], width: int, room: int):
        """keys, values: [row, head, pos, d_head] of several pieces, each put at the right end of `width` positions.

        room: how many positions stay free behind them.
        """
        super().__init__(width + room)
        self.keys = _put_together(keys, width, room)
        self.values = _put_together(values, width, room)
        self.device = self.keys.device
        self.cumulative_length = torch.tensor(width, device=self.device)  # what is filled; a step adds 1 on the device
        self.is_initialized = True


def _put_together(
    pieces: list[Tensor],
    width: int,
    room: int,
) -> Float[Tensor, "row head width+room d_head"]:
    """The rows of pieces [row, head, pos, d_head] one after the other, 0 at padding and in the room."""
    rows = sum(map(len, pieces))
    _, heads, _, d_head = pieces[0].shape
    together = pieces[0].new_zeros(rows, heads, width + room, d_head)
    first = 0
    for piece in pieces:
        end = first + len(piece)
        padding = width - piece.shape[2]
        together[first:end, :, padding:width] = piece
        first = end
    return together


def record(step: Step) -> Step:
    """What a CUDA device does in a step, to be replayed: it reads and writes the same tensors again.

    To record is not to run: nothing is computed before the first replay. Raises RuntimeError where the step does what
    cannot be recorded, such as to wait for the device.
    """
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    pool = torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool):
            logits = step()
    except RuntimeError:
        # What failed stays open in PyTorch: on the recording's own stream, and no memory is given back from then on.
        torch.cuda.set_stream(stream)
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        raise

    def replay() -> Float[Tensor, "row vocab"]:
        graph.replay()
        return logits

    return replay


class Steps:
    """The steps of some rows.

    cache: of FixedLayers.  attention: [row, pos], 1 at tokens and 0 at padding, without the room.  mask: of the rows;
    None: nothing is masked.  ids, positions: [row, 1], the tokens that a step reads, and how many each has before it:
    tensors that every step reads again.  visible: [row, pos], attention and the room.  count: how many steps were run.
    """

    def __init__(
        self,
        model: SplicedModel,
        cache: DynamicCache,
        attention: Int[Tensor, "row pos"],
        mask: Mask | None,
    ):
        self.model = model
        self.cache = cache
        self.attention = attention
        self.mask = mask
        self.positions = attention.sum(1, keepdim=True)
        self.ids = torch.zeros_like(self.positions)
        width = layers_of(cache)[0].max_cache_len
        room = width - attention.shape[1]
        self.visible = _append_ones(attention, room)  # what is not filled yet, the cache itself keeps from sight
        self.count = 0
        self._encoded: list[SparseActivations] = []  # in the last step, where that was run as it is
        self._residual: Tensor | None = None  # [row, *d_in], what the SAE was given in it, where it was replayed
        self._replay: Step | None = None

    @property
    def attention_so_far(self) -> Int[Tensor, "row pos"]:
        """1 at the tokens that the cache holds by now, those of the steps included, and 0 at padding."""
        return _append_ones(self.attention, self.count)

    def run(self, tokens: list[int]) -> Float[Tensor, "row vocab"]:
        """The logits behind these tokens, one of each row. On a CUDA device they hold until the next step.

        Where memory runs out on the way, the cache may hold a part of the step: it is of no more use.
        """
        ids = torch.tensor(tokens)
        self.ids.copy_(ids.unsqueeze(1))
        # The first step is run as it is: it sets up what may not be set up under a recording, and where all rows end
        # with it none is needed.
        if self.count == 1 and self.model.can_record:
            self._try_to_record()
        self.count += 1
        if self._replay is not None:
            return self._replay()
        return self._step()

    def encode(self) -> SparseActivations:
        """The latents at the one position that each row had in the last step."""
        if self._replay is None:
            return join(self._encoded)
        assert self._residual is not None
        stands = self.model.where_sae_applies(self.ids, self.visible)
        residual = self._residual.clone()  # the next step writes over it
        return self.model.splice.encode(residual, stands.flatten())

    def _step(self) -> Float[Tensor, "row vocab"]:
        """A step as any other pass: active latents alone are decoded, and the host waits for how many they are."""
        self._encoded = []
        logits = self.model.forward(
            self.ids, self.visible, self.cache, self.mask, encoded=self._encoded, positions=self.positions
        )
        self.positions.add_(1)
        return logits

    def _step_whole(self) -> Float[Tensor, "row vocab"]:
        """A step in which the host waits for nothing, so that it can be recorded."""
        logits, self._residual = self.model.forward_whole(self.ids, self.visible, self.cache, self.mask, self.positions)
        self.positions.add_(1)
        return logits

    def _try_to_record(self) -> None:
        """Records a step; where that is not possible says so, and no further step of the model is recorded."""
        try:
            self._replay = record(self._step_whole)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self.model.can_record = False
            reason = str(error).partition("\n")[0]
            say(f"The steps of this model and SAE cannot be recorded ({reason}): they are run one by one, and slower.")


def _append_ones(attention: Int[Tensor, "row pos"], count: int) -> Int[Tensor, "row pos+count"]:
    """An attention with so many places more, which all rows see."""
    ones = attention.new_ones(len(attention), count)
    return torch.cat([attention, ones], 1)
