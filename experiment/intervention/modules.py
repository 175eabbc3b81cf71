"""The model's own modules, changed for as long as a block lasts: the SAE's place, attention, layers left out."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SCORES_IN_CACHE = 2**19  # numbers: two megabytes in single precision

Replace = Callable[[Float[Tensor, "row pos *d_in"]], Float[Tensor, "row pos *d_in"]]


@contextlib.contextmanager
def hooked(model: Any, hook_name: str, replace: Replace) -> Iterator[PreTrainedModel]:
    """The Transformers model of a TransformerBridge, with `replace(residual)` in place of what passes at `hook_name`.

    TransformerLens' wrappers around every other module compute what nobody hooks here. They are set aside meanwhile:
    a forward pass of the demo is a tenth faster without them, and the same bit for bit.
    """
    # Here, for it takes seconds, and what is wrong with a data set should show before.
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    lm = model.original_model
    point = model.hook_dict[hook_name]
    wrapped = []
    for parent in lm.modules():
        if isinstance(parent, GeneralizedComponent):
            continue
        for name, child in parent.named_children():
            holds_point = any(point is part for part in child.children())
            if isinstance(child, GeneralizedComponent) and not holds_point:
                wrapped.append((parent, name, child))
    with model.hooks(fwd_hooks=[(hook_name, lambda residual, hook: replace(residual))]):
        try:
            for parent, name, child in wrapped:
                setattr(parent, name, child.original_component)
            yield lm
        finally:
            for parent, name, child in wrapped:
                setattr(parent, name, child)


@contextlib.contextmanager
def padding_that_sees() -> Iterator[None]:
    """Eager attention in which, in float16, a position that may see nothing sees everything, for as long as the block
    lasts.

    Padding on the left sees only padding. To the score of what is not to be seen Transformers adds the lowest number of
    the dtype, in float16 -65504, and from a score of -16 down the sum is -inf. A position at which all scores are -inf
    becomes NaN; in the next layer so do its keys and values, which every position of the row reads, if with weight 0.
    What padding sees instead makes no difference, for no other position sees it.
    """
    usual = ALL_MASK_ATTENTION_FUNCTIONS["eager"]

    def build_mask(**how: Any) -> Float[Tensor, "row 1 pos cached+pos"]:
        mask = usual(**how)  # 0 at what a position sees
        if mask.dtype != torch.float16:
            return mask  # of a larger range, where the sum stays finite
        sees_nothing = (mask < 0).all(-1, keepdim=True)
        return mask.masked_fill_(sees_nothing, 0)

    ALL_MASK_ATTENTION_FUNCTIONS["eager"] = build_mask
    try:
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS["eager"] = usual


@contextlib.contextmanager
def lean_attention() -> Iterator[None]:
    """Eager attention with less to write and read, for as long as the block lasts.

    Of a single position it repeats no keys and values. Where several heads share a head of these, Transformers copies
    them for each: in a step that is the whole cache. Here such heads are handed to the family's own function as so many
    positions of one head. Of many positions, a CPU does as many rows at a time as have their scores in its cache: the
    demo's masked rounds are a tenth faster.
    """
    before = ALL_ATTENTION_FUNCTIONS.get("eager", None)
    ALL_ATTENTION_FUNCTIONS["eager"] = _attend
    try:
        yield
    finally:
        if before is None:
            del ALL_ATTENTION_FUNCTIONS["eager"]
        else:
            ALL_ATTENTION_FUNCTIONS["eager"] = before


def _attend(
    module: Any,
    query: Float[Tensor, "row head pos d_head"],
    key: Float[Tensor, "row shared cached d_head"],
    value: Float[Tensor, "row shared cached d_head"],
    attention_mask: Float[Tensor, "row 1 pos cached"] | None,
    **how: Any,
) -> tuple[Float[Tensor, "row pos head d_head"], Any]:
    """`lean_attention` in a layer: its output, and the weights where the family's function gives them as they are."""
    attend = sys.modules[type(module).__module__].eager_attention_forward  # the family's own
    rows, heads, positions, d_head = query.shape
    groups = heads // key.shape[1]
    if positions > 1 or groups == 1 or hasattr(module, "sinks"):  # sinks: a number per head
        size = rows
        if query.device.type == "cpu":
            scores_per_row = heads * positions * key.shape[2]
            size = max(1, SCORES_IN_CACHE // scores_per_row)
        parts = []
        for first in range(0, rows, size):
            some = slice(first, first + size)
            mask = None if attention_mask is None else attention_mask[some]
            out, _ = attend(module, query[some], key[some], value[some], mask, **how)
            parts.append(out)
        return torch.cat(parts), None
    attributes = vars(module)  # setting it as an attribute takes a module longer than the attention of a short row
    attributes["num_key_value_groups"] = 1
    try:
        grouped = query.view(rows, heads // groups, groups, d_head)
        out, weights = attend(module, grouped, key, value, attention_mask, **how)
    finally:
        attributes["num_key_value_groups"] = groups
    out = out.transpose(1, 2)
    return out.reshape(rows, 1, heads, -1), weights


@contextlib.contextmanager
def layers_replaced(
    lm: PreTrainedModel,
    start: Float[Tensor, "row pos d_model"],
    boundary: int,
) -> Iterator[None]:
    """The layers under the boundary (one at least) do nothing for as long as the block lasts; the last of them hands on
    `start`."""
    layers = lm.get_decoder().layers
    saved = list(layers[:boundary])
    try:
        for number in range(boundary):
            layers[number] = _Passed()
        layers[boundary - 1] = _Passed(start)
        yield
    finally:
        for number, layer in enumerate(saved):
            layers[number] = layer


class _Passed(torch.nn.Module):
    """A layer that was run before: the last one of these hands on its result, the others whatever they get."""

    def __init__(self, result: Float[Tensor, "row pos d_model"] | None = None):
        super().__init__()
        self.result = result

    def forward(
        self,
        hidden: Float[Tensor, "row pos d_model"],
        *_: Any,
        **__: Any,
    ) -> Float[Tensor, "row pos d_model"]:
        return hidden if self.result is None else self.result


@contextlib.contextmanager
def last_layer_from(lm: PreTrainedModel, first: int) -> Iterator[None]:
    """The last layer hands on positions from `first` on alone, for as long as the block lasts. Of those before it makes
    keys and values and no more, for nothing else of them is read any more. Passes have a cache.
    """
    layers = lm.get_decoder().layers
    last = layers[-1]
    layers[-1] = _LastPositions(last, first)
    try:
        yield
    finally:
        layers[-1] = last


class _LastPositions(torch.nn.Module):
    """`last_layer_from` in place of the layer."""

    KNOWN = ("position_embeddings", "position_ids", "attention_mask", "past_key_values")

    def __init__(self, layer: torch.nn.Module, first: int):
        super().__init__()
        self.layer = layer
        self.first = first

    def forward(self, hidden: Float[Tensor, "row pos d_model"], *given: Any, **how: Any) -> Any:
        """[row, last, d_model]; of a family that runs its layers in another way what it gives at all positions."""
        is_known = not given and all(how.get(name) is not None for name in self.KNOWN)
        if not is_known:
            return self.layer(hidden, *given, **how)
        before = _take_positions(how, slice(self.first))
        before["past_key_values"] = _Store(how["past_key_values"])
        with contextlib.suppress(_Stored):
            self.layer(hidden[:, : self.first], **before)
        after = _take_positions(how, slice(self.first, None))
        return self.layer(hidden[:, self.first :], **after)


def _take_positions(how: dict[str, Any], some: slice) -> dict[str, Any]:
    """What a layer is given beside its input, at some of the positions."""
    cosines, sines = how["position_embeddings"]  # [row, pos, d_head]
    attention_mask = how["attention_mask"]  # [row, 1, pos, cached+pos]
    position_ids = how["position_ids"]  # [row, pos]
    return how | {
        "position_embeddings": (cosines[:, some], sines[:, some]),
        "position_ids": position_ids[:, some],
        "attention_mask": attention_mask[:, :, some],
    }


class _Store:
    """A cache that ends the layer once it has its keys and values, with a `_Stored`."""

    def __init__(self, cache: Any):
        self.cache = cache

    def update(self, *keys_and_values: Any, **how: Any) -> None:
        self.cache.update(*keys_and_values, **how)
        raise _Stored


class _Stored(Exception):
    """A layer's keys and values are in the cache."""


class Reached(Exception):
    """Carries what the first layer above the boundary reads, and ends the forward pass there."""

    def __init__(self, hidden: Float[Tensor, "row pos d_model"]):
        super().__init__()
        self.hidden = hidden


def stopped_at(layer: torch.nn.Module) -> contextlib.AbstractContextManager[Any]:
    """A forward pass ends in front of this layer, with a `Reached`, for as long as the block lasts."""

    def stop(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise Reached(args[0] if args else kwargs["hidden_states"])

    return layer.register_forward_pre_hook(stop, with_kwargs=True)


def keep(residual: Float[Tensor, "row pos *d_in"]) -> Float[Tensor, "row pos *d_in"]:
    """A Replace that changes nothing."""
    return residual
