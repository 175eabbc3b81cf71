"""What a round ends with: its activations, its entries of results.json, and the table and files made of these."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TypedDict

from experiment import catalogue, say
from experiment.masks import Side
from experiment.options import Options
from experiment.questions import Question
from experiment.records import files, lists
from experiment.records.entries import CommonLatent, Entry, Figures, LatentStatistics, MaskedEntry, UnmaskedEntry
from experiment.records.journal import Journal
from experiment.records.lists import RankedFile
from experiment.records.schema import SCORES, KeptRecord, Provenance, RankedLatents, RankedQuestion, Record
from experiment.report import cells, estimates, folders, outputs, tables
from experiment.rounds import Experiment
from experiment.scores import score_answer

ROUND_NAMES: dict[Side, str] = {"topk": "false", "bottomk": "true"}  # the authors' names of rounds 2 and 3


def report_results(experiment: Experiment, earlier: list[Entry], fresh: Sequence[Entry]) -> None:
    """Puts fresh entries in the place of those of the same round, ranking and K, and writes and prints the table.

    Entries that are no longer of what lies in the folder are left out, with a line.
    """
    replaced = {name_entry(entry) for entry in fresh}
    entries = []
    for entry in earlier:
        if name_entry(entry) not in replaced:
            entries.append(entry)
    entries += fresh
    path = experiment.options.output_dir
    folder = folders.read_folder(path, entries, experiment.questions)
    files.write_results(path / "results.json", folder.entries)
    outputs.write_report(path, [folder], folder.entries)
    table = tables.build_table(folder.entries)
    print(f"\n{cells.to_text(table)}", flush=True)


def name_entry(entry: Entry) -> tuple[str | None, ...]:
    """What tells the entries of one folder apart."""
    provenance = entry.provenance
    return entry.round, provenance.ranking, entry.k, provenance.ablation


def hash_population(asked: Iterable[Question]) -> str:
    """A short hash of the questions that a figure is a mean over."""
    ids = "\n".join(question.id for question in asked)
    return hashlib.sha256(ids.encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Round 1


def store_activations(experiment: Experiment, journals: dict[str, Journal]) -> dict[Question, KeptRecord]:
    """Makes each ranking's journal one file, and its file of activations of it. Returns {kept question: its record}."""
    ids = [question.id for question in experiment.asked]
    for ranking, journal in journals.items():
        ranked = []
        for record in journal.finish(ids):
            if isinstance(record, KeptRecord):
                ranked.append(record.as_ranked())
        provenance = journal.provenance.with_fields(asked=len(ids), kept=len(ranked))
        path = experiment.activations_file(ranking)
        files.write_activations(path, provenance, ranked)
    first = next(iter(journals.values()))
    return find_kept(experiment, first)


def find_kept(experiment: Experiment, journal: Journal) -> dict[Question, KeptRecord]:
    """{question: its record} of those that a ranking's journal of round 1 keeps."""
    kept = {}
    for question in experiment.asked:
        record = journal[question.id]
        if isinstance(record, KeptRecord):
            kept[question] = record
    return kept


def finish_round_1(experiment: Experiment, earlier: list[Entry], journals: dict[str, Journal], keep_f1: float) -> None:
    """Writes and prints the results. keep_f1: from which F1 on an answer is right.

    Each ranking has figures of its own: where one was asked for later, on another device, its answers may differ.
    """
    by_name = {}  # of a ranking of one's own, the function's
    kept = {}
    for journal in journals.values():
        name = journal.provenance.ranking
        assert name is not None  # every round's has one
        by_name[name] = journal
        kept[name] = find_kept(experiment, journal)
    fresh = []
    sentences = []
    for ranking, journal in by_name.items():
        statistics = measure_latents(experiment.options, ranking, kept)
        entry = make_unmasked_entry(experiment, journal, kept[ranking], keep_f1, statistics)
        fresh.append(entry)
        sentences.append(f"{ranking}: {cells.tell_statistics(statistics, ranking)}")
    report_results(experiment, earlier, fresh)
    sentences.append(f"{tell_round_1(experiment, fresh[0])} All files: {experiment.options.output_dir}")
    for sentence in sentences:
        print(f"\n{sentence}")


def tell_round_1(experiment: Experiment, entry: UnmaskedEntry) -> str:
    """How many questions were asked, and what became of them, in a sentence."""
    assert entry.asked is not None and entry.kept is not None  # the entries of this round have them
    percent = 100 * entry.kept / entry.asked
    kept = f"{entry.kept} answered right and kept ({percent:.1f}%)"
    count = len(experiment.left_out)
    too_long = f", {count} left out as too long" if count else ""
    return (
        f"Round 1: {entry.asked} questions asked, {kept}, {entry.wrong} answered wrong, {entry.unranked} right but "
        f"without any [ to rank at{too_long}."
    )


def make_unmasked_entry(
    experiment: Experiment,
    journal: Journal,
    kept: dict[Question, KeptRecord],
    keep_f1: float,
    statistics: LatentStatistics,
) -> UnmaskedEntry:
    """The entry of a ranking's unmasked answers: of those kept, of all, and how many of which kind there are."""
    asked = experiment.asked
    right = sum(record.f1 >= keep_f1 for record in journal.values())
    of_kept = estimate_scores(kept.values(), kept)
    of_all = estimate_scores(journal.values(), asked)
    return UnmaskedEntry(
        **of_kept.fields(),
        all=of_all,
        population=hash_population(kept),
        population_all=hash_population(asked),
        asked=len(asked),
        kept=len(kept),
        wrong=len(asked) - right,
        unranked=right - len(kept),
        left_out=experiment.left_out,
        journal=journal.path.name,
        run=journal.provenance,
        round="baseline",
        k=None,
        statistics=statistics,
    )


def estimate_scores(records: Iterable[Record], asked: Iterable[Question]) -> Figures:
    """Mean scores of answers, with intervals over the questions' contexts."""
    columns = estimates.collect_scores(list(records))
    contexts = [question.context for question in asked]
    return estimates.summarize(columns, contexts)


def measure_latents(options: Options, ranking: str, kept: dict[str, dict[Question, KeptRecord]]) -> LatentStatistics:
    """Statistics of a ranking's lists, and what they share with the other rankings'. kept: of each ranking."""
    own = list(kept[ranking].values())
    contexts = [question.context for question in kept[ranking]]
    statistics = estimates.latent_statistics(own, contexts)
    overlap = {}
    for other, of_other in kept.items():
        if other != ranking:
            records = list(of_other.values())
            overlap[other] = estimates.ranking_overlap(own, records)
    latents: list[CommonLatent] = []
    for latent in statistics.most_frequent_topk:
        page = catalogue.neuronpedia_page(options.sae_release, options.sae_id, latent.latent)
        latents.append(latent.with_fields(neuronpedia=page))
    return statistics.with_fields(most_frequent_topk=latents, overlap=overlap)


# ---------------------------------------------------------------------------------------------------------------------
# Rounds 2 and 3: what masking did


def name_journal(provenance: Provenance, side: Side, k: str) -> str:
    """What a masked round's journal is called: what is not the default is in its name."""
    assert provenance.ranking is not None  # a masked round is of one
    names = []
    if provenance.ranking != "baseline":
        names.append(provenance.ranking)
    names.append(ROUND_NAMES[side])
    if provenance.ablation != "zero":
        names.append(provenance.ablation)
    if k != "50%":
        names.append(f"k{k.replace('%', 'pct')}")
    return "_".join(names)


def make_masked_entry(
    file: RankedFile, k: str, journal: Journal, asked: list[Question], left_out: list[str]
) -> MaskedEntry:
    """The entry of one ranking and K: means, and drops from the unmasked answers to the same questions.

    left_out: ids of selected questions that do not fit the model's context.
    """
    records = journal.finish(question.id for question in asked)
    ranked = [file.questions[question.id] for question in asked]
    contexts = [question.context for question in asked]
    after = estimates.collect_columns(records, ranked)
    if file.selection:
        unmasked = []
        for one, question in zip(ranked, asked):
            assert isinstance(one, RankedQuestion)  # the authors' file has no selection
            unmasked.append(complete_scores(one, question))
        before = estimates.collect_columns(unmasked, ranked)
        figures, clean, drop = estimates.compare(before, after, contexts)
    else:
        figures = estimates.summarize(after, contexts)
        clean = None
        drop = None
    masks = measure_masks(file.side, k, ranked)
    if masks["fewer_than_k"]:
        say(tell_fewer(file, k, ranked))
    return MaskedEntry(
        **figures.fields(),
        clean=clean,
        drop=drop,
        round=ROUND_NAMES[file.side],
        masked=file.side,
        k=k,
        run=journal.provenance,
        journal=journal.path.name,
        latents=file.name,
        **masks,
        missing=file.missing,
        left_out=[question_id for question_id in left_out if question_id in file.questions],
        population=hash_population(asked),
    )


def complete_scores(ranked: RankedQuestion, question: Question) -> RankedQuestion:
    """A ranked question with all scores of its unmasked answer: what older files lack is scored again."""
    if all(getattr(ranked, metric) is not None for metric in SCORES):
        return ranked
    return ranked.with_fields(**score_answer(ranked.answer, ranked.answer, question.truths) | ranked.fields())


class Masks(TypedDict):
    """Fields of a MaskedEntry that say what was masked; None for what is not known."""

    mean_k: float
    fewer_than_k: int
    removed: float | None
    missed_target: int | None


def measure_masks(side: Side, k: str, ranked: list[RankedLatents]) -> Masks:
    """What was masked at K."""
    counts = []
    removed: list[float] = []  # of the questions for which it is known
    fewer = 0
    missed = 0
    for question in ranked:
        latents, is_enough = lists.find_latents_to_mask(question, side, k)
        counts.append(len(latents))
        share = lists.find_removed(question, side, len(latents))
        if share is not None:
            removed.append(share)
        fewer += not is_enough
        missed += lists.misses_target(question, side, k)
    return {
        "mean_k": sum(counts) / len(counts),
        "fewer_than_k": fewer,
        "removed": 100 * sum(removed) / len(removed) if len(removed) == len(ranked) else None,
        "missed_target": missed if is_matched(ranked, side) else None,
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
