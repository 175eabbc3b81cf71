"""Keys and values of a batch's rows: made, picked, handed on to the rows that go on from them."""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from experiment.intervention.layout import Level


def pick_positions(
    states: Float[Tensor, "row head pos d_head"],
    rows: Int[Tensor, "left"],
    columns: Int[Tensor, "left new"],
) -> Float[Tensor, "left head new d_head"]:
    """These rows' keys or values at these columns. rows, columns: on any device."""
    rows = rows.to(states.device)
    columns = columns.to(states.device)
    picked = states[rows.unsqueeze(1), :, columns]  # [left, new, head, d_head]
    return picked.transpose(1, 2)


def new_cache(lm: PreTrainedModel) -> DynamicCache:
    """An empty cache that keeps all keys of all layers of a Transformers model.

    Also of those with a sliding window, whose own kind forgets what is out of its reach: a row that leaves its proposal
    needs keys again that tokens behind the difference have pushed out. The attention mask keeps to the window.
    """
    cache = DynamicCache()
    cache.layers = [DynamicLayer() for _ in lm.get_decoder().layers]
    return cache


def layers_of(cache: DynamicCache) -> list[Any]:
    """The layers of a cache that new_cache made: each has keys and values [row, head, pos, d_head]."""
    return cache.layers


def go_on_from(level: Level, cache: DynamicCache) -> None:
    """Makes the cache of the level before one of this level's rows."""
    for layer in layers_of(cache):
        if layer.is_initialized:
            layer.batch_select_indices(level.parents.to(layer.keys.device))
