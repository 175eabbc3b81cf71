"""The SAE in the model: its active latents, masks on them, and what stands in the model's place afterwards.

Knows nothing of files, options or questions.

Of a JumpReLU SAE's 131,072 latents about 120 are active at a position. So activations are kept as entries (position,
latent, value): a mask drops entries, and decoding adds up the decoder's rows of those that are left. The result is
`sae.decode(sae.encode(x))` to the order of summation. SAEs whose decoding is more than `acts @ W_dec + bias`, and
activations that are not sparse, are encoded and decoded whole, a chunk of positions at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:  # importing it takes seconds
    from sae_lens import SAE

CHUNK_BYTES = 2**29  # of one [position, d_sae] tensor; encoding holds about three of them
CHUNK_POSITIONS = 1024  # at most: on a CPU a small SAE's chunk then fits into the cache
DENSE = 1 / 16  # of the latents active: from there on matrix products are the faster way
ENTRIES = 8192  # of which slopes are taken at once


@dataclass(frozen=True)
class SparseActivations:
    """The active latents at a row of positions, and the residual stream there.

    residual: with heads and d_head instead of d_in at `hook_z`.  spliced: False where the SAE does not stand: at
    padding, and at special tokens that bypass it.  ids, values: an entry per active latent, position by position.
    counts: how many entries each position has.
    """

    residual: Float[Tensor, "pos *d_in"]
    spliced: Bool[Tensor, "pos"]
    ids: Int[Tensor, "entry"]
    values: Float[Tensor, "entry"]
    counts: Int[Tensor, "pos"]

    def take(self, positions: Int[Tensor, "taken"]) -> "SparseActivations":
        """The activations at these positions, which may repeat."""
        counts = self.counts[positions]
        starts = (self.counts.cumsum(0) - self.counts)[positions]
        shift = starts - (counts.cumsum(0) - counts)  # from where an entry stands here to where it stood
        entries = torch.arange(int(counts.sum()), device=counts.device) + shift.repeat_interleave(counts)
        residual = self.residual[positions.to(self.residual.device)]
        return SparseActivations(residual, self.spliced[positions], self.ids[entries], self.values[entries], counts)

    def entry_positions(self) -> Int[Tensor, "entry"]:
        """The position of each entry."""
        return torch.arange(len(self.counts), device=self.counts.device).repeat_interleave(self.counts)


def join(parts: Sequence[SparseActivations]) -> SparseActivations:
    """The positions of several activations one after the other."""
    if len(parts) == 1:
        return parts[0]
    return SparseActivations(
        residual=torch.cat([part.residual for part in parts]),
        spliced=torch.cat([part.spliced for part in parts]),
        ids=torch.cat([part.ids for part in parts]),
        values=torch.cat([part.values for part in parts]),
        counts=torch.cat([part.counts for part in parts]),
    )


@dataclass(frozen=True)
class Mask:
    """Latents to ablate, for each row of a batch.

    means: what they are set to; None: zero.  written: what latents at their means write; None: nothing.
    """

    masked: Bool[Tensor, "row d_sae"]
    means: Float[Tensor, "d_sae"] | None = None
    written: Float[Tensor, "row d_in"] | None = None

    def take(self, rows: Int[Tensor, "taken"]) -> "Mask":
        """The mask of these rows."""
        rows = rows.to(self.masked.device)
        written = None if self.written is None else self.written[rows]
        return Mask(self.masked[rows], self.means, written)

    @staticmethod
    def join(masks: Sequence["Mask"]) -> "Mask":
        """The rows of several masks one after the other."""
        written = [mask.written for mask in masks if mask.written is not None]  # of all of them or of none
        return Mask(torch.cat([mask.masked for mask in masks]), masks[0].means, torch.cat(written) if written else None)


class Splice:
    """An SAE, and how it stands in the model.

    error_term: "drop", as in the paper: the reconstruction alone; "keep": what the SAE does not explain stays, so the
    place keeps its own value less what the masked latents wrote.  bypass: ids of tokens at which it does not stand.
    writes_rows: whether what a latent writes is its activation times its row of W_dec, at every position alike.
    """

    def __init__(self, sae: "SAE", error_term: str = "drop", bypass: Sequence[int] = ()):
        self.sae = sae
        self.keeps_error = error_term == "keep"
        self.d_sae: int = sae.cfg.d_sae
        self.device: torch.device = sae.W_dec.device
        self.bypass = torch.tensor(bypass, dtype=torch.long, device=self.device)
        self.chunk = max(1, min(CHUNK_POSITIONS, CHUNK_BYTES // (self.d_sae * sae.W_dec.element_size())))
        with torch.no_grad():
            self.bias = self._find_bias()
        puts_heads_together = sae.cfg.reshape_activations != "none"
        self.writes_rows = self.bias is not None or (puts_heads_together and not self._normalises())

    def _normalises(self) -> bool:
        """Whether the SAE brings each position to a size of its own first, and what it decodes back to the old one."""
        return self.sae.cfg.normalize_activations not in ("none", "expected_average_only_in")

    def _find_bias(self) -> Float[Tensor, "d_in"] | None:
        """What is added to `acts @ W_dec`; None where decoding is not that."""
        config = self.sae.cfg
        decoder = self.sae.W_dec
        if self._normalises() or config.reshape_activations != "none":
            return None
        acts = torch.zeros(2, self.d_sae, device=self.device, dtype=decoder.dtype)
        acts[1, :: max(1, self.d_sae // 50)] = 1.0
        bias, decoded = self.sae.decode(acts)
        error = (decoded - acts[1] @ decoder - bias).abs().max()
        is_linear = error <= torch.finfo(decoder.dtype).eps ** 0.5 * decoded.abs().max()
        return bias if is_linear else None

    def mask(self, latents: Sequence[Sequence[int]], means: Float[Tensor, "d_sae"] | None = None) -> Mask:
        """A mask from a list of latents per row. means: as in Mask."""
        flat = torch.tensor([latent for of_row in latents for latent in of_row], dtype=torch.long)
        counts = torch.tensor([len(of_row) for of_row in latents])
        rows = torch.arange(len(latents)).repeat_interleave(counts).to(self.device)
        flat = flat.to(self.device)
        masked = torch.zeros(len(latents), self.d_sae, dtype=torch.bool, device=self.device)
        masked[rows, flat] = True
        if means is None or self.bias is None:
            return Mask(masked, means)
        decoder = self.sae.W_dec
        written = decoder.new_zeros(len(latents), decoder.shape[1])
        for some_rows, some in zip(rows.split(ENTRIES), flat.split(ENTRIES)):
            written.index_add_(0, some_rows, means[some].to(decoder).unsqueeze(1) * decoder[some])
        return Mask(masked, means, written)

    def read(self, residual: Float[Tensor, "pos *d_in"]) -> Float[Tensor, "pos *d_in"]:
        """What the SAE reads, in its dtype.

        Some SAEs for `hook_z` say in their configuration that they put the heads side by side themselves; Gemma
        Scope 2's do not.
        """
        residual = residual.to(self.device, self.sae.dtype)
        return residual if self.sae.cfg.reshape_activations == "hook_z" else residual.flatten(1)

    @torch.no_grad()
    def encode(self, residual: Float[Tensor, "pos *d_in"], spliced: Bool[Tensor, "pos"]) -> SparseActivations:
        """The active latents at positions. spliced: where the SAE stands; elsewhere nothing is encoded."""
        spliced = spliced.to(self.device)
        positions = spliced.nonzero().flatten()
        counts = torch.zeros(len(spliced), dtype=torch.long, device=self.device)
        ids = [counts[:0]]
        values = [self.sae.W_dec[:0, 0]]
        for chunk in positions.split(self.chunk):
            acts = self.sae.encode(self.read(residual[chunk.to(residual.device)]))  # [chunk, d_sae]
            where, active = acts.nonzero(as_tuple=True)
            ids.append(active)
            values.append(acts[where, active])
            counts[chunk] = torch.bincount(where, minlength=len(chunk))
        return SparseActivations(residual.detach(), spliced, torch.cat(ids), torch.cat(values), counts)

    @torch.no_grad()
    def reconstruct(
        self, latents: SparseActivations, rows: Int[Tensor, "pos"] | None = None, mask: Mask | None = None
    ) -> Float[Tensor, "pos *d_in"]:
        """What stands in the model's place, like latents.residual in shape and dtype.

        rows: the row of the mask that each position belongs to.
        """
        if mask is None and self.keeps_error:
            return latents.residual
        if self.bias is None or len(latents.ids) > DENSE * self.d_sae * int(latents.spliced.sum()):
            out = self._reconstruct_whole(latents, rows, mask)
        else:
            out = self._reconstruct_from_entries(latents, rows, mask)
        out = out.to(latents.residual).view_as(latents.residual)
        spliced = latents.spliced.to(out.device).view(-1, *[1] * (out.dim() - 1))
        return torch.where(spliced, out, latents.residual)

    def _reconstruct_from_entries(
        self, latents: SparseActivations, rows: Int[Tensor, "pos"] | None, mask: Mask | None
    ) -> Float[Tensor, "pos d_in"]:
        assert self.bias is not None
        values = latents.values
        if mask is not None:
            assert rows is not None
            is_masked = mask.masked[rows.repeat_interleave(latents.counts), latents.ids]  # [entry]
            # Where the error term stays, what is decoded is what the mask takes away.
            values = values.masked_fill(~is_masked if self.keeps_error else is_masked, 0)
        starts = latents.counts.cumsum(0) - latents.counts
        decoded = F.embedding_bag(latents.ids, self.sae.W_dec, starts, mode="sum", per_sample_weights=values)
        out = self.read(latents.residual) - decoded if self.keeps_error else decoded + self.bias
        if mask is None or mask.written is None:
            return out
        assert rows is not None
        return out + mask.written[rows]

    def _reconstruct_whole(
        self, latents: SparseActivations, rows: Int[Tensor, "pos"] | None, mask: Mask | None
    ) -> Float[Tensor, "pos *d_in"]:
        out = []
        for chunk in torch.arange(len(latents.residual), device=self.device).split(self.chunk):
            residual = latents.residual[chunk.to(latents.residual.device)]
            acts = self.sae.encode(self.read(residual))
            if mask is not None:
                assert rows is not None
                replacement = acts.new_zeros(()) if mask.means is None else mask.means.to(acts)
                acts = torch.where(mask.masked[rows[chunk]], replacement, acts)
            decoded = self.sae.decode(acts)
            if self.keeps_error:
                # Encoded again: decoding may use up what encoding noted (the norm to go back to).
                whole = self.sae.decode(self.sae.encode(self.read(residual)))
                decoded = residual.to(decoded).view_as(decoded) + (decoded - whole)
            out.append(decoded.to(latents.residual).view_as(residual))
        return torch.cat(out)

    def decoder_vjp(self, latents: SparseActivations, gradient: Float[Tensor, "pos *d_in"]) -> Float[Tensor, "entry"]:
        """The gradient at each entry's activation, from the one at the reconstruction."""
        if self.bias is None:
            return self._vjp_whole(latents, self.read(gradient))
        gradient = self.read(gradient)
        slopes = [latents.values[:0]]
        for where, ids in zip(latents.entry_positions().split(ENTRIES), latents.ids.split(ENTRIES)):
            slopes.append((gradient[where] * self.sae.W_dec[ids]).sum(-1))
        return torch.cat(slopes)

    def _vjp_whole(self, latents: SparseActivations, gradient: Float[Tensor, "pos *d_in"]) -> Float[Tensor, "entry"]:
        """`decoder_vjp` through the SAE's own decoding, a chunk of positions at a time."""
        positions = latents.entry_positions()
        slopes = [latents.values[:0]]
        for chunk in torch.arange(len(gradient), device=self.device).split(self.chunk):
            with torch.no_grad():
                acts = self.sae.encode(self.read(latents.residual[chunk.to(latents.residual.device)]))
            with torch.enable_grad():
                decoded = self.sae.decode(acts.requires_grad_())
            (slope,) = torch.autograd.grad(decoded, acts, gradient[chunk].view_as(decoded))
            inside = (positions >= chunk[0]) & (positions <= chunk[-1])
            slopes.append(slope[positions[inside] - chunk[0], latents.ids[inside]])
        return torch.cat(slopes)
