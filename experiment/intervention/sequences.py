"""What the SAE read in whole sequences, put together from the passes that ran them; the sequences that are ranked.

Three words for three things: `latents` are the active latents at some positions (SparseActivations; ids alone in an
Ablation or in Candidates), `encoded` is a list of these, a pass or a step each, and `read` is what they make up in
whole sequences (SequenceActivations).
"""

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
    places: [pos], where the position stands in `latents`, in which what several prompts begin with stands once.
    """

    rows: Int[Tensor, "pos"]
    places: Int[Tensor, "pos"]
    latents: SparseActivations

    @classmethod
    def of_batch(
        cls,
        numbers: list[int],
        places: Int[Tensor, "row pos"],
        attention: Int[Tensor, "row pos"],
        latents: SparseActivations,
    ) -> "ReadInPass":
        """Of a batch's wide pass.

        numbers: each row's sequence.  places: where each position of the layout stands in `latents`.
        attention: 1 at the positions that are of the sequences, not padding or a proposal that was not kept.
        """
        rows, columns = attention.nonzero(as_tuple=True)
        sequences = torch.tensor(numbers, device=attention.device)
        return cls(sequences[rows], places[rows, columns], latents)

    @classmethod
    def of_step(cls, numbers: list[int], latents: SparseActivations) -> "ReadInPass":
        """Of a step, which reads one position per row. numbers: each row's sequence."""
        device = latents.counts.device
        sequences = torch.tensor(numbers, device=device)
        places = torch.arange(len(numbers), device=device)
        return cls(sequences, places, latents)


@dataclass(frozen=True)
class SequenceActivations:
    """What the SAE read in sequences, position by position, sequence by sequence.

    latents: at positions in any order; some may be of none of the sequences, or of several.  rows, columns: [pos], the
    sequence of each position and where it stands in it.  positions: [pos], where it stands in `latents`.
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
        latents = join([part.latents for part in parts])
        device = latents.counts.device
        rows_of_parts = []
        positions_of_parts = []
        first = 0
        for part in parts:
            rows_of_parts.append(part.rows.to(device))
            places = part.places.to(device)
            positions_of_parts.append(first + places)
            first += len(part.latents.counts)
        rows, order = torch.cat(rows_of_parts).sort(stable=True)
        positions = torch.cat(positions_of_parts)[order]
        counts = rows.bincount(minlength=len(lengths))
        starts = counts.cumsum(0) - counts
        columns = torch.arange(len(rows), device=device) - starts[rows]
        ends = torch.tensor(lengths, device=device)
        is_inside = columns < ends[rows]
        return cls(
            latents=latents,
            rows=rows[is_inside],
            columns=columns[is_inside],
            positions=positions[is_inside],
        )

    def select(self, rows: list[int], ends: list[int]) -> "SequenceActivations":
        """These sequences alone, each up to its end (a length), with `latents` in the order of their positions."""
        device = self.rows.device
        count = int(self.rows.max()) + 1
        chosen = torch.tensor(rows, dtype=torch.long, device=device)
        ends_of_rows = torch.zeros(count, dtype=torch.long, device=device)  # of the others nothing is taken
        ends_of_rows[chosen] = torch.tensor(ends, dtype=torch.long, device=device)
        numbers = torch.zeros(count, dtype=torch.long, device=device)  # of each sequence its number among `rows`
        numbers[chosen] = torch.arange(len(rows), device=device)
        is_inside = self.columns < ends_of_rows[self.rows]
        inside = is_inside.nonzero().flatten()
        new_rows, order = numbers[self.rows[inside]].sort(stable=True)
        taken = inside[order]
        return SequenceActivations(
            latents=self.latents.take(self.positions[taken]),
            rows=new_rows,
            columns=self.columns[taken],
            positions=torch.arange(len(taken), device=device),
        )


@dataclass(frozen=True)
class Sequences:
    """The kept questions of a batch as a ranking sees them: lists with an item each.

    ids: the questions'.  prompts, generated: token ids.  brackets: the place in `generated` of the last token with a [
    in its text.  answer_positions: the places there of the tokens inside the brackets.  rows: the row of each one in
    `read`, which is what the SAE read in the whole group.  special_ids: of the tokenizer's special tokens, BOS among
    them.
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
        prompt = self.prompts[number]
        generated = self.generated[number]
        return prompt + generated[:place]

    def until(self, places: Sequence[int], numbers: Sequence[int] | None = None) -> SequenceActivations:
        """What the SAE read in sequences (`numbers`; None: in all) up to these places in what was generated."""
        if numbers is None:
            numbers = range(len(self.rows))
        rows = []
        ends = []
        for number, place in zip(numbers, places):
            tokens = self.tokens_until(number, place)
            rows.append(self.rows[number])
            ends.append(len(tokens))
        return self.read.select(rows, ends)

    @functools.cached_property
    def ranked(self) -> SequenceActivations:
        """What the paper ranks: each sequence up to the last [, without it."""
        return self.until(self.brackets)

    @functools.cached_property
    def active(self) -> list[list[int]]:
        """The latents active at the last position that is ranked, ascending: a list for each sequence.

        Of the positions where the SAE stands, which each sequence has.
        """
        spliced = self.ranked.latents.spliced.nonzero().flatten()  # sequence by sequence
        counts = self.ranked.rows[spliced].bincount(minlength=len(self.rows))
        last = spliced[counts.cumsum(0) - 1]
        at_the_end = self.ranked.latents.take(last)
        active = []
        for ids in at_the_end.ids.split(at_the_end.counts.tolist()):
            active.append(sorted(ids.tolist()))
        return active

    @functools.cached_property
    def ordinary(self) -> Bool[Tensor, "pos"]:
        """Where in `ranked` the SAE stands at a token that is not special. Controls are drawn and what masks remove is
        measured there: at BOS, whose norm is many times the others', an SAE's latents say nothing of the text."""
        everyone = range(len(self.rows))
        return self.find_ordinary(self.ranked, self.brackets, everyone)

    def find_ordinary(
        self,
        read: SequenceActivations,
        places: Sequence[int],
        numbers: Sequence[int],
    ) -> Bool[Tensor, "pos"]:
        """Where in `read` the SAE stands at a token that is not special. read: what `until` gives for these places."""
        tokens = []
        for number, place in zip(numbers, places):
            tokens += self.tokens_until(number, place)
        spliced = read.latents.spliced
        ids = torch.tensor(tokens, device=spliced.device)
        special_ids = torch.tensor([*self.special_ids], device=spliced.device)
        is_special = torch.isin(ids, special_ids)
        return spliced & ~is_special

    def take_ordinary(self) -> list[SparseActivations]:
        """The latents at the `ordinary` positions of each sequence."""
        positions = self.ordinary.nonzero().flatten()
        rows = self.ranked.rows[positions]
        counts = rows.bincount(minlength=len(self.rows))
        latents = []
        for of_sequence in positions.split(counts.tolist()):
            latents.append(self.ranked.latents.take(of_sequence))
        return latents

    @functools.cached_property
    def answered(self) -> dict[int, int]:
        """{sequence with an answer inside the brackets: the place of its last token in what was generated}."""
        places = {}
        for number, inside in enumerate(self.answer_positions):
            if inside:
                places[number] = inside[-1]
        return places
