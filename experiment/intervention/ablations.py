"""Which latents are masked, and what takes their place: for questions as lists, for a batch's rows as tensors.

Knows a decoder, and nothing else of SAEs.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from experiment.intervention.sparse import ENTRIES


@dataclass(frozen=True)
class Ablation:
    """What one mask ablates: lists with an item per question.

    latents: the ids of those that are masked.  keep_only: all others are masked instead.  seeds: what is taken away is
    a vector of the same size in a direction drawn from the question's seed (`turn`); None: what the masked latents
    write.
    """

    latents: list[list[int]]
    keep_only: bool = False
    seeds: list[str] | None = None

    def take(self, questions: Sequence[int]) -> "Ablation":
        """The ablation of these questions, which are numbers of items."""
        latents = [self.latents[question] for question in questions]
        seeds = self.seeds
        if seeds is not None:
            seeds = [seeds[question] for question in questions]
        return Ablation(latents, self.keep_only, seeds)


@dataclass(frozen=True)
class Mask:
    """Latents to ablate, for each row of a batch.

    masked: True at those.  means: what they are set to; None: zero.  written: what they write at their means; None
    where that is nothing, or is decoded with all else.  directions: a vector per row, for `turn`; zero: this row's
    masked latents are taken away themselves, as with None all rows' are.
    """

    masked: Bool[Tensor, "row d_sae"]
    means: Float[Tensor, "d_sae"] | None = None
    written: Float[Tensor, "row d_in"] | None = None
    directions: Float[Tensor, "row d_in"] | None = None

    def take(self, rows: Int[Tensor, "taken"]) -> "Mask":
        """The mask of these rows, which are numbers on any device."""
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
        """The rows of several masks (one at least) one after the other.

        Means are the same of all of them, or of none; directions of any.
        """
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


def build_mask(
    ablation: Ablation,
    decoder: Float[Tensor, "d_sae d_in"],
    means: Float[Tensor, "d_sae"] | None = None,
    adds_up_rows: bool = True,
) -> Mask:
    """A mask on the decoder's device, with a row per item of the ablation.

    means: as in Mask.  adds_up_rows: whether decoding is `acts @ decoder + bias`, so that what latents at their means
    write is known beforehand.
    """
    device = decoder.device
    count = len(ablation.latents)
    d_sae, d_in = decoder.shape
    flat = []
    numbers = []
    for number, of_row in enumerate(ablation.latents):
        flat += of_row
        numbers += [number] * len(of_row)
    # One upload of each: every one makes the device wait.
    latents = torch.tensor(flat, dtype=torch.long).to(device)
    rows = torch.tensor(numbers, dtype=torch.long).to(device)
    masked = torch.zeros(count, d_sae, dtype=torch.bool, device=device)
    masked[rows, latents] = True
    if ablation.keep_only:
        masked = ~masked
    written = None
    if means is not None and adds_up_rows:
        activations = means.to(decoder)
        written = _add_up_rows(decoder, activations, rows, latents, count)
        if ablation.keep_only:
            of_all = activations @ decoder
            written = of_all - written
    directions = None
    if ablation.seeds is not None:
        drawn = draw_directions(ablation.seeds, d_in)
        directions = drawn.to(device)
    return Mask(masked, means, written, directions)


def _add_up_rows(
    decoder: Float[Tensor, "d_sae d_in"],
    activations: Float[Tensor, "d_sae"],
    rows: Int[Tensor, "listed"],
    latents: Int[Tensor, "listed"],
    count: int,
) -> Float[Tensor, "row d_in"]:
    """What these latents write at these activations, added up for each of `count` rows."""
    written = decoder.new_zeros(count, decoder.shape[1])
    parts = zip(rows.split(ENTRIES), latents.split(ENTRIES))
    for some_rows, some in parts:
        sizes = activations[some].unsqueeze(1)
        written.index_add_(0, some_rows, sizes * decoder[some])
    return written


def draw_directions(seeds: Sequence[str], d_in: int) -> Float[Tensor, "row d_in"]:
    """A vector of standard normal numbers for each seed, on the CPU: the same for every device and in every batch."""
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
    """The dot product at each position."""
    products = left * right
    return products.sum(1, keepdim=True)
