"""Activations of which few are not zero, kept as entries. Knows nothing of SAEs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

ENTRIES = 8192  # of which rows of the decoder are in memory at once


@dataclass(frozen=True)
class SparseActivations:
    """The active latents at positions, in any order, and the residual stream there.

    residual: with heads and d_head instead of d_in at `hook_z`.  spliced: False where the SAE does not stand: at
    padding, and at special tokens that bypass it.  ids, values: an entry per active latent, position by position.
    counts: how many entries each position has.
    """

    residual: Float[Tensor, "pos *d_in"]
    spliced: Bool[Tensor, "pos"]
    ids: Int[Tensor, "entry"]
    values: Float[Tensor, "entry"]
    counts: Int[Tensor, "pos"]

    @property
    def starts(self) -> Int[Tensor, "pos"]:
        """How many entries stand before each position's."""
        return self.counts.cumsum(0) - self.counts

    def take(self, positions: Int[Tensor, "taken"]) -> "SparseActivations":
        """The activations at these positions, which may repeat."""
        counts = self.counts[positions]
        starts = counts.cumsum(0) - counts
        shift = self.starts[positions] - starts  # from where an entry stands here to where it stood
        count = int(counts.sum())
        entries = torch.arange(count, device=counts.device)
        entries = entries + shift.repeat_interleave(counts)
        residual = self.residual[positions.to(self.residual.device)]
        return SparseActivations(
            residual=residual,
            spliced=self.spliced[positions],
            ids=self.ids[entries],
            values=self.values[entries],
            counts=counts,
        )

    def every_position(self) -> Int[Tensor, "pos"]:
        """The number of each position: 0, 1, ..."""
        return torch.arange(len(self.counts), device=self.counts.device)

    def entry_positions(self) -> Int[Tensor, "entry"]:
        """The position of each entry."""
        return self.every_position().repeat_interleave(self.counts)


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
