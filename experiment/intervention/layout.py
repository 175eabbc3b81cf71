"""Batches of sequences: what they begin with alike, padding, and gaps. Knows nothing of models."""

import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# What one more pass costs, in positions that could be run instead. On a GPU a pass waits for its launches: 25 to 45 ms
# for gemma-2-9b-it's 42 layers, in which they would run about a thousand positions. On a CPU it costs far less: 3 ms
# for the demo's, at 35 microseconds per position.
PASS_ON_GPU = 1024
PASS_ON_CPU = 100


def pad(
    sequences: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device | str,
    side: Literal["left", "right"],
) -> tuple[Int[Tensor, "row pos"], Int[Tensor, "row pos"]]:
    """Token ids and attention, 1 at tokens and 0 at padding, which stands on one side of every row."""
    tokens = []
    ones = []
    for sequence in sequences:
        row = torch.tensor(sequence, dtype=torch.long)
        tokens.append(row)
        ones.append(torch.ones_like(row))
    ids = pad_sequence(tokens, batch_first=True, padding_value=pad_id, padding_side=side)
    attention = pad_sequence(ones, batch_first=True, padding_value=0, padding_side=side)
    return ids.to(device), attention.to(device)


@dataclass(frozen=True)
class Prefixes:
    """What sequences of a batch begin with alike.

    tokens: of each prefix, possibly none.  owners: the number of each sequence's prefix.
    """

    tokens: list[list[int]]
    owners: list[int]

    @property
    def width(self) -> int:
        """The length of the longest prefix, in tokens."""
        return max(map(len, self.tokens))

    def find_first_owned(self) -> list[int]:
        """The first sequence of each prefix."""
        numbers = range(len(self.tokens))
        return [self.owners.index(number) for number in numbers]


def find_prefixes(
    sequences: list[list[int]],
    limits: list[int],
    keys: Sequence[Hashable],
) -> Prefixes:
    """What the sequences of each key begin with.

    limits: how many tokens of each sequence may be in a prefix.  keys: one per sequence.
    Prefixes are cut so that about as much is left of all sequences: padding costs what it costs in a batch without
    prefixes.
    """
    groups: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    longest = []  # of each group: its longest sequence, and what all of it begin with, in tokens
    shared = []
    left = []  # behind what is shared
    for rows in groups.values():
        of_group = [sequences[row] for row in rows]
        most = max(map(len, of_group))
        prefix = os.path.commonprefix(of_group)
        limit = min(limits[row] for row in rows)
        length = min(len(prefix), limit)
        longest.append(most)
        shared.append(length)
        if len(rows) > 1:  # one sequence alone may be as long behind its prefix as those that share
            left.append(most - length)
    widest = max(left, default=max(longest))
    tokens = []
    owners = [0] * len(sequences)
    for number, rows in enumerate(groups.values()):
        needed = max(0, longest[number] - widest)
        length = min(shared[number], needed)
        first = sequences[rows[0]]
        tokens.append(first[:length])
        for row in rows:
            owners[row] = number
    return Prefixes(tokens, owners)


def find_shared(
    sequences: list[list[int]],
    limits: list[int],
    groupings: Sequence[Sequence[Hashable]],
) -> list[Prefixes]:
    """What the sequences begin with alike, level by level: each level's prefixes go on where the last one's end.

    groupings: for each level a key per sequence. Sequences of one key in a level are of one key in all levels before.
    limits: as of find_prefixes, of the levels together.
    """
    levels: list[Prefixes] = []
    left = list(limits)
    for keys in groupings:
        rests = rests_behind(sequences, levels)
        level = find_prefixes(rests, left, keys)
        levels.append(level)
        for row, owner in enumerate(level.owners):
            prefix = level.tokens[owner]
            left[row] -= len(prefix)
    return levels


def choose_shared(
    sequences: list[list[int]],
    limits: list[int],
    contexts: Sequence[Hashable],
    window: float,
    pass_cost: int,
) -> list[Prefixes]:
    """The levels of prefixes with which a batch costs least: of all sequences, of each context's, both, or none.

    limits: as of find_shared.  window: how wide a batch with prefixes may be, for between what is shared and the rest
    there is padding, and a sliding window counts places.  pass_cost: of a pass, in positions; each level takes one.
    """
    everyone = [None] * len(sequences)
    best: list[Prefixes] = []
    longest = max(map(len, sequences))
    least = len(sequences) * longest  # in positions
    for groupings in ([everyone], [contexts], [everyone, contexts]):
        levels = find_shared(sequences, limits, groupings)
        rests = rests_behind(sequences, levels)
        width = max(map(len, rests))  # of the batch
        cost = len(sequences) * width
        for level in levels:
            width += level.width
            cost += len(level.tokens) * level.width
            cost += pass_cost
        if cost < least and width <= window:
            best = levels
            least = cost
    return best


def rests_behind(sequences: list[list[int]], levels: Sequence[Prefixes]) -> list[list[int]]:
    """What is left of each sequence behind its prefixes."""
    rests = []
    for row, sequence in enumerate(sequences):
        taken = 0
        for level in levels:
            owner = level.owners[row]
            taken += len(level.tokens[owner])
        rests.append(sequence[taken:])
    return rests


@dataclass(frozen=True)
class Level:
    """What is run in one pass, behind the cache of the level before: a node per prefix, or, in the end, per sequence.

    ids: padded.  attention: 1 at tokens and 0 at padding, also of the places of all levels before.  parents: the node
    of the level before that each one goes on from.
    """

    ids: Int[Tensor, "node pos"]
    attention: Int[Tensor, "node cached+pos"]
    parents: Int[Tensor, "node"]


class Layout:
    """A batch of sequences on the device, level by level: shared prefixes first, in the end the rest of each sequence.

    Prefixes are padded on the right, where padding has a token to look back at. Rests are padded on the left: every
    row's next token stands at the same place.

    levels: in the order in which they are run; without prefixes one.
    ids, attention, places: [row, pos], the levels side by side; places says where each position stands among all that
    are run, level by level.
    """

    def __init__(
        self,
        sequences: list[list[int]],
        pad_id: int,
        device: torch.device | str,
        prefixes: Sequence[Prefixes] = (),
    ):
        """prefixes: level by level, as find_shared gives them; the sequences are whole, prefixes included."""
        everyone = list(range(len(sequences)))
        rests = Prefixes(rests_behind(sequences, prefixes), everyone)
        self.levels: list[Level] = []
        ids = []
        attention = []
        places = []
        before = everyone  # of each row its node in the level before; the first level has none
        first = 0
        for part in (*prefixes, rests):
            side: Literal["left", "right"] = "left" if part is rests else "right"
            part_ids, part_attention = pad(part.tokens, pad_id, device, side)
            owners = torch.tensor(part.owners, device=device)
            end = first + part_ids.numel()
            in_order = torch.arange(first, end, device=device)
            part_places = in_order.view_as(part_ids)
            first = end
            ids.append(part_ids[owners])
            attention.append(part_attention[owners])
            places.append(part_places[owners])
            until_here = torch.cat(attention, 1)
            rows_of_nodes = part.find_first_owned()  # what a node has before it all of its rows have
            parents = [before[row] for row in rows_of_nodes]
            level = Level(part_ids, until_here[rows_of_nodes], torch.tensor(parents, device=device))
            self.levels.append(level)
            before = part.owners
        self.ids = torch.cat(ids, 1)
        self.attention = torch.cat(attention, 1)
        self.places = torch.cat(places, 1)


def close_gaps(attention: Int[Tensor, "row pos"]) -> tuple[Int[Tensor, "row left"], Int[Tensor, "row left"]]:
    """The columns of each row's tokens, in their order at the right end of as many columns as the longest row has.

    Returns them, some column of padding in front, and the attention of what they pick.
    """
    lengths = attention.sum(1)
    width = int(lengths.max())
    order = attention.argsort(dim=1, stable=True)  # first the zeros, then the ones, each in their order
    columns = order[:, -width:]
    return columns, attention.gather(1, columns)
