"""Batches of sequences: what they begin with alike, padding, and gaps. Knows nothing of models."""

import os
from collections.abc import Hashable, Sequence
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor


def pad(
    sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device | str, side: Literal["left", "right"]
) -> tuple[Int[Tensor, "row pos"], Int[Tensor, "row pos"]]:
    """Token ids and attention mask, 1 at tokens and 0 at padding, which stands on one side of every row."""
    length = max(map(len, sequences))
    ids = torch.full((len(sequences), length), pad_id)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        first = length - len(sequence) if side == "left" else 0
        ids[row, first : first + len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, first : first + len(sequence)] = 1
    return ids.to(device), mask.to(device)


def find_shared(
    sequences: list[list[int]], limits: list[int], contexts: Sequence[Hashable]
) -> tuple[list[list[int]], list[int]]:
    """What the sequences of each context begin with: a list of prefixes, and for each sequence the index of its own.

    limits: how much of each sequence may be in a prefix, at least 1 less than its length. Prefixes are cut so that
    about as much is left of all sequences: padding costs what it costs in a batch without prefixes.
    """
    groups: dict[Hashable, list[int]] = {}
    for row, (key, sequence) in enumerate(zip(contexts, sequences)):
        groups.setdefault((key, sequence[0]), []).append(row)  # those that begin alike, so that no prefix is empty
    shared = []
    longest_rests = []
    for rows in groups.values():
        of_group = [sequences[row] for row in rows]
        length = min(len(os.path.commonprefix(of_group)), *(limits[row] for row in rows))
        shared.append(length)
        if len(rows) > 1:
            longest_rests.append(max(map(len, of_group)) - length)
    left = max(longest_rests, default=max(map(len, sequences)))
    prefixes = []
    owners = [0] * len(sequences)
    for number, (rows, length) in enumerate(zip(groups.values(), shared)):
        longest = max((sequences[row] for row in rows), key=len)
        prefixes.append(longest[: max(1, min(length, len(longest) - left))])
        for row in rows:
            owners[row] = number
    return prefixes, owners


class Layout:
    """A batch of sequences on the device, in two parts: shared prefixes, and the rest of each sequence.

    Prefixes are padded on the right, where padding has a token to look back at. Rests are padded on the left: every
    row's next token stands at the same place.

    prefix_ids, prefix_mask: [context, prefix]; rest_ids: [row, rest]; owners: [row], each one's prefix. Without
    prefixes that part is 0 positions wide.
    ids, attention, places: [row, prefix + rest]; places says where each position stands among all the prefixes' and
    then all the rests' positions, which is the order in which they are run.
    """

    def __init__(
        self,
        sequences: list[list[int]],
        pad_id: int,
        device: torch.device | str,
        prefixes: Sequence[Sequence[int]] = ((),),
        owners: list[int] | None = None,
    ):
        owners = [0] * len(sequences) if owners is None else owners
        rests = [sequence[len(prefixes[owner]) :] for owner, sequence in zip(owners, sequences)]
        self.prefix_ids, self.prefix_mask = pad(prefixes, pad_id, device, "right")
        self.rest_ids, self.rest_mask = pad(rests, pad_id, device, "left")
        self.owners = torch.tensor(owners, device=device)
        self.ids = torch.cat([self.prefix_ids[self.owners], self.rest_ids], 1)
        self.attention = torch.cat([self.prefix_mask[self.owners], self.rest_mask], 1)
        of_prefixes = torch.arange(self.prefix_ids.numel(), device=device).view_as(self.prefix_ids)
        of_rests = torch.arange(self.rest_ids.numel(), device=device).view_as(self.rest_ids)
        self.places = torch.cat([of_prefixes[self.owners], of_rests + self.prefix_ids.numel()], 1)

    def parts(self) -> list[tuple[Int[Tensor, "row pos"], Int[Tensor, "row pos"]]]:
        """Ids and mask of the prefixes, where there are any, and of the rests."""
        of_rests = [(self.rest_ids, self.rest_mask)]
        if not self.prefix_ids.shape[1]:
            return of_rests
        return [(self.prefix_ids, self.prefix_mask), *of_rests]


def close_gaps(attention: Int[Tensor, "row pos"]) -> tuple[Int[Tensor, "row left"], Int[Tensor, "row left"]]:
    """The columns of each row's tokens, in their order at the right end of as many columns as the longest row has.

    Returns them, some column of padding in front, and the attention mask of what they pick.
    """
    lengths = attention.sum(1)
    width = int(lengths.max())
    columns = attention.argsort(dim=1, stable=True)[:, -width:]  # first the zeros, then the ones, each in their order
    places = torch.arange(width, device=attention.device)
    return columns, (places >= (width - lengths).unsqueeze(1)).long()
