"""What the SAE read in whole sequences, put together from the passes that ran them. Knows nothing of answers."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from experiment.intervention.splice import SparseActivations, join


@dataclass(frozen=True)
class ReadInPass:
    """What the SAE read in one pass, or in the passes of one batch.

    rows: [pos], the number of the sequence that each position belongs to, in the order in which a sequence is read.
    places: [pos], where the position stands in `activations`, in which what several prompts begin with stands once.
    """

    rows: Int[Tensor, "pos"]
    places: Int[Tensor, "pos"]
    activations: SparseActivations

    @classmethod
    def of_batch(
        cls,
        numbers: list[int],
        places: Int[Tensor, "row pos"],
        attention: Int[Tensor, "row pos"],
        activations: SparseActivations,
    ) -> "ReadInPass":
        """Of a batch's wide pass.

        numbers: each row's sequence.  places: where each position of the layout stands in `activations`.
        attention: 1 at the positions that are of the sequences, not padding or a proposal that was not kept.
        """
        rows, columns = attention.nonzero(as_tuple=True)
        sequences = torch.tensor(numbers, device=attention.device)
        return cls(sequences[rows], places[rows, columns], activations)

    @classmethod
    def of_step(cls, numbers: list[int], activations: SparseActivations) -> "ReadInPass":
        """Of a step, which reads one position per row. numbers: each row's sequence."""
        device = activations.counts.device
        return cls(torch.tensor(numbers, device=device), torch.arange(len(numbers), device=device), activations)


@dataclass(frozen=True)
class SequenceActivations:
    """What the SAE read in sequences, position by position, sequence by sequence.

    rows, columns: [pos], the sequence of each position and where it stands in it.  positions: [pos], where it stands in
    `latents`.
    """

    latents: SparseActivations
    rows: Int[Tensor, "pos"]
    columns: Int[Tensor, "pos"]
    positions: Int[Tensor, "pos"]

    @classmethod
    def collect(cls, parts: list[ReadInPass], lengths: list[int]) -> "SequenceActivations":
        """Of the parts in the order in which they were run.

        lengths: of the sequences, in tokens; a row may have been run beyond its end.
        """
        device = parts[0].activations.counts.device
        rows = torch.cat([part.rows.to(device) for part in parts])
        positions = []
        first = 0
        for part in parts:
            positions.append(first + part.places.to(device))
            first += len(part.activations.counts)
        rows, order = rows.sort(stable=True)
        counts = rows.bincount(minlength=len(lengths))
        starts = counts.cumsum(0) - counts
        columns = torch.arange(len(rows), device=device) - starts[rows]
        is_inside = columns < torch.tensor(lengths, device=device)[rows]
        return cls(
            join([part.activations for part in parts]),
            rows[is_inside],
            columns[is_inside],
            torch.cat(positions)[order][is_inside],
        )

    def select(self, rows: list[int], ends: list[int]) -> "SequenceActivations":
        """These sequences alone, each up to its end (a length), with `latents` in the order of their positions."""
        device = self.rows.device
        numbers = torch.full((int(self.rows.max()) + 1,), -1, device=device)
        numbers[rows] = torch.arange(len(rows), device=device)
        numbers = numbers[self.rows]  # [pos], of each position's sequence among `rows`
        ends_of_rows = torch.tensor([*ends, 0], device=device)  # the last one is of all other sequences
        is_inside = (numbers >= 0) & (self.columns < ends_of_rows[numbers])
        order = numbers[is_inside].sort(stable=True).indices
        positions = self.positions[is_inside][order]
        return SequenceActivations(
            self.latents.take(positions),
            numbers[is_inside][order],
            self.columns[is_inside][order],
            torch.arange(len(positions), device=device),
        )
