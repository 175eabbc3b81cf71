"""The SAE in the model: its active latents, and what stands in the model's place afterwards.

Knows nothing of files, options or questions.

Of a JumpReLU SAE's 131,072 latents about 120 are active at a position. So activations are kept as entries (position,
latent, value): a mask drops entries, and decoding adds up the decoder's rows of those that are left. The result is
`sae.decode(sae.encode(x))` to the order of summation. SAEs whose decoding is more than `acts @ W_dec + bias`, and
activations that are not sparse, are encoded and decoded whole, a chunk of positions at a time.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from experiment.intervention.ablations import Ablation, Mask, build_mask, turn
from experiment.intervention.sparse import ENTRIES, SparseActivations

if TYPE_CHECKING:  # importing it takes seconds
    from sae_lens import SAE

CHUNK_BYTES = 2**29  # of one [position, d_sae] tensor; encoding holds about three of them
CHUNK_POSITIONS = 1024  # at most: on a CPU a small SAE's chunk then fits into the cache
DENSE = 1 / 16  # of the latents active: from there on matrix products are the faster way


class Splice:
    """An SAE, and how it stands in the model.

    error_term: "drop", as in the paper: the reconstruction alone; "keep": what the SAE does not explain stays, so the
    place keeps its own value less what the masked latents wrote.  bypass: ids of tokens at which it does not stand.
    bias: what is added to `acts @ W_dec`; None where decoding is more than that.  chunk: how many positions are encoded
    whole at once.  writes_rows: whether what a latent writes is its activation times its row of W_dec, at every
    position alike; so it is wherever there is a bias, and for some SAEs without.

    "Whole", below: every latent of a position is encoded and decoded, not the active ones alone.
    """

    def __init__(self, sae: "SAE", error_term: str = "drop", bypass: Sequence[int] = ()):
        self.sae = sae
        self.keeps_error = error_term == "keep"
        self.d_sae: int = sae.cfg.d_sae
        self.d_in: int = sae.W_dec.shape[1]
        self.device: torch.device = sae.W_dec.device
        self.bypass = torch.tensor(
            bypass,
            dtype=torch.long,
            device=self.device,
        )
        bytes_per_position = self.d_sae * sae.W_dec.element_size()
        fits = CHUNK_BYTES // bytes_per_position
        self.chunk = max(1, min(CHUNK_POSITIONS, fits))
        with torch.no_grad():
            self.bias = self._find_bias()
        self.writes_rows = self.bias is not None
        if self._puts_heads_together() and not self._normalises():
            self.writes_rows = True

    def _puts_heads_together(self) -> bool:
        """Whether the SAE takes the heads of `hook_z` as they are, and gives them so."""
        return self.sae.cfg.reshape_activations != "none"

    def _normalises(self) -> bool:
        """Whether the SAE brings each position to a size of its own first, and what it decodes back to the old one."""
        return self.sae.cfg.normalize_activations not in ("none", "expected_average_only_in")

    def _find_bias(self) -> Float[Tensor, "d_in"] | None:
        """What is added to `acts @ W_dec`; None where decoding is not that: tried with some 50 latents active."""
        if self._normalises() or self._puts_heads_together():
            return None
        decoder = self.sae.W_dec
        nothing = decoder.new_zeros(self.d_sae)
        some = nothing.clone()
        step = max(1, self.d_sae // 50)
        some[::step] = 1.0
        both = torch.stack([nothing, some])
        bias, decoded = self.sae.decode(both)
        expected = some @ decoder + bias
        error = (decoded - expected).abs().max()
        largest = decoded.abs().max()
        tolerance = torch.finfo(decoder.dtype).eps ** 0.5
        is_linear = error <= tolerance * largest
        return bias if is_linear else None

    def mask(
        self,
        ablation: Ablation,
        means: Float[Tensor, "d_sae"] | None = None,
    ) -> Mask:
        """A mask with a row per item of the ablation. means: as in Mask."""
        adds_up_rows = self.bias is not None
        return build_mask(ablation, self.sae.W_dec, means, adds_up_rows)

    def to_input(self, residual: Float[Tensor, "pos *d_in"]) -> Float[Tensor, "pos *d_in"]:
        """The residual stream as the SAE takes it, in its dtype and on its device.

        Some SAEs for `hook_z` say in their configuration that they put the heads side by side themselves; Gemma
        Scope 2's do not.
        """
        residual = residual.to(self.device, self.sae.dtype)
        if self._puts_heads_together():
            return residual
        return residual.flatten(1)

    def _chunks(self, count: int) -> tuple[Int[Tensor, "chunk"], ...]:
        """The numbers of so many positions, a chunk at a time."""
        positions = torch.arange(count, device=self.device)
        return positions.split(self.chunk)

    @torch.no_grad()
    def encode(
        self,
        residual: Float[Tensor, "pos *d_in"],
        spliced: Bool[Tensor, "pos"],
    ) -> SparseActivations:
        """The active latents at positions.

        residual: on any device; kept as it is.  spliced: where the SAE stands; elsewhere nothing is encoded.
        """
        spliced = spliced.to(self.device)
        positions = spliced.nonzero().flatten()
        counts = torch.zeros(
            len(spliced),
            dtype=torch.long,
            device=self.device,
        )
        ids = [counts[:0]]  # empty, of the dtype to come, as the values: the SAE may stand nowhere
        values = [self.sae.W_dec[:0, 0]]
        for chunk in positions.split(self.chunk):
            acts = self._encode_whole(residual, chunk)
            where, active = acts.nonzero(as_tuple=True)
            ids.append(active)
            values.append(acts[where, active])
            counts[chunk] = where.bincount(minlength=len(chunk))
        return SparseActivations(
            residual=residual.detach(),
            spliced=spliced,
            ids=torch.cat(ids),
            values=torch.cat(values),
            counts=counts,
        )

    def _encode_whole(
        self,
        residual: Float[Tensor, "pos *d_in"],
        chunk: Int[Tensor, "chunk"],
    ) -> Float[Tensor, "chunk d_sae"]:
        """Every latent's activation at some of the positions."""
        places = chunk.to(residual.device)
        given = self.to_input(residual[places])
        return self.sae.encode(given)

    @torch.no_grad()
    def reconstruct(
        self,
        latents: SparseActivations,
        rows: Int[Tensor, "pos"] | None = None,
        mask: Mask | None = None,
    ) -> Float[Tensor, "pos *d_in"]:
        """What stands in the model's place, like latents.residual in shape and dtype.

        rows: the row of the mask that each position belongs to; only with a mask.  mask: None: nothing is masked.
        """
        if mask is None and self.keeps_error:
            return latents.residual
        out = self._decode(latents, rows, mask)
        if mask is not None and mask.directions is not None:
            assert rows is not None
            unmasked = self._find_unmasked(latents)
            for chunk in self._chunks(len(out)):
                directions = mask.directions[rows[chunk]]
                out[chunk] = turn(unmasked[chunk], out[chunk], directions)
        return self._put_in_place(out, latents.residual, latents.spliced)

    @torch.no_grad()
    def reconstruct_whole(
        self,
        residual: Float[Tensor, "row *d_in"],
        spliced: Bool[Tensor, "row"],
        rows: Int[Tensor, "row"],
        mask: Mask | None,
    ) -> Float[Tensor, "row *d_in"]:
        """`reconstruct` of what the SAE reads at these few positions, without a look at which latents are active.

        So nothing waits for the device, and it can be recorded (`steps`).
        """
        if mask is None and self.keeps_error:
            return residual
        out = self._decode_whole(residual, rows, mask)
        if mask is not None and mask.directions is not None:
            if self.keeps_error:
                unmasked = self.to_input(residual).flatten(1)
            else:
                unmasked = self._decode_whole(residual, rows, None)
            out = turn(unmasked, out, mask.directions[rows])
        return self._put_in_place(out, residual, spliced)

    def _put_in_place(
        self,
        out: Float[Tensor, "pos d_in"],
        residual: Float[Tensor, "pos *d_in"],
        spliced: Bool[Tensor, "pos"],
    ) -> Float[Tensor, "pos *d_in"]:
        """What is decoded, where the SAE stands, in the residual stream's shape and dtype; elsewhere the latter."""
        out = out.to(residual)
        out = out.view_as(residual)
        spliced = spliced.to(out.device)
        for _ in out.shape[1:]:
            spliced = spliced.unsqueeze(-1)
        return torch.where(spliced, out, residual)

    def _find_unmasked(self, latents: SparseActivations) -> Float[Tensor, "pos d_in"]:
        """What stands in the model's place with nothing masked, in the SAE's dtype."""
        if self.keeps_error:
            before = self.to_input(latents.residual)
            return before.flatten(1)
        return self._decode(latents, None, None)

    def _decode(
        self,
        latents: SparseActivations,
        rows: Int[Tensor, "pos"] | None,
        mask: Mask | None,
    ) -> Float[Tensor, "pos d_in"]:
        """`reconstruct` in the SAE's dtype, at positions where the SAE stands; at others it may be anything."""
        positions = int(latents.spliced.sum())
        activations = self.d_sae * positions
        is_dense = len(latents.ids) > DENSE * activations
        if self.bias is None or is_dense:
            return self._decode_whole(latents.residual, rows, mask)
        return self._decode_entries(latents, rows, mask)

    def _decode_entries(
        self,
        latents: SparseActivations,
        rows: Int[Tensor, "pos"] | None,
        mask: Mask | None,
    ) -> Float[Tensor, "pos d_in"]:
        """`_decode` from the active latents alone: what the decoder's rows add up to."""
        assert self.bias is not None
        values = latents.values
        if mask is not None:
            assert rows is not None
            rows_of_entries = rows.repeat_interleave(latents.counts)
            is_masked = mask.masked[rows_of_entries, latents.ids]
            # Where the error term stays, what is decoded is what the mask takes away.
            is_left_out = ~is_masked if self.keeps_error else is_masked
            values = values.masked_fill(is_left_out, 0)
        decoded = F.embedding_bag(
            latents.ids,
            self.sae.W_dec,
            latents.starts,
            mode="sum",
            per_sample_weights=values,
        )
        if self.keeps_error:
            out = self.to_input(latents.residual) - decoded
        else:
            out = decoded + self.bias
        if mask is None or mask.written is None:
            return out
        assert rows is not None
        return out + mask.written[rows]

    def _decode_whole(
        self,
        residual: Float[Tensor, "pos *d_in"],
        rows: Int[Tensor, "pos"] | None,
        mask: Mask | None,
    ) -> Float[Tensor, "pos d_in"]:
        """`_decode` by the SAE's own encoding and decoding, a chunk of positions at a time."""
        out = []
        for chunk in self._chunks(len(residual)):
            acts = self._encode_whole(residual, chunk)
            if mask is not None:
                assert rows is not None
                replacement = acts.new_zeros(())
                if mask.means is not None:
                    replacement = mask.means.to(acts)
                masked = mask.masked[rows[chunk]]
                acts = torch.where(masked, replacement, acts)
            decoded = self.sae.decode(acts)
            if self.keeps_error:
                # Encoded again: decoding may use up what encoding noted (the norm to go back to).
                acts = self._encode_whole(residual, chunk)
                taken = self.sae.decode(acts) - decoded
                before = residual[chunk.to(residual.device)]
                decoded = before.to(taken).view_as(taken) - taken
            out.append(decoded.flatten(1))
        return torch.cat(out)

    def decoder_vjp(
        self,
        latents: SparseActivations,
        gradient: Float[Tensor, "pos *d_in"],
    ) -> Float[Tensor, "entry"]:
        """The gradient at each entry's activation, from the one at the reconstruction of these latents."""
        gradient = self.to_input(gradient)
        if self.bias is None:
            return self._vjp_whole(latents, gradient)
        positions = latents.entry_positions()
        slopes = [latents.values[:0]]
        parts = zip(positions.split(ENTRIES), latents.ids.split(ENTRIES))
        for where, ids in parts:
            products = gradient[where] * self.sae.W_dec[ids]
            slope = products.sum(-1)
            slopes.append(slope)
        return torch.cat(slopes)

    def _vjp_whole(
        self,
        latents: SparseActivations,
        gradient: Float[Tensor, "pos *d_in"],
    ) -> Float[Tensor, "entry"]:
        """`decoder_vjp` through the SAE's own decoding, a chunk of positions at a time."""
        positions = latents.entry_positions()
        slopes = [latents.values[:0]]
        for chunk in self._chunks(len(gradient)):
            with torch.no_grad():
                acts = self._encode_whole(latents.residual, chunk)
            acts.requires_grad_()
            with torch.enable_grad():
                decoded = self.sae.decode(acts)
            pull = gradient[chunk].view_as(decoded)
            (slope,) = torch.autograd.grad(decoded, acts, pull)
            first = chunk[0]
            is_inside = (positions >= first) & (positions <= chunk[-1])
            rows = positions[is_inside] - first
            ids = latents.ids[is_inside]
            slopes.append(slope[rows, ids])
        return torch.cat(slopes)
