"""The masks of rounds 2 and 3: which there are, the lists of each, its journal, what it ablates, and what that did."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

from experiment import say
from experiment.intervention.ablations import Ablation
from experiment.masks import DRAWN, ROUND_NAMES, Side, count_masked
from experiment.options import Options
from experiment.questions import Question, hash_population
from experiment.records import lists
from experiment.records.entries import Figures, MaskedEntry
from experiment.records.journal import Journal, name_masked
from experiment.records.lists import RankedFile
from experiment.records.provenance import digest_numbers
from experiment.records.schema import SCORES, Provenance, RankedLatents, RankedQuestion
from experiment.report import comparisons, estimates
from experiment.rounds import Experiment
from experiment.scores import score_answer


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
    drawn: dict[tuple[str, int], RankedFile] = {}
    found = {}
    for name in list_masks(experiment.options):
        draw = name.draw if name.ranking in DRAWN else 1
        if (name.ranking, draw) not in drawn:
            drawn[name.ranking, draw] = ranked[name.ranking].of_draw(draw, experiment.asked_ids)
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


def open_journals(experiment: Experiment, lists_of: Mapping[MaskName, RankedFile]) -> dict[MaskName, Journal]:
    """Each mask's journal. lists_of: as of `find_lists`."""
    journals = {}
    for name, file in lists_of.items():
        journal_name = name_masked(file.provenance)
        journals[name] = experiment.journal(journal_name, file.provenance, file.digest_used, file.questions)
    return journals


def make_ablation(name: MaskName, file: RankedFile, questions: list[Question], options: Options) -> Ablation:
    """What a mask ablates of these questions; of one that its file lacks, nothing."""
    latents = []
    for question in questions:
        ranked = file.questions.get(question.id)
        of_question: list[int] = []
        if ranked is not None:
            of_question, _ = lists.find_latents_to_mask(ranked, file.side, name.k)
        latents.append(of_question)
    seeds = None
    if name.control == "direction":
        seeds = [f"{options.seed} {name.draw} {question.id}" for question in questions]
    return Ablation(latents, options.keep_only, seeds)


# ---------------------------------------------------------------------------------------------------------------------
# Entries of results.json: what masking did


def make_entries(
    experiment: Experiment,
    lists_of: Mapping[MaskName, RankedFile],
    journals: Mapping[MaskName, Journal],
    asked: list[Question],
) -> list[MaskedEntry]:
    """An entry for each ranking, K and control, over all its draws. lists_of: as of `find_lists`."""
    draws: dict[MaskName, list[MaskName]] = {}
    for name in journals:
        draws.setdefault(name.first, []).append(name)
    entries = []
    for names in draws.values():
        drawn = [lists_of[name] for name in names]
        of_draws = [journals[name] for name in names]
        entries.append(make_entry(drawn, of_draws, asked, experiment.left_out))
    return entries


def make_entry(
    drawn: list[RankedFile], journals: list[Journal], asked: list[Question], left_out: list[str]
) -> MaskedEntry:
    """The entry of one mask: means, and drops from the unmasked answers to the same questions.

    drawn, journals: the lists and the answers of each of its draws; figures are means over them within a question
    first.  left_out: ids of selected questions that do not fit the model's context.
    """
    file = drawn[0]
    provenance = journals[0].provenance
    assert provenance.k is not None  # of a masked round
    asked = [question for question in asked if question.id in file.questions]
    ranked = [file.questions[question.id] for question in asked]
    draws = []
    for journal in journals:
        records = journal.finish(question.id for question in asked)
        draws.append(comparisons.find_scores(records, ranked))
    after = {metric: list(column.values()) for metric, column in comparisons.average_draws(draws).items()}
    clean, figures, drop = compare_with_unmasked(file, after, asked)
    masks = measure_masks(drawn, provenance, asked)
    if masks["fewer_than_k"] and provenance.control is None:
        say(tell_fewer(file, provenance.k, ranked))
    values = {
        **figures.fields(),
        "clean": clean,
        "drop": drop,
        "round": ROUND_NAMES[file.side],
        "masked": file.side,
        "k": provenance.k,
        "run": provenance,
        "journal": journals[0].path.name,
        "latents": file.name,
        **masks,
        "missing": file.missing,
        "left_out": [question_id for question_id in left_out if question_id in file.questions],
        "population": hash_population(asked),
        **describe_mask(provenance, len(journals)),
    }
    return MaskedEntry.model_validate(values)


def compare_with_unmasked(
    file: RankedFile, after: estimates.Columns, asked: list[Question]
) -> tuple[Figures | None, Figures, Figures | None]:
    """Figures of the unmasked answers, of the masked ones to the same questions, and of the drops: `estimates.compare`.

    after: columns of the masked answers.  The others are None where the file has no unmasked answers.
    """
    contexts = [question.context for question in asked]
    if file.selection is None:  # the authors' file
        return None, estimates.summarize(after, contexts), None
    unmasked = []
    for question in asked:
        ranked = file.questions[question.id]
        assert isinstance(ranked, RankedQuestion)
        unmasked.append(complete_scores(ranked, question))
    before = estimates.collect_columns(unmasked, unmasked)
    return estimates.compare(before, after, contexts)


def describe_mask(provenance: Provenance, draws: int) -> dict[str, object]:
    """Fields of a MaskedEntry, of a mask that is not simply a ranking's."""
    fields: dict[str, object] = {}
    if provenance.control is not None:
        fields["control"] = provenance.control
    if draws > 1:
        fields["draws"] = draws
    if provenance.keep_only:
        fields["keep_only"] = True
    return fields


def complete_scores(ranked: RankedQuestion, question: Question) -> RankedQuestion:
    """A ranked question with all scores of its unmasked answer: what older files lack is scored again."""
    if all(getattr(ranked, metric) is not None for metric in SCORES):
        return ranked
    scores = score_answer(ranked.answer, ranked.answer, question.truths)
    its_own = ranked.fields()
    return ranked.with_fields(**(scores | its_own))


class MaskFields(TypedDict):
    """Fields of a MaskedEntry that say what was masked; None for what is not known."""

    mean_k: float
    asked_k: float
    fewer_than_k: int
    removed: float | None
    missed_target: int | None


def measure_masks(drawn: list[RankedFile], provenance: Provenance, asked: list[Question]) -> MaskFields:
    """What was masked: means over the questions and draws. drawn: the lists of each draw."""
    side = drawn[0].side
    k = provenance.k
    assert k is not None  # of a masked round
    ranked = []
    for file in drawn:
        ranked += [file.questions[question.id] for question in asked]
    counts = []
    asked_for = []
    removed: list[float] = []  # of the questions for which it is known
    fewer = 0
    missed = 0
    for question in ranked:
        latents, is_enough = lists.find_latents_to_mask(question, side, k)
        counts.append(len(latents))
        asked_for.append(count_masked(k, len(question.active)))
        share = lists.find_removed(question, side, len(latents))
        if share is not None:
            removed.append(share)
        fewer += not is_enough
        missed += lists.misses_target(question, side, k)
    is_known = len(removed) == len(ranked) and not provenance.keep_only
    return {
        "mean_k": sum(counts) / len(counts),
        "asked_k": sum(asked_for) / len(asked_for),
        "fewer_than_k": round(fewer / len(drawn)),
        "removed": 100 * sum(removed) / len(removed) if is_known else None,
        "missed_target": round(missed / len(drawn)) if is_matched(ranked, side) else None,
    }


def is_matched(ranked: list[RankedLatents], side: Side) -> bool:
    """Whether a ranking's lists are matched to what the baseline's remove."""
    return any(question.target(side) is not None for question in ranked)


def tell_fewer(file: RankedFile, k: str, ranked: list[RankedLatents]) -> str:
    """Says of which ranking a file holds too little for K, and how much it holds: that is not K latents."""
    lengths = []
    for question in ranked:
        latents, is_enough = lists.find_latents_to_mask(question, file.side, k)
        if not is_enough:
            lengths.append(len(latents))
    ranking = file.provenance.ranking
    mask = estimates.MASKS[file.side]
    name = file.path.name
    fewer = len(lengths)
    some = f"{fewer} of {len(ranked)} questions"
    if is_matched(ranked, file.side):
        held = f"for {some} the latents that {name} holds remove less than the baseline's: these are masked."
    else:
        shortest = min(lengths)
        longest = max(lengths)
        count = f"{shortest}" if shortest == longest else f"{shortest} to {longest}"
        held = f"{name} holds fewer latents for {some} ({count}): these are masked, not K."
    return f"{ranking}'s {mask}, K = {k}: {held}"
