"""Forward passes of a model with an SAE in it: whole, below the SAE, above it. Knows nothing of answers or files."""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from experiment.intervention.ablations import Mask
from experiment.intervention.caches import go_on_from, layers_of, new_cache, pick_positions
from experiment.intervention.layout import Layout, Level, close_gaps
from experiment.intervention.modules import (
    Reached,
    Replace,
    hooked,
    keep,
    last_layer_from,
    layers_replaced,
    lean_attention,
    padding_that_sees,
    stopped_at,
)
from experiment.intervention.sparse import SparseActivations, join
from experiment.intervention.splice import Splice

Outputs = tuple[Int[Tensor, "output"], Int[Tensor, "output"]]  # rows and columns of the logits that are wanted


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


class SplicedModel:
    """A TransformerBridge with an SAE in it. All forward passes of the rounds are made here, inside `ready()`.

    boundary: the first layer that has to run again for another mask; None where all have to.
    at_boundary: whether the SAE stands between two layers there, so that what it gives is all that the layers above
    see.  layers_above: how many a gradient at the SAE's place goes through.  last_layer_is_free: whether the SAE stands
    in a layer before the last one, so that of what that hands on only positions are read that say tokens.
    window: how many positions a layer looks back at; infinite where all layers look back at all.  gradient_room: as of
    plan.gradient_rows, which a round sets.  can_record: whether a step may be recorded, to be replayed: all on one CUDA
    device, and no recording has failed.
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
        layer = int(self.hook_name.split(".")[1])  # blocks.9.hook_resid_post: layer 9
        first_above = layer
        if self.hook_name.endswith("resid_post"):
            first_above += 1
        self.boundary = first_above if 0 < first_above < layers else None
        self.layers_above = layers - first_above
        self.at_boundary = self.boundary is not None and "resid" in self.hook_name
        self.last_layer_is_free = layer < layers - 1
        text_config = self.lm.config.get_text_config()
        self.window: float = getattr(text_config, "sliding_window", None) or float("inf")
        self.gradient_room: float | None = None
        devices = {parameter.device for parameter in self.lm.parameters()}
        devices.add(splice.device)
        self.can_record = len(devices) == 1 and self.device.type == "cuda"
        self._replace: Replace = keep  # what is done at the SAE's place in the pass under way

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """The SAE in its place, for as long as the block lasts: entered once, around many passes.

        For gemma-2-9b-it it takes 40 ms, in which TransformerLens finds its 42 layers' hooks.
        """

        def replace(residual: Float[Tensor, "row pos *d_in"]) -> Float[Tensor, "row pos *d_in"]:
            return self._replace(residual)

        with hooked(self.model, self.hook_name, replace), padding_that_sees(), lean_attention():
            yield

    def where_sae_applies(
        self,
        ids: Int[Tensor, "row pos"],
        attention: Int[Tensor, "row cached+pos"],
    ) -> Bool[Tensor, "row pos"]:
        """Where the SAE stands: not at padding, nor at tokens that bypass it.

        attention: 1 at tokens and 0 at padding, also of the places in the cache.
        """
        bypass = self.splice.bypass.to(ids.device)
        matches = ids.unsqueeze(-1) == bypass  # a GPU's isin() may make the host wait
        is_bypassed = matches.any(-1)
        width = ids.shape[1]
        is_token = attention[:, -width:].bool()
        return is_token & ~is_bypassed

    def forward(
        self,
        ids: Int[Tensor, "row pos"],
        attention: Int[Tensor, "row cached+pos"],
        cache: DynamicCache | None = None,
        mask: Mask | None = None,
        outputs: Outputs | None = None,
        encoded: list[SparseActivations] | None = None,
        positions: Int[Tensor, "row pos"] | None = None,
    ) -> Float[Tensor, "output vocab"]:
        """A whole pass, and the logits at `outputs` (None: at each row's last position).

        cache: gets the keys and values of all layers.  mask: None: nothing is masked.  encoded: a list that gets the
        latents at the pass's positions, row by row.  positions: of the ids; None: as the attention says.
        """
        stands = self.where_sae_applies(ids, attention).flatten()

        def splice(residual: Float[Tensor, "row pos *d_in"]) -> Float[Tensor, "row pos *d_in"]:
            of_positions = residual.flatten(0, 1)
            latents = self.splice.encode(of_positions, stands)
            if encoded is not None:
                encoded.append(latents)
            rows = number_rows(ids, self.splice.device)
            out = self.splice.reconstruct(latents, rows, mask)
            return out.view_as(residual)

        with self._shortened(ids, cache, outputs):
            return self._run(ids, attention, cache, splice, outputs, positions)

    def forward_whole(
        self,
        ids: Int[Tensor, "row 1"],
        attention: Int[Tensor, "row cached+1"],
        cache: DynamicCache,
        mask: Mask | None,
        positions: Int[Tensor, "row 1"],
    ) -> tuple[Float[Tensor, "row vocab"], Float[Tensor, "row *d_in"]]:
        """`forward` of one token per row, for which the host never waits for the device: the logits at each row, and
        the residual stream that the SAE was given.

        All latents are encoded and decoded, active or not.
        """
        stands = self.where_sae_applies(ids, attention).flatten()
        rows = number_rows(ids, self.splice.device)
        residuals: list[Tensor] = []  # one: [row, *d_in]

        def splice(residual: Float[Tensor, "row 1 *d_in"]) -> Float[Tensor, "row 1 *d_in"]:
            of_rows = residual.flatten(0, 1)
            residuals.append(of_rows)
            out = self.splice.reconstruct_whole(of_rows, stands, rows, mask)
            return out.view_as(residual)

        logits = self._run(ids, attention, cache, splice, None, positions)
        return logits, residuals[0]

    def forward_below(self, layout: Layout) -> Below:
        """The layers below the SAE alone, level by level: once for all masks of a batch."""
        cache = new_cache(self.lm)
        if self.boundary is None:
            return Below(layout.ids, layout.attention, cache)
        hidden = [self._run_below(level, cache) for level in layout.levels]
        # Between what is shared and the rest there is padding, which the layers above need not run.
        columns, attention = close_gaps(layout.attention)
        self._pick_columns(cache, columns)
        ids = layout.ids.gather(1, columns)
        places = layout.places.gather(1, columns)
        if not self.at_boundary:
            together = torch.cat(hidden)
            start = together[places.to(together.device)]
            return Below(ids, attention, cache, start=start)
        latents = self._encode_levels(layout.levels, hidden)
        positions = places.flatten().to(self.splice.device)
        latents = latents.take(positions)
        is_token = attention.flatten().bool()
        spliced = latents.spliced & is_token.to(self.splice.device)  # a column of padding may be any
        latents = dataclasses.replace(latents, spliced=spliced)
        return Below(ids, attention, cache, latents=latents)

    def _pick_columns(self, cache: DynamicCache, columns: Int[Tensor, "row left"]) -> None:
        """Leaves these columns of each row alone in the cache of the layers below."""
        rows = torch.arange(len(columns), device=columns.device)
        below = layers_of(cache)[: self.boundary]
        for lower in below:
            lower.keys = pick_positions(lower.keys, rows, columns)
            lower.values = pick_positions(lower.values, rows, columns)

    def _encode_levels(self, levels: list[Level], hidden: list[Float[Tensor, "pos d_model"]]) -> SparseActivations:
        """The latents at all positions of the levels, level by level. hidden: what came out below the SAE there."""
        latents = []
        for level, residual in zip(levels, hidden):
            stands = self.where_sae_applies(level.ids, level.attention)
            of_level = self.splice.encode(residual, stands.flatten())
            latents.append(of_level)
        return join(latents)

    def _run_below(self, level: Level, cache: DynamicCache) -> Float[Tensor, "pos d_model"]:
        """What the first layer above the SAE reads at a level's positions, node by node."""
        assert self.boundary is not None
        go_on_from(level, cache)
        with stopped_at(self.lm.get_decoder().layers[self.boundary]):
            try:
                self._run(level.ids, level.attention, cache, keep)
            except Reached as reached:
                return reached.hidden.flatten(0, 1)
        raise RuntimeError(f"the forward pass did not reach layer {self.boundary}")

    def forward_above(
        self,
        below: Below,
        mask: Mask | None,
        outputs: Outputs,
    ) -> tuple[Float[Tensor, "output vocab"], DynamicCache]:
        """The layers above for one mask: the logits at `outputs`, and a cache of all layers that is the caller's."""
        cache = new_cache(self.lm)
        if self.boundary is None:
            logits = self.forward(below.ids, below.attention, cache, mask, outputs)
            return logits, cache
        if below.latents is not None:
            rows = number_rows(below.ids, self.splice.device)
            out = self.splice.reconstruct(below.latents, rows, mask)
            in_rows = out.unflatten(0, below.ids.shape)
            logits = self.forward_from(in_rows, below.ids, below.attention, cache, outputs)
        else:
            assert below.start is not None
            with layers_replaced(self.lm, below.start, self.boundary):
                logits = self.forward(below.ids, below.attention, cache, mask, outputs)
        for number in range(self.boundary):
            lower = below.cache.layers[number]
            cache.layers[number] = copy.copy(lower)  # updates replace its tensors
        return logits, cache

    def forward_from(
        self,
        reconstruction: Float[Tensor, "row pos *d_in"],
        ids: Int[Tensor, "row pos"],
        attention: Int[Tensor, "row pos"],
        cache: DynamicCache | None = None,
        outputs: Outputs | None = None,
    ) -> Float[Tensor, "output vocab"]:
        """A pass with a given tensor at the SAE's place, and the logits at `outputs`, as of `forward`.

        Where the SAE stands between two layers, those below are not run.
        """

        def replace(residual: Float[Tensor, "row pos *d_in"]) -> Float[Tensor, "row pos *d_in"]:
            return reconstruction.to(residual)

        with self._shortened(ids, cache, outputs):
            if self.boundary is None or not self.at_boundary:
                return self._run(ids, attention, cache, replace, outputs)
            with layers_replaced(self.lm, reconstruction, self.boundary):
                return self._run(ids, attention, cache, replace, outputs)

    def _shortened(
        self,
        ids: Int[Tensor, "row pos"],
        cache: DynamicCache | None,
        outputs: Outputs | None,
    ) -> contextlib.AbstractContextManager[None]:
        """A pass in which the last layer does what the logits at `outputs` and the cache need, and no more."""
        first = find_first(outputs, ids.shape[1])
        if first == 0 or cache is None or not self.last_layer_is_free:
            return contextlib.nullcontext()
        return last_layer_from(self.lm, first)

    def _run(
        self,
        ids: Int[Tensor, "row pos"],
        attention: Int[Tensor, "row cached+pos"],
        cache: DynamicCache | None,
        replace: Replace,
        outputs: Outputs | None = None,
        positions: Int[Tensor, "row pos"] | None = None,
    ) -> Float[Tensor, "output vocab"]:
        """One run of the Transformers model, with `replace` done at the SAE's place."""
        width = ids.shape[1]
        if positions is None:
            counted = attention.cumsum(-1) - 1
            counted = counted.clamp(min=0)  # -1 at padding on the left
            positions = counted[:, -width:]

        def pick(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            hidden = args[0]  # [row, pos, d_model], of a shortened layer the last positions
            if outputs is None:
                return (hidden[:, -1],)  # without numbers of rows on the CPU, which could not be recorded (`steps`)
            rows, columns = outputs
            from_end = columns % width - width
            return (hidden[rows, from_end],)

        self._replace = replace
        try:
            with self.lm.get_output_embeddings().register_forward_pre_hook(pick):
                return self.lm(
                    input_ids=ids,
                    attention_mask=attention,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=cache is not None,
                ).logits
        finally:
            self._replace = keep


def find_first(outputs: Outputs | None, width: int) -> int:
    """The first column of a batch of this width at which logits are wanted. None: each row's last position alone."""
    if outputs is None:
        return width - 1
    _, columns = outputs
    from_start = columns % width  # some count from the end
    return int(from_start.min())


def number_rows(ids: Int[Tensor, "row pos"], device: torch.device | str) -> Int[Tensor, "pos"]:
    """The row of each position of a batch, row by row."""
    rows = torch.arange(len(ids), device=device)
    return rows.repeat_interleave(ids.shape[1])
