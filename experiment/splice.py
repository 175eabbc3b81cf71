"""The SAE in the model: its active latents, masks on them, and what stands in the model's place afterwards.

Knows nothing of files, options or questions.

Of a JumpReLU SAE's 131,072 latents about 120 are active at a position. So activations are kept as entries (position,
latent, value): a mask drops entries, and decoding adds up the decoder's rows of those that are left. The result is
`sae.decode(sae.encode(x))` to the order of summation. SAEs whose decoding is more than `acts @ W_dec + bias`, and
activations that are not sparse, are encoded and decoded whole, a chunk of positions at a time.
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

CHUNK_BYTES = 2**29  # of one [position, d_sae] tensor; encoding holds about three of them
CHUNK_POSITIONS = 1024  # at most: on a CPU a small SAE's chunk then fits into the cache
DENSE = 1 / 16  # of the latents active: from there on matrix products are the faster way


@dataclass(frozen=True)
class Latents:
    """The active latents at a row of positions, and the residual stream there.

    residual: [pos, d_in], or [pos, head, d_head] at `hook_z`.  spliced: [pos], False where the SAE does not stand:
    at padding, and at special tokens that bypass it.  ids, values: [entry], position by position.  counts: [pos], how
    many entries each position has.
    """

    residual: torch.Tensor
    spliced: torch.Tensor
    ids: torch.Tensor
    values: torch.Tensor
    counts: torch.Tensor

    def take(self, positions):
        """The Latents at these positions [n], which may repeat."""
        counts = self.counts[positions]
        starts = (self.counts.cumsum(0) - self.counts)[positions]
        shift = starts - (counts.cumsum(0) - counts)  # from where an entry stands here to where it stood
        entries = torch.arange(int(counts.sum()), device=counts.device) + shift.repeat_interleave(counts)
        residual = self.residual[positions.to(self.residual.device)]
        return Latents(residual, self.spliced[positions], self.ids[entries], self.values[entries], counts)

    def entry_positions(self):
        """The position of each entry, [entry]."""
        return torch.arange(len(self.counts), device=self.counts.device).repeat_interleave(self.counts)


def join(parts):
    """Several Latents as one, their positions one after the other."""
    names = ("residual", "spliced", "ids", "values", "counts")
    return Latents(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class Mask:
    """Latents to ablate: masked [row, d_sae] says which for each row of a batch; means [d_sae]: what they are set to,
    None for zero; written [row, d_in]: what latents at their means write, None for zero."""

    masked: torch.Tensor
    means: torch.Tensor | None = None
    written: torch.Tensor | None = None

    def take(self, rows):
        rows = rows.to(self.masked.device)
        return Mask(self.masked[rows], self.means, None if self.written is None else self.written[rows])


class Splice:
    """An SAE, and how it stands in the model.

    error_term: "drop", as in the paper: the reconstruction alone; "keep": what the SAE does not explain stays, so the
    place keeps its own value less what the masked latents wrote.  bypass: ids of tokens at which it does not stand.

    writes_rows: whether what a latent writes is its activation times its row of W_dec, at every position alike.
    """

    def __init__(self, sae, error_term="drop", bypass=()):
        self.sae, self.keeps_error = sae, error_term == "keep"
        self.d_sae, self.device = sae.cfg.d_sae, sae.W_dec.device
        self.bypass = torch.tensor(bypass, dtype=torch.long, device=self.device)
        self.chunk = max(1, min(CHUNK_POSITIONS, CHUNK_BYTES // (self.d_sae * sae.W_dec.element_size())))
        with torch.no_grad():
            self.bias = self._find_bias()
        self.writes_rows = self.bias is not None or (sae.cfg.reshape_activations != "none" and not self._normalizes())

    def _normalizes(self) -> bool:
        """Whether the SAE brings each position to a size of its own first, and what it decodes back to the old one."""
        return self.sae.cfg.normalize_activations not in ("none", "expected_average_only_in")

    def _find_bias(self):
        """What is added to `acts @ W_dec`, [d_in]; None where decoding is not that."""
        config, decoder = self.sae.cfg, self.sae.W_dec
        if self._normalizes() or config.reshape_activations != "none":
            return None
        acts = torch.zeros(2, self.d_sae, device=self.device, dtype=decoder.dtype)
        acts[1, :: max(1, self.d_sae // 50)] = 1.0
        bias, decoded = self.sae.decode(acts)
        error, size = (decoded - acts[1] @ decoder - bias).abs().max(), decoded.abs().max()
        return bias if error <= torch.finfo(decoder.dtype).eps ** 0.5 * size else None

    def mask(self, latents: list[list[int]], means: Float[Tensor, " d_sae"] | None = None) -> Mask:
        """A Mask from one list of latents per row, which go to the device all at once. means: as in Mask."""
        counts = torch.tensor([len(ids) for ids in latents])
        rows = torch.arange(len(latents)).repeat_interleave(counts)
        ids = torch.tensor(list(itertools.chain.from_iterable(latents)), dtype=torch.long)
        rows, ids = torch.stack([rows, ids]).to(self.device)
        masked = torch.zeros(len(latents), self.d_sae, dtype=torch.bool, device=self.device)
        masked[rows, ids] = True
        if means is None or self.bias is None:
            return Mask(masked, means)
        starts = (counts.cumsum(0) - counts).to(self.device)
        values = means[ids].to(self.sae.W_dec)
        written = F.embedding_bag(ids, self.sae.W_dec, starts, mode="sum", per_sample_weights=values)
        return Mask(masked, means, written)

    def read(self, residual):
        """What the SAE reads, [pos, d_in], in its dtype.

        Some SAEs for `hook_z` say in their configuration that they put the heads side by side themselves; Gemma
        Scope 2's do not.
        """
        residual = residual.to(self.device, self.sae.dtype)
        return residual if self.sae.cfg.reshape_activations == "hook_z" else residual.flatten(1)

    @torch.no_grad()
    def encode(self, residual, spliced):
        """The Latents at positions: residual [pos, d_in], spliced [pos]."""
        spliced = spliced.to(self.device)
        positions = spliced.nonzero().flatten()
        counts = torch.zeros(len(spliced), dtype=torch.long, device=self.device)
        ids, values = [counts[:0]], [self.sae.W_dec[:0, 0]]
        for chunk in positions.split(self.chunk):
            acts = self.sae.encode(self.read(residual[chunk.to(residual.device)]))  # [chunk, d_sae]
            where, active = acts.nonzero(as_tuple=True)
            ids.append(active)
            values.append(acts[where, active])
            counts[chunk] = torch.bincount(where, minlength=len(chunk))
        return Latents(residual.detach(), spliced, torch.cat(ids), torch.cat(values), counts)

    @torch.no_grad()
    def reconstruct(self, latents, rows=None, mask=None):
        """What stands in the model's place, like latents.residual in shape and dtype.

        mask: a Mask or None.  rows: [pos], the row of the mask that each position belongs to.
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

    def _reconstruct_from_entries(self, latents, rows, mask):
        values = latents.values
        if mask is not None:
            masked = mask.masked[rows.repeat_interleave(latents.counts), latents.ids]  # [entry]
            values = values.masked_fill(~masked if self.keeps_error else masked, 0)
        starts = latents.counts.cumsum(0) - latents.counts
        out = F.embedding_bag(latents.ids, self.sae.W_dec, starts, mode="sum", per_sample_weights=values)
        out = self.read(latents.residual) - out if self.keeps_error else out + self.bias
        return out if mask is None or mask.written is None else out + mask.written[rows]

    def _reconstruct_whole(self, latents, rows, mask):
        out = []
        for chunk in torch.arange(len(latents.residual), device=self.device).split(self.chunk):
            residual = latents.residual[chunk.to(latents.residual.device)]
            acts = self.sae.encode(self.read(residual))
            if mask is not None:
                replacement = acts.new_zeros(()) if mask.means is None else mask.means.to(acts)
                acts = torch.where(mask.masked[rows[chunk]], replacement, acts)
            decoded = self.sae.decode(acts)
            if self.keeps_error:
                # Encoded again: decoding may use up what encoding noted (the norm to go back to).
                whole = self.sae.decode(self.sae.encode(self.read(residual)))
                decoded = residual.to(decoded).view_as(decoded) + (decoded - whole)
            out.append(decoded.to(latents.residual).view_as(residual))
        return torch.cat(out)

    def pull_back(self, latents, gradient):
        """The gradient at each entry's activation, [entry], from the one at the reconstruction, [pos, d_in]."""
        gradient, slopes, positions = self.read(gradient), [latents.values[:0]], latents.entry_positions()
        if self.bias is not None:
            for where, ids in zip(positions.split(8192), latents.ids.split(8192)):
                slopes.append((gradient[where] * self.sae.W_dec[ids]).sum(-1))
            return torch.cat(slopes)
        for chunk in torch.arange(len(gradient), device=self.device).split(self.chunk):
            with torch.no_grad():
                acts = self.sae.encode(self.read(latents.residual[chunk.to(latents.residual.device)]))
            with torch.enable_grad():
                decoded = self.sae.decode(acts.requires_grad_())
            (slope,) = torch.autograd.grad(decoded, acts, gradient[chunk].view_as(decoded))
            inside = (positions >= chunk[0]) & (positions <= chunk[-1])
            slopes.append(slope[positions[inside] - chunk[0], latents.ids[inside]])
        return torch.cat(slopes)
