"""What a round ends with: its activations, its entries of results.json, and the table and files made of these."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from experiment import catalogue, name_some, say
from experiment.masks import EFFECT
from experiment.options import Options
from experiment.questions import Question, hash_population
from experiment.records import files
from experiment.records.entries import CommonLatent, Entry, Figures, LatentStatistics, UnmaskedEntry
from experiment.records.journal import Journal
from experiment.records.schema import KeptRecord, Record
from experiment.report import estimates, folders, outputs, statistics, terminal
from experiment.rounds import Experiment

OF_ANSWER = ("gradsae-answer", "attribution", EFFECT)  # rankings that need the answer's tokens inside the brackets


def report_results(experiment: Experiment, earlier: list[Entry], fresh: Sequence[Entry]) -> list[Entry]:
    """Puts fresh entries in the place of those of the same mask, and writes and prints what was found and the table.

    Entries that are no longer of what lies in the folder are left out, with a line. Returns the others.
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
    outputs.write_report(path, [folder], folder.entries, folder.entries)
    print(f"\n{terminal.to_text(folder.entries)}", flush=True)
    return folder.entries


def name_entry(entry: Entry) -> tuple[str | None, ...]:
    """What tells the entries of one folder apart."""
    made = entry.provenance
    keeps = "keep" if made.keep_only else None
    return entry.round, made.ranking, entry.k, made.ablation, made.control, keeps


# ---------------------------------------------------------------------------------------------------------------------
# Round 1


def store_activations(experiment: Experiment, journals: dict[str, Journal]) -> dict[Question, KeptRecord]:
    """Makes each ranking's journal one file, and its file of activations of it. Returns {kept question: its record}."""
    for ranking, journal in journals.items():
        ranked = []
        for record in journal.finish(experiment.asked_ids):
            if isinstance(record, KeptRecord):
                ranked.append(record.as_ranked())
        provenance = journal.provenance.with_fields(asked=len(experiment.asked), kept=len(ranked))
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
    for ranking, journal in by_name.items():
        of_latents = measure_latents(experiment.options, ranking, kept)
        entry = make_unmasked_entry(experiment, journal, kept[ranking], keep_f1, of_latents)
        fresh.append(entry)
    entries = report_results(experiment, earlier, fresh)
    unmasked = [entry for entry in entries if isinstance(entry, UnmaskedEntry)]
    print(f"\n{statistics.tell_rankings(unmasked)}")
    say_unanswered(kept)
    print(f"\n{tell_round_1(experiment, fresh[0])} All files: {experiment.options.output_dir}")


def say_unanswered(kept: dict[str, dict[Question, KeptRecord]]) -> None:
    """Says which kept questions have no answer inside the brackets, where a ranking needs it. kept: by ranking."""
    rankings = [ranking for ranking in kept if ranking in OF_ANSWER]
    if not rankings:
        return
    records = kept[rankings[0]].values()
    unanswered = [record.id for record in records if not record.inside]
    if unanswered:
        say(
            f"{', '.join(rankings)}: {len(unanswered)} of {len(records)} kept questions have no answer inside the "
            f"brackets: no latent is in their lists ({name_some(unanswered)})"
        )


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
    of_latents: LatentStatistics,
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
        statistics=of_latents,
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
    of_latents = estimates.latent_statistics(own, contexts)
    overlap = {}
    for other, of_other in kept.items():
        if other != ranking:
            records = list(of_other.values())
            overlap[other] = estimates.ranking_overlap(own, records)
    latents: list[CommonLatent] = []
    for latent in of_latents.most_frequent_topk:
        page = catalogue.neuronpedia_page(options.sae_release, options.sae_id, latent.latent)
        latents.append(latent.with_fields(neuronpedia=page))
    return of_latents.with_fields(most_frequent_topk=latents, overlap=overlap)
