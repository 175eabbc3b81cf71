"""The masks of rounds 2 and 3: which there are, the lists of each, its journal, and what it ablates."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from experiment.intervention.ablations import Ablation
from experiment.masks import DRAWN
from experiment.options import Options
from experiment.questions import Question
from experiment.records import lists
from experiment.records.journal import Journal, name_masked
from experiment.records.lists import RankedFile
from experiment.records.provenance import digest_numbers
from experiment.records.schema import Provenance
from experiment.rounds import Experiment


@dataclass(frozen=True)
class MaskName:
    """What tells the masks of a round apart.

    ranking: as --ranking takes it.  control: "direction", what the ranking's latents write in a random direction; None:
    the latents themselves.  draw: of what is drawn, from 1 on.
    """

    ranking: str
    k: str
    control: str | None = None
    draw: int = 1

    @property
    def first(self) -> MaskName:
        """The first draw, whose entry of results.json is of all of them."""
        return dataclasses.replace(self, draw=1)


def list_masks(options: Options) -> list[MaskName]:
    """The masks that are asked for. K = 0, which masks nothing or keeps nothing, has neither controls nor draws."""
    ks = ("0", *options.k) if options.keep_only else options.k
    names = []
    for ranking in options.ranking:
        list_draws = options.draws if ranking in DRAWN else 1
        control_draws = options.draws if options.control == "direction" else 0
        for k in ks:
            if k == "0":
                names.append(MaskName(ranking, k))
                continue
            names += [MaskName(ranking, k, draw=draw) for draw in range(1, list_draws + 1)]
            names += [MaskName(ranking, k, "direction", draw) for draw in range(1, control_draws + 1)]
    return names


def find_lists(
    experiment: Experiment, ranked: dict[str, RankedFile], means: list[float] | None
) -> dict[MaskName, RankedFile]:
    """The lists that each mask takes its latents from, with the provenance of what is answered under it.

    means: what masked latents are set to, None for zero.  The directions of a drawn ranking's control are of its own
    lists of the same draw.
    """
    ids = [question.id for question in experiment.asked]
    drawn: dict[tuple[str, int], RankedFile] = {}
    found = {}
    for name in list_masks(experiment.options):
        draw = name.draw if name.ranking in DRAWN else 1
        if (name.ranking, draw) not in drawn:
            drawn[name.ranking, draw] = ranked[name.ranking].of_draw(draw, ids)
        file = drawn[name.ranking, draw]
        provenance = _describe(name, file.provenance, experiment.options)
        if means:
            provenance = provenance.with_fields(means=digest_numbers(means))
        found[name] = dataclasses.replace(file, provenance=provenance)
    return found


def _describe(name: MaskName, provenance: Provenance, options: Options) -> Provenance:
    """The provenance of a mask, from that of its lists."""
    provenance = provenance.with_fields(k=name.k)
    if name.control is not None:
        provenance = provenance.with_fields(control=name.control, control_seed=options.seed)
    if name.draw > 1:
        provenance = provenance.with_fields(draw=name.draw)
    if options.keep_only:
        provenance = provenance.with_fields(keep_only=True)
    return provenance


def open_journals(experiment: Experiment, files: dict[MaskName, RankedFile]) -> dict[MaskName, Journal]:
    """Each mask's journal."""
    journals = {}
    for name, file in files.items():
        journal_name = name_masked(file.provenance)
        journals[name] = experiment.journal(journal_name, file.provenance, file.digest_used, file.questions)
    return journals


def make_ablation(name: MaskName, file: RankedFile, questions: list[Question], options: Options) -> Ablation:
    """What a mask ablates of these questions; of one that its file lacks, nothing."""
    latents = []
    for question in questions:
        ranked = file.questions.get(question.id)
        of_question = lists.find_latents_to_mask(ranked, file.side, name.k)[0] if ranked is not None else []
        latents.append(of_question)
    directions = None
    if name.control == "direction":
        directions = [f"{options.seed} {name.draw} {question.id}" for question in questions]
    return Ablation(latents, options.keep_only, directions)
