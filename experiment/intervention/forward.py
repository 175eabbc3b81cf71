"""Forward passes of a model with an SAE in it: whole, below the SAE, above it. Knows nothing of answers or files."""

import contextlib
import copy
import dataclasses
import os
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from experiment.intervention.splice import Mask, SparseActivations, Splice, join

Outputs = tuple[Int[Tensor, "output"], Int[Tensor, "output"]]  # rows and columns of the logits that are wanted
Replace = Callable[[Float[Tensor, "row pos *d_in"]], Float[Tensor, "row pos *d_in"]]


# ---------------------------------------------------------------------------------------------------------------------
# Batches of sequences


def pad(
    sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device | str, side: Literal["left", "right"]
) -> tuple[Int[Tensor, "row pos"], Int[Tensor, "row pos"]]:
    """Token ids and attention mask, 1 at tokens and 0 at padding, which stands on one side of every row."""
    length = max(map(len, sequences))
    ids = torch.full((len(sequences), length), pad_id)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        first = length - len(sequence) if side == "left" else 0
        ids[row, first : first + len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, first : first + len(sequence)] = 1
    return ids.to(device), mask.to(device)


def find_shared(
    sequences: list[list[int]], limits: list[int], contexts: Sequence[Hashable]
) -> tuple[list[list[int]], list[int]]:
    """What the sequences of each context begin with: a list of prefixes, and for each sequence the index of its own.

    limits: how much of each sequence may be in a prefix, at least 1 less than its length. Prefixes are cut so that
    about as much is left of all sequences: padding costs what it costs in a batch without prefixes.
    """
    groups: dict[Hashable, list[int]] = {}
    for row, (key, sequence) in enumerate(zip(contexts, sequences)):
        groups.setdefault((key, sequence[0]), []).append(row)  # those that begin alike, so that no prefix is empty
    shared = []
    longest_rests = []
    for rows in groups.values():
        of_group = [sequences[row] for row in rows]
        length = min(len(os.path.commonprefix(of_group)), *(limits[row] for row in rows))
        shared.append(length)
        if len(rows) > 1:
            longest_rests.append(max(map(len, of_group)) - length)
    left = max(longest_rests, default=max(map(len, sequences)))
    prefixes = []
    owners = [0] * len(sequences)
    for number, (rows, length) in enumerate(zip(groups.values(), shared)):
        longest = max((sequences[row] for row in rows), key=len)
        prefixes.append(longest[: max(1, min(length, len(longest) - left))])
        for row in rows:
            owners[row] = number
    return prefixes, owners


class Layout:
    """A batch of sequences on the device, in two parts: shared prefixes, and the rest of each sequence.

    Prefixes are padded on the right, where padding has a token to look back at. Rests are padded on the left: every
    row's next token stands at the same place.

    prefix_ids, prefix_mask: [context, prefix]; rest_ids: [row, rest]; owners: [row], each one's prefix. Without
    prefixes that part is 0 positions wide.
    ids, attention, places: [row, prefix + rest]; places says where each position stands among all the prefixes' and
    then all the rests' positions, which is the order in which they are run.
    """

    def __init__(
        self,
        sequences: list[list[int]],
        pad_id: int,
        device: torch.device | str,
        prefixes: Sequence[Sequence[int]] = ((),),
        owners: list[int] | None = None,
    ):
        owners = [0] * len(sequences) if owners is None else owners
        rests = [sequence[len(prefixes[owner]) :] for owner, sequence in zip(owners, sequences)]
        self.prefix_ids, self.prefix_mask = pad(prefixes, pad_id, device, "right")
        self.rest_ids, self.rest_mask = pad(rests, pad_id, device, "left")
        self.owners = torch.tensor(owners, device=device)
        self.ids = torch.cat([self.prefix_ids[self.owners], self.rest_ids], 1)
        self.attention = torch.cat([self.prefix_mask[self.owners], self.rest_mask], 1)
        of_prefixes = torch.arange(self.prefix_ids.numel(), device=device).view_as(self.prefix_ids)
        of_rests = torch.arange(self.rest_ids.numel(), device=device).view_as(self.rest_ids)
        self.places = torch.cat([of_prefixes[self.owners], of_rests + self.prefix_ids.numel()], 1)

    def parts(self) -> list[tuple[Int[Tensor, "row pos"], Int[Tensor, "row pos"]]]:
        """Ids and mask of the prefixes, where there are any, and of the rests."""
        of_rests = [(self.rest_ids, self.rest_mask)]
        if not self.prefix_ids.shape[1]:
            return of_rests
        return [(self.prefix_ids, self.prefix_mask), *of_rests]


@dataclass(frozen=True)
class Below:
    """What a batch's masks share: its rows without gaps, and what came out of the layers below the SAE.

    ids, attention: padded on the left.  cache: with the keys and values of the layers below.  latents: of all
    positions, row by row, where the SAE stands between two layers.  start: what the first layer above reads otherwise;
    None where all layers run again.
    """

    ids: Int[Tensor, "row pos"]
    attention: Int[Tensor, "row pos"]
    cache: DynamicCache
    latents: SparseActivations | None = None
    start: Float[Tensor, "row pos d_model"] | None = None


def close_gaps(attention: Int[Tensor, "row pos"]) -> tuple[Int[Tensor, "row left"], Int[Tensor, "row left"]]:
    """The columns of each row's tokens, in their order at the right end of as many columns as the longest row has.

    Returns them, some column of padding in front, and the attention mask of what they pick.
    """
    lengths = attention.sum(1)
    width = int(lengths.max())
    columns = attention.argsort(dim=1, stable=True)[:, -width:]  # first the zeros, then the ones, each in their order
    places = torch.arange(width, device=attention.device)
    return columns, (places >= (width - lengths).unsqueeze(1)).long()


def pick_positions(
    states: Float[Tensor, "row head pos d_head"], rows: Int[Tensor, "left"], columns: Int[Tensor, "left new"]
) -> Float[Tensor, "left head new d_head"]:
    """These rows' keys or values at these columns."""
    rows = rows.to(states.device).unsqueeze(1)
    return states[rows, :, columns.to(states.device)].transpose(1, 2)


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


# ---------------------------------------------------------------------------------------------------------------------
# The model's own modules, for as long as a block lasts


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
    """Eager attention in which a position that may see nothing sees everything, for as long as the block lasts.

    Padding on the left sees only padding. To the score of what is not to be seen Transformers adds the lowest number of
    the dtype, in float16 -65504, and from a score of -16 down the sum is -inf. A position at which all scores are -inf
    becomes NaN; in the next layer so do its keys and values, which every position of the row reads, if with weight 0.
    What padding sees instead makes no difference, for no other position sees it.
    """
    usual = ALL_MASK_ATTENTION_FUNCTIONS["eager"]

    def build_mask(**how: Any) -> Float[Tensor, "row 1 pos cached+pos"]:
        mask = usual(**how)  # 0 at what a position sees
        sees_nothing = (mask < 0).all(-1, keepdim=True)
        return mask.masked_fill_(sees_nothing, 0)

    ALL_MASK_ATTENTION_FUNCTIONS["eager"] = build_mask
    try:
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS["eager"] = usual


@contextlib.contextmanager
def heads_in_groups() -> Iterator[None]:
    """Eager attention of a single position that repeats no keys and values, for as long as the block lasts.

    Where several heads share a head of keys and values, Transformers copies these for each of them: in a step that is
    the whole cache. Here such heads are handed to the family's own function as so many positions of one head.
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
    module: Any,  # attention of some family: they share no class
    query: Float[Tensor, "row head pos d_head"],
    key: Float[Tensor, "row shared cached d_head"],
    value: Float[Tensor, "row shared cached d_head"],
    attention_mask: Float[Tensor, "row 1 pos cached"] | None,
    **how: Any,
) -> tuple[Float[Tensor, "row pos head d_head"], Any]:
    attend = sys.modules[type(module).__module__].eager_attention_forward  # the family's own
    rows, heads, positions, d_head = query.shape
    groups = heads // key.shape[1]
    if positions > 1 or groups == 1 or hasattr(module, "sinks"):  # sinks: a number per head
        return attend(module, query, key, value, attention_mask, **how)
    module.num_key_value_groups = 1
    try:
        grouped = query.view(rows, heads // groups, groups, d_head)
        out, weights = attend(module, grouped, key, value, attention_mask, **how)
    finally:
        module.num_key_value_groups = groups
    return out.transpose(1, 2).reshape(rows, 1, heads, -1), weights


@contextlib.contextmanager
def layers_replaced(lm: PreTrainedModel, start: Float[Tensor, "row pos d_model"], boundary: int) -> Iterator[None]:
    """The layers under the boundary do nothing for as long as the block lasts; the last of them hands on `start`."""
    layers = lm.get_decoder().layers
    saved = list(layers[:boundary])
    try:
        for number in range(boundary):
            layers[number] = _Passed(start if number == boundary - 1 else None)
        yield
    finally:
        for number, layer in enumerate(saved):
            layers[number] = layer


class _Passed(torch.nn.Module):
    """A layer that was run before: the last one of these hands on its result, the others whatever they get."""

    def __init__(self, result: Float[Tensor, "row pos d_model"] | None = None):
        super().__init__()
        self.result = result

    def forward(self, hidden: Float[Tensor, "row pos d_model"], *_: Any, **__: Any) -> Float[Tensor, "row pos d_model"]:
        return hidden if self.result is None else self.result


class _Reached(Exception):
    """Carries what the first layer above the boundary reads, and ends the forward pass there."""

    def __init__(self, hidden: Float[Tensor, "row pos d_model"]):
        super().__init__()
        self.hidden = hidden


def _raise_reached(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    raise _Reached(args[0] if args else kwargs["hidden_states"])


def _keep(residual: Float[Tensor, "row pos *d_in"]) -> Float[Tensor, "row pos *d_in"]:
    return residual


# ---------------------------------------------------------------------------------------------------------------------


class SplicedModel:
    """A TransformerBridge with an SAE in it. All forward passes of the rounds are made here, inside `ready()`.

    boundary: the first layer that has to run again for another mask; None where all have to.
    at_boundary: whether the SAE stands between two layers there, so that what it gives is all that the layers above
    see.  window: how many positions a layer looks back at; infinite where all layers look back at all.
    """

    def __init__(self, model: Any, splice: Splice):
        self.model = model
        self.splice = splice
        self.lm: PreTrainedModel = model.original_model
        self.hook_name: str = splice.sae.cfg.metadata.hook_name
        config = self.lm.generation_config
        self.end_ids = set(config.eos_token_id)
        self.pad_id: int = config.pad_token_id
        self.device: torch.device = self.lm.device
        layers = len(self.lm.get_decoder().layers)
        above = int(self.hook_name.split(".")[1]) + self.hook_name.endswith("resid_post")
        self.boundary = above if 0 < above < layers else None
        self.at_boundary = self.boundary is not None and "resid" in self.hook_name
        self.window: float = getattr(self.lm.config.get_text_config(), "sliding_window", None) or float("inf")
        self._replace: Replace = _keep  # what is done at the SAE's place in the pass under way

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """The SAE in its place, for as long as the block lasts."""
        in_place = hooked(self.model, self.hook_name, lambda residual: self._replace(residual))
        with in_place, padding_that_sees(), heads_in_groups():
            yield

    def stands_at(self, ids: Int[Tensor, "row pos"], attention: Int[Tensor, "row pos"]) -> Bool[Tensor, "row pos"]:
        """Where the SAE stands: not at padding, nor at tokens that bypass it."""
        return attention.bool() & ~torch.isin(ids, self.splice.bypass.to(ids.device))

    def forward(
        self,
        ids: Int[Tensor, "row pos"],
        attention: Int[Tensor, "row cached+pos"],
        cache: DynamicCache | None = None,
        mask: Mask | None = None,
        outputs: Outputs | None = None,
        seen: list[SparseActivations] | None = None,
    ) -> Float[Tensor, "output vocab"]:
        """A whole pass, and the logits at `outputs` (None: at each row's last position).

        seen: a list that gets what the SAE read, row by row.
        """
        stands = self.stands_at(ids, attention[:, -ids.shape[1] :]).flatten()

        def splice(residual: Float[Tensor, "row pos *d_in"]) -> Float[Tensor, "row pos *d_in"]:
            latents = self.splice.encode(residual.flatten(0, 1), stands)
            if seen is not None:
                seen.append(latents)
            rows = number_rows(ids, self.splice.device)
            return self.splice.reconstruct(latents, rows, mask).view_as(residual)

        return self._run(ids, attention, cache, splice, outputs)

    def forward_below(self, layout: Layout) -> Below:
        """The layers below the SAE alone, over the prefixes and then over the rests: once for all masks of a batch."""
        cache = new_cache(self.lm)
        if self.boundary is None:
            return Below(layout.ids, layout.attention, cache)
        layer = self.lm.get_decoder().layers[self.boundary]

        def run(
            ids: Int[Tensor, "row pos"], attention: Int[Tensor, "row cached+pos"], cache: DynamicCache
        ) -> Float[Tensor, "pos d_model"]:
            try:
                self._run(ids, attention, cache, _keep)
            except _Reached as reached:
                return reached.hidden.flatten(0, 1)
            raise RuntimeError(f"the forward pass did not reach layer {self.boundary}")

        with layer.register_forward_pre_hook(_raise_reached, with_kwargs=True):
            parts = self.run_shared(layout, cache, run)
        # Between what is shared and the rest there is padding, which the layers above need not run.
        columns, attention = close_gaps(layout.attention)
        rows = torch.arange(len(columns), device=columns.device)
        for lower in layers_of(cache)[: self.boundary]:
            lower.keys = pick_positions(lower.keys, rows, columns)
            lower.values = pick_positions(lower.values, rows, columns)
        ids = layout.ids.gather(1, columns)
        places = layout.places.gather(1, columns)
        if not self.at_boundary:
            return Below(ids, attention, cache, start=torch.cat(parts)[places.to(parts[0].device)])
        latents = []
        for (part_ids, mask), residual in zip(layout.parts(), parts):
            latents.append(self.splice.encode(residual, self.stands_at(part_ids, mask).flatten()))
        of_rows = join(latents).take(places.flatten().to(self.splice.device))
        stands = of_rows.spliced & attention.flatten().bool().to(self.splice.device)  # a column of padding may be any
        return Below(ids, attention, cache, latents=dataclasses.replace(of_rows, spliced=stands))

    def forward_above(
        self, below: Below, mask: Mask | None, outputs: Outputs
    ) -> tuple[Float[Tensor, "output vocab"], DynamicCache]:
        """The layers above for one mask: the logits at `outputs`, and a cache of all layers that is the caller's."""
        cache = new_cache(self.lm)
        if self.boundary is None:
            return self.forward(below.ids, below.attention, cache, mask, outputs), cache
        if below.latents is not None:
            rows = number_rows(below.ids, self.splice.device)
            start = self.splice.reconstruct(below.latents, rows, mask).unflatten(0, below.ids.shape)
            logits = self.forward_from(start, below.ids, below.attention, cache, outputs)
        else:
            assert below.start is not None
            with layers_replaced(self.lm, below.start, self.boundary):
                logits = self.forward(below.ids, below.attention, cache, mask, outputs)
        for number in range(self.boundary):
            cache.layers[number] = copy.copy(below.cache.layers[number])  # updates replace its tensors
        return logits, cache

    def forward_from(
        self,
        reconstruction: Float[Tensor, "row pos *d_in"],
        ids: Int[Tensor, "row pos"],
        attention: Int[Tensor, "row pos"],
        cache: DynamicCache | None = None,
        outputs: Outputs | None = None,
    ) -> Float[Tensor, "output vocab"]:
        """A pass with a given tensor at the SAE's place, without the layers below where it stands between two."""

        def replace(residual: Float[Tensor, "row pos *d_in"]) -> Float[Tensor, "row pos *d_in"]:
            return reconstruction.to(residual)

        if self.boundary is None or not self.at_boundary:
            return self._run(ids, attention, cache, replace, outputs)
        with layers_replaced(self.lm, reconstruction, self.boundary):
            return self._run(ids, attention, cache, replace, outputs)

    def run_shared(
        self,
        layout: Layout,
        cache: DynamicCache,
        run: Callable[[Int[Tensor, "row pos"], Int[Tensor, "row cached+pos"], DynamicCache], Tensor],
    ) -> list[Tensor]:
        """run(ids, attention, cache) over the prefixes and then over the rest of each row; what each run gave."""
        if not layout.prefix_ids.shape[1]:
            return [run(layout.rest_ids, layout.attention, cache)]
        of_prefixes = run(layout.prefix_ids, layout.prefix_mask, cache)
        for layer in layers_of(cache):
            if layer.is_initialized:
                layer.batch_select_indices(layout.owners.to(layer.keys.device))
        return [of_prefixes, run(layout.rest_ids, layout.attention, cache)]

    def _run(
        self,
        ids: Int[Tensor, "row pos"],
        attention: Int[Tensor, "row cached+pos"],
        cache: DynamicCache | None,
        replace: Replace,
        outputs: Outputs | None = None,
    ) -> Float[Tensor, "output vocab"]:
        """One run of the Transformers model, with `replace` done at the SAE's place."""
        rows, columns = (slice(None), -1) if outputs is None else outputs

        def pick(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            return (args[0][rows, columns],)

        self._replace = replace
        try:
            with self.lm.get_output_embeddings().register_forward_pre_hook(pick):
                return self.lm(
                    input_ids=ids,
                    attention_mask=attention,
                    position_ids=(attention.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :],
                    past_key_values=cache,
                    use_cache=cache is not None,
                ).logits
        finally:
            self._replace = _keep


def number_rows(ids: Int[Tensor, "row pos"], device: torch.device | str) -> Int[Tensor, "pos"]:
    """The row of each position of a batch, row by row."""
    return torch.arange(len(ids), device=device).repeat_interleave(ids.shape[1])
