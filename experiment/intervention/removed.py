"""What masks take away from the residual stream. Tensors: knows nothing of files, options or questions."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from experiment.intervention.sparse import SparseActivations
from experiment.intervention.splice import Splice


def removed_shares(
    splice: Splice,
    latents: list[SparseActivations],
    lists: list[list[int]],
    means: Float[Tensor, "d_sae"] | None = None,
) -> list[list[float]]:
    """`removed_share` of a list of latents for each sequence, rounded.

    latents: of each sequence, at the positions that count.  lists: of each sequence.  means: as of `removed_share`.
    """
    flat: list[int] = []
    lengths = []
    for ids in lists:
        flat += ids
        lengths.append(len(ids))
    # One upload and one download for all of them: each makes the device wait.
    together = torch.tensor(flat, dtype=torch.long, device=splice.device)
    shares = []
    for of_sequence, of_list in zip(latents, together.split(lengths)):
        share = removed_share(splice, of_sequence, of_list, means)
        shares.append(share)
    downloaded = torch.cat(shares).cpu()
    of_lists = []
    for of_list in downloaded.split(lengths):
        rounded = [round_to_four(share) for share in of_list.tolist()]
        of_lists.append(rounded)
    return of_lists


def round_to_four(value: float) -> float:
    """A number in four significant digits, for files of a readable size."""
    return float(f"{value:.4g}")


@torch.no_grad()
def removed_share(
    splice: Splice,
    latents: SparseActivations,
    ids: Int[Tensor, "list"],
    means: Float[Tensor, "d_sae"] | None = None,
) -> Float[Tensor, "list"]:
    """What masking the first 1, 2, ... of these latents takes away: the share of each position's own norm, and of these
    shares the mean over the positions, so that no position of a large norm rules it. 0 without any position.

    latents: at the positions that count.  ids: a list of latents, in the order in which they are masked.  means: what
    masked latents are set to, None for zero; then what counts is the change, also where a latent was not active.
    """
    changes = values_of(latents, ids, splice.d_sae)
    if means is not None:
        changes = changes - means[ids].float()
    rows = splice.sae.W_dec[ids].float()
    norms = norms_of_first(changes, rows)
    residual = latents.residual.to(splice.device).flatten(1)
    own = residual.float().norm(dim=1)
    is_there = own > 0  # nothing can be taken away from a position that is zero
    norms = norms[is_there]
    own = own[is_there]
    shares = norms / own.unsqueeze(1)
    count = max(1, len(shares))
    return shares.sum(0) / count


def values_of(
    latents: SparseActivations,
    ids: Int[Tensor, "list"],
    d_sae: int,
) -> Float[Tensor, "pos list"]:
    """The activation of each listed latent at each position, 0 where it is not active."""
    device = ids.device
    places = torch.full((d_sae,), -1, device=device)  # of each latent in the list
    places[ids] = torch.arange(len(ids), device=device)
    place = places[latents.ids]  # [entry]
    is_listed = place >= 0
    columns = place[is_listed]
    positions = latents.entry_positions()
    rows = positions[is_listed]
    found = latents.values[is_listed]
    values = torch.zeros(
        len(latents.counts),
        len(ids),
        device=device,
    )
    values[rows, columns] = found.float()
    return values


def norms_of_first(
    changes: Float[Tensor, "pos list"],
    rows: Float[Tensor, "list d_in"],
) -> Float[Tensor, "pos list"]:
    """The norm of what the first 1, 2, ... latents write at each position: `changes[:, :n] @ rows[:n]` for each n.

    With the nth latent its square grows by a_n * (2 * (a_1 g_n1 + ... + a_(n-1) g_n(n-1)) + a_n g_nn), where a are the
    changes at the position and g the products of the rows.
    """
    products = rows @ rows.T  # [list, list]
    own = products.diag().diag()
    weights = 2 * products.tril() - own
    growth = changes * (changes @ weights.T)
    squares = growth.cumsum(1)
    squares = squares.clamp(min=0)  # rounding may leave a little less than nothing
    return squares.sqrt()
