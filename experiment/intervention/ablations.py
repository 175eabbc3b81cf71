"""Which latents are masked, and what takes their place: for questions as lists, for a batch's rows as tensors."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Ablation:
    """What one mask ablates: lists with an item per question.

    latents: those that are masked.  keep_only: all others are masked instead.  directions: a seed; what is taken away
    is then a vector of the same size in a direction drawn from it (`turn`). None: what the masked latents write.
    """

    latents: list[list[int]]
    keep_only: bool = False
    directions: list[str] | None = None

    def take(self, questions: Sequence[int]) -> "Ablation":
        """The same of these questions."""
        latents = [self.latents[question] for question in questions]
        if self.directions is None:
            return Ablation(latents, self.keep_only)
        directions = [self.directions[question] for question in questions]
        return Ablation(latents, self.keep_only, directions)


@dataclass(frozen=True)
class Mask:
    """Latents to ablate, for each row of a batch.

    means: what they are set to; None: zero.  written: what latents at their means write; None: nothing.  directions: a
    vector per row, for `turn`; zero: this row's masked latents are taken away themselves, as with None all rows' are.
    """

    masked: Bool[Tensor, "row d_sae"]
    means: Float[Tensor, "d_sae"] | None = None
    written: Float[Tensor, "row d_in"] | None = None
    directions: Float[Tensor, "row d_in"] | None = None

    def take(self, rows: Int[Tensor, "taken"]) -> "Mask":
        """The mask of these rows."""
        rows = rows.to(self.masked.device)
        masked = self.masked[rows]
        written = self.written
        if written is not None:
            written = written[rows]
        directions = self.directions
        if directions is not None:
            directions = directions[rows]
        return Mask(masked, self.means, written, directions)

    @staticmethod
    def join(masks: Sequence["Mask"]) -> "Mask":
        """The rows of several masks one after the other. Means are of all of them or of none; directions of any."""
        masked = []
        written = []
        for mask in masks:
            masked.append(mask.masked)
            if mask.written is not None:
                written.append(mask.written)
        return Mask(
            masked=torch.cat(masked),
            means=masks[0].means,
            written=torch.cat(written) if written else None,
            directions=_join_directions(masks),
        )


def _join_directions(masks: Sequence[Mask]) -> Float[Tensor, "row d_in"] | None:
    """The directions of all rows; zero for those of masks without any."""
    drawn = [mask.directions for mask in masks if mask.directions is not None]
    if not drawn:
        return None
    d_in = drawn[0].shape[1]
    directions = []
    for mask in masks:
        of_mask = mask.directions
        if of_mask is None:
            rows = len(mask.masked)
            of_mask = drawn[0].new_zeros(rows, d_in)
        directions.append(of_mask)
    return torch.cat(directions)


def draw_directions(seeds: Sequence[str], d_in: int) -> Float[Tensor, "row d_in"]:
    """A normal vector for each seed, the same on every device and in every batch."""
    drawn = torch.empty(len(seeds), d_in)
    generator = torch.Generator()
    for row, seed in zip(drawn, seeds):
        text = seed.encode()
        digest = hashlib.sha256(text).digest()
        number = int.from_bytes(digest[:8], "big")
        generator.manual_seed(number)
        row.normal_(generator=generator)
    return drawn


def turn(
    unmasked: Float[Tensor, "pos d_in"],
    masked: Float[Tensor, "pos d_in"],
    directions: Float[Tensor, "pos d_in"],
) -> Float[Tensor, "pos d_in"]:
    """What stands at positions where as much is taken away as by masking, in another direction.

    unmasked, masked: what stands there without the mask, and with it.  directions: a vector per position; where it is
    zero, `masked` stays.
    With x what stands there unmasked and r what the mask takes away, c = r . x/|x| is r's part along x. Taken away is
    c x/|x| + sqrt(|r|^2 - c^2) u, u being the direction made orthogonal to x and of length 1: a vector of r's length
    with r's part along x. Computed in single precision at least.
    """
    x = unmasked.float()
    r = x - masked.float()
    along_x = F.normalize(x, dim=1)  # zero where x is
    part = _dot(r, along_x) * along_x
    rest = r - part
    size = rest.norm(dim=1, keepdim=True)  # sqrt(|r|^2 - c^2)
    across = directions - _dot(directions, along_x) * along_x
    u = F.normalize(across, dim=1)
    turned = x - part - size * u
    is_turned = directions.any(1, keepdim=True)
    return torch.where(is_turned, turned.to(masked), masked)


def _dot(left: Float[Tensor, "pos d_in"], right: Float[Tensor, "pos d_in"]) -> Float[Tensor, "pos 1"]:
    return (left * right).sum(1, keepdim=True)
