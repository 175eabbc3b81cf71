"""What the SAE read in whole sequences, put together from the passes that ran them; the sequences that are ranked."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from experiment.intervention.sparse import SparseActivations, join


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


@dataclass(frozen=True)
class Sequences:
    """The kept questions of a batch as a ranking sees them: lists with an item each.

    ids: the questions'.  prompts, generated: token ids.  brackets: the place in `generated` of the last token with a [
    in its text.  answer_positions: the places there of the tokens inside the brackets.  rows: each one's in `read`,
    which is what the SAE read in the whole group.  special_ids: of the tokenizer's special tokens, BOS among them.
    """

    ids: list[str]
    prompts: list[list[int]]
    generated: list[list[int]]
    brackets: list[int]
    answer_positions: list[list[int]]
    rows: list[int]
    read: SequenceActivations
    special_ids: Sequence[int]

    def tokens_until(self, number: int, place: int) -> list[int]:
        """A sequence's tokens up to this place in what was generated, without the one there."""
        return self.prompts[number] + self.generated[number][:place]

    def until(self, places: Sequence[int], numbers: Sequence[int] | None = None) -> SequenceActivations:
        """What the SAE read in sequences (`numbers`; None: in all) up to these places in what was generated."""
        numbers = range(len(self.rows)) if numbers is None else numbers
        rows = [self.rows[number] for number in numbers]
        ends = []
        for number, place in zip(numbers, places):
            tokens = self.tokens_until(number, place)
            ends.append(len(tokens))
        return self.read.select(rows, ends)

    @functools.cached_property
    def ranked(self) -> SequenceActivations:
        """What the paper ranks: each sequence up to the last [, without it."""
        return self.until(self.brackets)

    @functools.cached_property
    def active(self) -> list[list[int]]:
        """The latents active at the last position that is ranked, ascending: a list for each sequence."""
        spliced = self.ranked.latents.spliced
        rows = self.ranked.rows[spliced]
        positions = spliced.nonzero().flatten()
        last = rows.new_zeros(len(self.rows))
        last = last.scatter_reduce(0, rows, positions, "amax")
        at_the_end = self.ranked.latents.take(last)
        ids = at_the_end.ids.tolist()
        active = []
        first = 0
        for count in at_the_end.counts.tolist():
            of_sequence = ids[first : first + count]
            active.append(sorted(of_sequence))
            first += count
        return active

    @functools.cached_property
    def ordinary(self) -> Bool[Tensor, " pos"]:
        """Where in `ranked` the SAE stands at a token that is not special. Controls are drawn and what masks remove is
        measured there: at BOS, whose norm is many times the others', an SAE's latents say nothing of the text."""
        return self.find_ordinary(self.ranked, self.brackets, range(len(self.rows)))

    def find_ordinary(
        self,
        read: SequenceActivations,
        places: Sequence[int],
        numbers: Sequence[int],
    ) -> Bool[Tensor, " pos"]:
        """Where in `read`, what `until` gives for these places, the SAE stands at a token that is not special."""
        tokens = []
        for number, place in zip(numbers, places):
            tokens += self.tokens_until(number, place)
        spliced = read.latents.spliced
        special_ids = torch.tensor([*self.special_ids], device=spliced.device)
        is_special = torch.isin(torch.tensor(tokens, device=spliced.device), special_ids)
        return spliced & ~is_special

    def read_ordinary(self) -> list[SparseActivations]:
        """What the SAE read at the `ordinary` positions of each sequence."""
        positions = self.ordinary.nonzero().flatten()
        counts = self.ranked.rows[positions].bincount(minlength=len(self.rows))
        parts = positions.split(counts.tolist())
        return [self.ranked.latents.take(part) for part in parts]

    @functools.cached_property
    def answered(self) -> dict[int, int]:
        """{sequence with an answer inside the brackets: the place of its last token in what was generated}."""
        places = {}
        for number, inside in enumerate(self.answer_positions):
            if inside:
                places[number] = inside[-1]
        return places
