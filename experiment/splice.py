"""The SAE in the model: its active latents, masks on them, and what stands in the model's place afterwards.

Knows nothing of files, options or questions.

Of a JumpReLU SAE's 131,072 latents about 120 are active at a position. So activations are kept as entries (position,
latent, value): a mask drops entries, and decoding adds up the decoder's rows of those that are left. The result is
`sae.decode(sae.encode(x))` to the order of summation. SAEs whose decoding is more than `acts @ W_dec + bias`, SAEs in
half precision, and activations that are not sparse are encoded and decoded whole, a chunk of positions at a time.
"""

import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F

CHUNK_BYTES = 2**29  # of one [position, d_sae] tensor; encoding holds about three of them
CHUNK_POSITIONS = 1024  # at most: on a CPU a small SAE's chunk then fits into the cache
MOST_ENTRIES = 2**27  # 28 bytes each while they are decoded: 3.8 GB
FEW_ENTRIES = 2**20  # never too many
DENSE = 1 / 16  # of the latents active: from there on matrix products are the faster way


@dataclass(frozen=True)
class Latents:
    """The active latents at a row of positions, and the residual stream there.

    residual: [pos, d_in], or [pos, head, d_head] at `hook_z`.  spliced: [pos], False where the SAE does not stand:
    at padding, and at special tokens that bypass it.  ids, values: [entry], position by position.  counts: [pos], how
    many entries each position has.  Without entries (None) only the residual is known, and is encoded when needed.
    """

    residual: torch.Tensor
    spliced: torch.Tensor
    ids: torch.Tensor | None = None
    values: torch.Tensor | None = None
    counts: torch.Tensor | None = None

    def take(self, positions):
        """The Latents at these positions [n], which may repeat."""
        residual, spliced = self.residual[positions], self.spliced[positions]
        if self.counts is None:
            return Latents(residual, spliced)
        counts = self.counts[positions]
        starts = (self.counts.cumsum(0) - self.counts)[positions]
        shift = starts - (counts.cumsum(0) - counts)  # from where an entry stands here to where it stood
        entries = torch.arange(int(counts.sum()), device=counts.device) + shift.repeat_interleave(counts)
        return Latents(residual, spliced, self.ids[entries], self.values[entries], counts)

    def first(self, n):
        """The Latents at the first n positions. Views: nothing is copied."""
        entries = int(self.counts[:n].sum())
        return Latents(self.residual[:n], self.spliced[:n], self.ids[:entries], self.values[:entries], self.counts[:n])

    def entry_positions(self):
        """The position of each entry, [entry]."""
        return torch.arange(len(self.counts), device=self.counts.device).repeat_interleave(self.counts)

    def mean(self, d_sae, values=None):
        """The mean of each latent's activation (or of other `values`, [entry]) over the spliced positions, [d_sae].

        In double precision, so that the order in which a GPU adds up does not show.
        """
        values = self.values if values is None else values
        total = torch.zeros(d_sae, dtype=torch.float64, device=values.device).index_add(0, self.ids, values.double())
        return (total / self.spliced.sum()).float()

    def active_at_the_end(self):
        """The latents that are active at the last spliced position, ascending."""
        upto = self.first(int(self.spliced.nonzero()[-1]) + 1)
        return upto.ids[len(upto.ids) - int(upto.counts[-1]) :].sort().values.tolist()


def join(parts):
    """Several Latents as one, their positions one after the other."""
    fields = [[getattr(part, name) for part in parts] for name in ("residual", "spliced", "ids", "values", "counts")]
    sparse = all(part.counts is not None for part in parts)
    return Latents(*(torch.cat(field) for field in fields[: 5 if sparse else 2]))


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
    """

    def __init__(self, sae, error_term="drop", bypass=()):
        self.sae, self.keeps_error = sae, error_term == "keep"
        self.d_sae, self.device = sae.cfg.d_sae, sae.W_dec.device
        self.bypass = torch.tensor(bypass, dtype=torch.long, device=self.device)
        self.chunk = max(1, min(CHUNK_POSITIONS, CHUNK_BYTES // (self.d_sae * sae.W_dec.element_size())))
        with torch.no_grad():
            self.bias = self._bias()

    def _bias(self):
        """What is added to `acts @ W_dec`, [d_in]; None where decoding is not that."""
        config = self.sae.cfg
        at_run_time = config.normalize_activations not in ("none", "expected_average_only_in")
        if at_run_time or config.reshape_activations != "none" or self.sae.W_dec.dtype != torch.float32:
            return None
        acts = torch.zeros(2, self.d_sae, device=self.device)
        acts[1, :: max(1, self.d_sae // 50)] = 1.0
        bias, decoded = self.sae.decode(acts)
        same = torch.allclose(decoded, acts[1] @ self.sae.W_dec + bias, rtol=1e-3, atol=1e-4)
        return bias if same else None

    def mask(self, latents, means=None):
        """A Mask from one list of latents a row. means: as in Mask."""
        masked = torch.zeros(len(latents), self.d_sae, dtype=torch.bool, device=self.device)
        for row, ids in enumerate(latents):
            masked[row, ids] = True
        written = None
        if means is not None and self.bias is not None:
            written = torch.stack([means[ids] @ self.sae.W_dec[ids] for ids in latents])
        return Mask(masked, means, written)

    def read(self, residual):
        """What the SAE reads, [pos, d_in], in its dtype.

        Some SAEs for `hook_z` say in their configuration that they put the heads side by side themselves; Gemma
        Scope 2's do not.
        """
        residual = residual.to(self.device, self.sae.dtype)
        return residual if self.sae.cfg.reshape_activations == "hook_z" else residual.flatten(1)

    @torch.no_grad()
    def encode(self, residual, spliced, limited=True):
        """The Latents at positions: residual [pos, d_in], spliced [pos].

        limited: give up on entries where they are too many for a whole batch.
        """
        residual = residual.detach()
        spliced = spliced.to(self.device)
        positions = spliced.nonzero().flatten()
        most = min(MOST_ENTRIES, max(FEW_ENTRIES, DENSE * self.d_sae * len(positions))) if limited else float("inf")
        if limited and self.bias is None:
            return Latents(residual, spliced)
        ids, values, counts = [], [], torch.zeros(len(spliced), dtype=torch.long, device=self.device)
        for chunk in positions.split(self.chunk):
            acts = self.sae.encode(self.read(residual[chunk.to(residual.device)]))  # [chunk, d_sae]
            where, active = acts.nonzero(as_tuple=True)
            ids.append(active)
            values.append(acts[where, active])
            counts[chunk] = torch.bincount(where, minlength=len(chunk))
            if sum(map(len, ids)) > most:
                return Latents(residual, spliced)
        if not ids:
            return Latents(residual, spliced, counts[:0], self.sae.W_dec[:0, 0], counts)
        return Latents(residual, spliced, torch.cat(ids), torch.cat(values), counts)

    def with_entries(self, latents):
        """The same Latents, encoded where they have no entries yet: for a few positions these always fit."""
        return latents if latents.counts is not None else self.encode(latents.residual, latents.spliced, limited=False)

    @torch.no_grad()
    def reconstruct(self, latents, rows=None, mask=None):
        """What stands in the model's place, like latents.residual in shape and dtype.

        mask: a Mask or None.  rows: [pos], the row of the mask that each position belongs to.
        """
        if latents.counts is None or self.bias is None:
            out = self._reconstruct_whole(latents, rows, mask)
        else:
            out = self._reconstruct_from_entries(latents, rows, mask)
        out = out.to(latents.residual).view_as(latents.residual)
        spliced = latents.spliced.to(out.device).view(-1, *[1] * (out.dim() - 1))
        return torch.where(spliced, out, latents.residual)

    def _reconstruct_from_entries(self, latents, rows, mask):
        values = latents.values
        if mask is not None:
            dropped = mask.masked[rows.repeat_interleave(latents.counts), latents.ids]  # [entry]
            values = values.masked_fill(~dropped if self.keeps_error else dropped, 0)
        elif self.keeps_error:
            return latents.residual
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
            masked = self.sae.decode(acts)
            if self.keeps_error:
                # Encoded again: decoding may use up what encoding noted (the norm to go back to).
                whole = self.sae.decode(self.sae.encode(self.read(residual)))
                masked = residual.to(masked).view_as(masked) + (masked - whole)
            out.append(masked.to(latents.residual).view_as(residual))
        return torch.cat(out)

    def pull_back(self, latents, gradient):
        """The gradient at each entry's activation, [entry], from the one at the reconstruction, [pos, d_in]."""
        gradient, slopes = self.read(gradient), []
        if self.bias is not None:
            for positions, ids in zip(latents.entry_positions().split(8192), latents.ids.split(8192)):
                slopes.append((gradient[positions] * self.sae.W_dec[ids]).sum(-1))
            return torch.cat([*slopes, gradient[:0, 0]])
        for chunk in torch.arange(len(gradient), device=self.device).split(self.chunk):
            with torch.no_grad():
                acts = self.sae.encode(self.read(latents.residual[chunk.to(latents.residual.device)]))
            with torch.enable_grad():
                decoded = self.sae.decode(acts.requires_grad_())
            (slope,) = torch.autograd.grad(decoded, acts, gradient[chunk].view_as(decoded))
            part = latents.take(chunk)
            slopes.append(slope[part.entry_positions(), part.ids])
        return torch.cat(slopes)

    @torch.no_grad()
    def removed(self, latents, *lists):
        """What masking the first 1, 2, ... of each list's latents takes away, over the norm of the residual stream.

        The norm of `A_S W_dec[S]` over all positions; the squares of all prefixes S stand on the diagonal of a
        cumulative sum of (A^T A) * (W W^T). Returns a list of numbers for each list of latents.
        """
        ids = torch.tensor([latent for ids in lists for latent in ids], dtype=torch.long, device=self.device)
        distinct, column = ids.unique(return_inverse=True)  # column: [in lists], where each latent stands in `distinct`
        places = torch.full((self.d_sae,), -1, device=self.device)
        places[distinct] = torch.arange(len(distinct), device=self.device)
        places = places[latents.ids]
        acts = torch.zeros(len(latents.counts), len(distinct), device=self.device)  # [pos, distinct]
        acts[latents.entry_positions()[places >= 0], places[places >= 0]] = latents.values[places >= 0].float()
        rows, norm = self.sae.W_dec[distinct].float(), self.read(latents.residual)[latents.spliced].float().norm()
        products, found = (acts.T @ acts) * (rows @ rows.T), []
        for part in column.split([len(ids) for ids in lists]):
            squares = products[part][:, part].cumsum(0).cumsum(1).diagonal()
            found.append((squares.clamp(min=0).sqrt() / norm).tolist())
        return found


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
