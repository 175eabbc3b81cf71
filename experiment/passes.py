"""Forward passes of a model with an SAE in it: whole, below the SAE, above it. Knows nothing of answers or files."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from experiment import UserError, own_mistakes


def pad_left(
    sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device | str
) -> tuple[Int[Tensor, "row pos"], Int[Tensor, "row pos"]]:
    """Token ids and attention mask: every row's next token stands at the same place."""
    length = max(map(len, sequences))
    ids = torch.full((len(sequences), length), pad_id)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, length - len(sequence) :] = torch.tensor(sequence, dtype=torch.long)
        mask[row, length - len(sequence) :] = 1
    return ids.to(device), mask.to(device)


def find_shared(sequences, limits, contexts):
    """What the sequences of each context begin with: a list of prefixes, and for each sequence the index of its own.

    limits: how much of each sequence may be in a prefix, at least 1 less than its length. Prefixes are cut so that
    about as much is left of all sequences: padding costs what it costs in a batch without prefixes.
    """
    groups = {}
    for row, (key, sequence) in enumerate(zip(contexts, sequences)):
        groups.setdefault((key, sequence[0]), []).append(row)  # those that begin alike, so that no prefix is empty
    shared = [
        min(len(os.path.commonprefix([sequences[row] for row in rows])), *(limits[row] for row in rows))
        for rows in groups.values()
    ]
    left = max(
        (max(len(sequences[row]) for row in rows) - n for rows, n in zip(groups.values(), shared) if len(rows) > 1),
        default=max(map(len, sequences)),
    )
    prefixes, owners = [], [0] * len(sequences)
    for number, (rows, n) in enumerate(zip(groups.values(), shared)):
        longest = max(rows, key=lambda row: len(sequences[row]))
        prefixes.append(sequences[longest][: max(1, min(n, len(sequences[longest]) - left))])
        for row in rows:
            owners[row] = number
    return prefixes, owners


class Layout:
    """A batch of sequences on the device, left-padded in two parts: shared prefixes, and the rest of each sequence.

    prefix_ids, prefix_mask: [context, prefix]; rest_ids, rest_mask: [row, rest]; owners: [row], each one's prefix.
    Without prefixes that part is 0 positions wide. ids, attention, places: [row, prefix + rest]; places says where each
    position stands among all the prefixes' and then all the rests' positions.
    """

    def __init__(self, sequences, pad_id, device, prefixes=((),), owners=None):
        owners = [0] * len(sequences) if owners is None else owners
        self.prefix_ids, self.prefix_mask = pad_left(prefixes, pad_id, device)
        rests = [ids[len(prefixes[owner]) :] for owner, ids in zip(owners, sequences)]
        self.rest_ids, self.rest_mask = pad_left(rests, pad_id, device)
        self.owners = torch.tensor(owners, device=device)
        self.ids = torch.cat([self.prefix_ids[self.owners], self.rest_ids], 1)
        self.attention = torch.cat([self.prefix_mask[self.owners], self.rest_mask], 1)
        of_prefixes = torch.arange(self.prefix_ids.numel(), device=device).view_as(self.prefix_ids)
        of_rests = torch.arange(self.rest_ids.numel(), device=device).view_as(self.rest_ids)
        self.places = torch.cat([of_prefixes[self.owners], of_rests + self.prefix_ids.numel()], 1)

    def stands(self, model):
        """Where the SAE stands in the prefixes and in the rests, [pos] each."""
        parts = (self.prefix_ids, self.prefix_mask), (self.rest_ids, self.rest_mask)
        return [model.stands_at(*part).flatten() for part in parts if part[0].shape[1]]


@contextlib.contextmanager
def hooked(model, hook_name, replace):
    """The Transformers model of a TransformerBridge, with `replace(residual)` in place of what passes at `hook_name`.

    TransformerLens' wrappers around every other module compute what nobody hooks here. They are set aside meanwhile:
    a forward pass of the demo is a tenth faster without them, and the same bit for bit.
    """
    # Here, for it takes seconds, and what is wrong with a data set should show before.
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    lm, point = model.original_model, model.hook_dict[hook_name]
    wrapped = [
        (parent, name, child)
        for parent in lm.modules()
        if not isinstance(parent, GeneralizedComponent)
        for name, child in parent.named_children()
        if isinstance(child, GeneralizedComponent) and not any(point is part for part in child.children())
    ]
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


class _Reached(Exception):
    """Carries what the first layer above the SAE reads, and ends the forward pass there."""


class _Passed(torch.nn.Module):
    """A layer that was run before: the last one of these hands on its result, the others whatever they get."""

    def __init__(self, result=None):
        super().__init__()
        self.result = result

    def forward(self, hidden, *_, **__):
        return hidden if self.result is None else self.result


class SplicedModel:
    """A TransformerBridge with an SAE in it. All forward passes of the rounds are made here.

    boundary: the first layer that has to run again for another mask; None where all have to.  at_boundary: whether
    the SAE stands between two layers there, so that what it gives is all that the layers above see.
    """

    def __init__(self, model, splice):
        self.model, self.splice, self.lm = model, splice, model.original_model
        self.hook_name = splice.sae.cfg.metadata.hook_name
        config = self.lm.generation_config
        self.end_ids, self.pad_id, self.device = set(config.eos_token_id), config.pad_token_id, self.lm.device
        layers = len(self.lm.get_decoder().layers)
        above = int(self.hook_name.split(".")[1]) + self.hook_name.endswith("resid_post")
        self.boundary = above if 0 < above < layers else None
        self.at_boundary = self.boundary is not None and "resid" in self.hook_name
        # A window counts places in the cache, padding between prefix and rest included.
        self.window = getattr(self.lm.config.get_text_config(), "sliding_window", None) or float("inf")
        self._seen = None  # a list that gets the Latents of every pass, when asked for
        self._pass = None  # where the SAE stands in the pass under way, its mask, and what stands in its place

    @contextlib.contextmanager
    def ready(self, seen=None):
        """The SAE in its place, for as long as the block lasts. seen: a list that gets the Latents of every pass."""
        self._seen = seen
        try:
            with hooked(self.model, self.hook_name, self._replace), padding_that_sees():
                yield
        finally:
            self._seen = None

    def _replace(self, residual):
        stands, mask, replacement = self._pass
        if replacement is _Reached:
            raise _Reached(residual)
        if replacement is not None:
            return replacement.to(residual)
        latents = self.splice.encode(residual.flatten(0, 1), stands.flatten())
        if self._seen is not None:
            self._seen.append(latents)
        rows = torch.arange(len(residual), device=self.splice.device).repeat_interleave(residual.shape[1])
        return self.splice.reconstruct(latents, rows, mask).view_as(residual)

    def stands_at(self, ids, attention):
        """Where the SAE stands, [row, pos]: not at padding, nor at tokens that bypass it."""
        return attention.bool() & ~torch.isin(ids, self.splice.bypass.to(ids.device))

    @own_mistakes()
    def run(self, ids, attention, cache=None, mask=None, outputs=None, start=None, replacement=None):
        """One forward pass over token ids [row, pos], and the logits [output, vocab] at `outputs`.

        attention: [row, cached + pos].  mask: a Mask.  outputs: rows and columns of the logits wanted; None: the last.
        start [row, pos, d_model]: what the layer at the boundary reads; those below are not run.
        replacement [row, pos, d_in]: what stands in the SAE's place, instead of what the splice makes of it.
        """
        self._pass = self.stands_at(ids, attention[:, -ids.shape[1] :]), mask, replacement
        layers, below = self.lm.get_decoder().layers, 0 if start is None else self.boundary
        saved = list(layers[:below])
        rows, columns = (slice(None), -1) if outputs is None else outputs

        def pick(module, args):
            return (args[0][rows, columns],)

        try:
            for number in range(below):
                layers[number] = _Passed(start if number == below - 1 else None)
            with self.lm.get_output_embeddings().register_forward_pre_hook(pick):
                logits = self.lm(
                    input_ids=ids,
                    attention_mask=attention,
                    position_ids=(attention.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :],
                    past_key_values=cache,
                    use_cache=cache is not None,
                ).logits
        finally:
            self._pass = None
            for number, layer in enumerate(saved):
                layers[number] = layer
        if not logits.isfinite().all():
            raise UserError(
                "the model's logits are not finite: float16 overflows in some models; try --dtype bfloat16 "
                "(or float32; and the same for --sae-dtype)"
            )
        return logits

    def run_below(self, ids, attention, cache):
        """The layers under the boundary alone: what the layer there reads, [row, pos, d_model]."""

        def stop(module, args, kwargs):
            raise _Reached(args[0] if args else kwargs["hidden_states"])

        with self.lm.get_decoder().layers[self.boundary].register_forward_pre_hook(stop, with_kwargs=True):
            try:
                self.run(ids, attention, cache, replacement=_Reached)
            except _Reached as reached:
                return reached.args[0]

    def run_shared(self, layout, cache, run):
        """run(ids, attention, cache) over the prefixes and then over the rest of each row; what each run gave."""
        if not layout.prefix_ids.shape[1]:
            return [run(layout.rest_ids, layout.attention, cache)]
        of_prefixes = run(layout.prefix_ids, layout.prefix_mask, cache)
        for layer in cache.layers:
            if layer.is_initialized:
                layer.batch_select_indices(layout.owners.to(layer.keys.device))
        return [of_prefixes, run(layout.rest_ids, layout.attention, cache)]
