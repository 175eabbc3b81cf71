"""What all rounds begin and end with: questions, the folder, batches shared among processes, results."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from accelerate import PartialState
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from experiment import UserError, catalogue, own_rankings, questions, say
from experiment.intervention import plan
from experiment.intervention.memory import memory_errors
from experiment.intervention.plan import Sizes
from experiment.options import Options
from experiment.prompts import build_prompt, tokenize
from experiment.questions import Question
from experiment.records import activations, files, lists, provenance
from experiment.records.journal import Journal, read_run
from experiment.report import estimates, folders, outputs, tables

Key = TypeVar("Key")  # of a round's journals: a ranking in round 1, a ranking and a K in rounds 2 and 3
WORDS = {"topk": "false", "bottomk": "true"}  # the authors' names of rounds 2 and 3


@dataclass(frozen=True)
class Round:
    """What a round knows before the model is loaded.

    state: this process among those a launcher started.  questions: of the whole data set; asked: those selected.
    run: what makes the unmasked answers, and with them the baseline's ranking.  lengths: tokens of the prompts of those
    asked, by id.  left_out: the ids of selected questions that do not fit the model's context: they are not asked.
    """

    options: Options
    state: PartialState
    tokenizer: PreTrainedTokenizerBase
    questions: list[Question]
    asked: list[Question]
    run: dict
    lengths: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def prompt(self, question):
        return build_prompt(self.run["prompt_template"], question.context, question.question)

    def prompt_ids(self, question):
        return tokenize(self.tokenizer, self.prompt(question))

    def run_of(self, ranking: str, **more: object) -> dict:
        """The run of a ranking of the same answers. ranking: as --ranking takes it."""
        run = self.run | {"ranking": own_rankings.name_of(ranking)}
        is_own = own_rankings.is_own(ranking)
        if is_own:
            run["ranking_digest"] = own_rankings.digest(ranking)
        if is_own or ranking in ("random", "matched"):  # one's own is handed the seed
            run["ranking_seed"] = self.options.seed
        return run | more

    def select(self, made: dict) -> list[Question]:
        """The questions that a run of the same data set asks."""
        return questions.select(self.questions, *(made.get(name) for name in provenance.SELECTION))

    def find_wanted(self, run: dict, made: dict, describe: Callable[[list[Question]], dict] | None = None) -> dict:
        """The run that a file of the run `made` has to be of, so that this round can go on with it.

        That is `run`, but for the questions: those of the file have to be some of those that are asked now. describe:
        what a run says of the questions besides.
        """
        if files.find_problem(made, files.SELECTION) or provenance.differences(made, run, ["questions"]):
            return run
        earlier = self.select(made)
        now = {question.id for question in self.asked} | set(self.left_out)
        if not {question.id for question in earlier} <= now:
            return run
        selected = {name: made.get(name) for name in provenance.SELECTION}
        return run | selected | (describe(earlier) if describe else {})

    def journal(self, name: str, run: dict, describe: Callable[[list[Question]], dict] | None = None) -> Journal:
        """The journal of this name and run; of more questions than an earlier one of the same name, it goes on."""
        return Journal(
            self.options.output_dir / f"predictions_{name}.jsonl",
            run,
            self.state.process_index,
            self.options.overwrite,
            lambda made: self.find_wanted(run, made, describe),
        )

    def is_begun(self, ranking: str) -> bool:
        """Whether round 1's journal is of this run: what is there of another one, an interrupted --overwrite left."""
        run = self.run_of(ranking)
        made = read_run(self.options.output_dir / f"predictions_{run['ranking']}.jsonl")
        return made is not None and not provenance.differences(made, self.find_wanted(run, made), provenance.ALL)


def leave_out_long(round_: Round, context: int | None) -> Round:
    """The Round without those of the selected questions whose prompt and answer may not fit the model's context, of
    `context` tokens (None: of no known limit). Raises UserError where none is left.
    """
    longest_answer = round_.options.max_new_tokens
    asked: list[Question] = []
    lengths: dict[str, int] = {}
    left_out: list[str] = []
    for question in round_.asked:
        length = len(round_.prompt_ids(question))
        if context is not None and length + longest_answer > context:
            left_out.append(question.id)
        else:
            asked.append(question)
            lengths[question.id] = length
    limit = f"the model's context of {context} tokens, with an answer of {longest_answer}"
    if not asked:
        raise UserError(f"{round_.options.dataset}: no selected question fits {limit}: shorten them")
    if left_out:
        named = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
        say(f"{round_.options.dataset}: {len(left_out)} questions do not fit {limit}: they are left out ({named})")
    return dataclasses.replace(round_, asked=asked, lengths=lengths, left_out=left_out)


@contextlib.contextmanager
def writing(round_):
    """Keeps the output folder to this round, and gives the entries that its results.json holds already."""
    folder, options = round_.options.output_dir, round_.options
    lock = files.lock(folder) if round_.state.is_main_process else contextlib.nullcontext()
    with lock, memory_errors():
        overwrite = options.overwrite or any(map(round_.is_begun, options.ranking))
        entries = files.read_results(folder / "results.json", round_.run, overwrite)
        round_.state.wait_for_everyone()
        yield entries
        if round_.state.num_processes > 1:
            round_.state.destroy_process_group()


def wait_for_all(round_: Round) -> bool:
    """Waits until all processes have done their share. True in the first one, which finishes the round."""
    round_.state.wait_for_everyone()
    return round_.state.is_main_process


def is_finished(asked: list[Question], journals: Mapping[Any, Journal]) -> bool:
    """Whether every journal has every question; says so."""
    finished = all(question.id in journal for journal in journals.values() for question in asked)
    if finished:
        say("This round is finished; --overwrite starts it again.")
    return finished


@dataclass(frozen=True)
class Work(Generic[Key]):
    """Batches that this process works off together; journals get their records at once.

    questions: of all the batches.  batches: numbers of these questions.  keys: of the journals that lack any of them.
    """

    questions: list[Question]
    batches: list[list[int]]
    keys: list[Key]


def plan_work(
    round_: Round,
    sizes: Sizes,
    asked: list[Question],
    journals: Mapping[Key, Journal],
    drafts: dict[str, list[int]] | None = None,
) -> list[Work[Key]]:
    """This process's share of the round, what is finished included: there `keys` is empty.

    drafts: tokens that each question's prompt is run with, by id. Batches and groups depend on the questions alone, so
    that an interrupted round ends in the same bytes as another, also in half precision.
    """
    state = round_.state
    state.wait_for_everyone()  # all have read the journals before one of them writes
    lengths = []
    for question in asked:
        draft = drafts[question.id] if drafts else []
        lengths.append(round_.lengths[question.id] + len(draft))
    batches = plan.plan_batches(lengths, sizes.batch, [question.context for question in asked])
    share = []
    for group in plan.plan_groups(batches, lengths, sizes.group):
        own = group[state.process_index :: state.num_processes]
        if own:
            share.append(_make_work(asked, own, journals))
    return share


def _make_work(asked: list[Question], batches: list[list[int]], journals: Mapping[Key, Journal]) -> Work[Key]:
    questions = [asked[index] for batch in batches for index in batch]
    numbers = []
    first = 0
    for batch in batches:
        numbers.append(list(range(first, first + len(batch))))
        first += len(batch)
    keys = []
    for key, journal in journals.items():
        if any(question.id not in journal for question in questions):
            keys.append(key)
    return Work(questions, numbers, keys)


class Bar:
    """Shows how many answers of this process's share are there. Moves within a group, and is right at its end."""

    def __init__(self, round_: Round, label: str, share: list[Work[Key]], journals: Mapping[Key, Journal]):
        state = round_.state
        if state.num_processes > 1:
            label += f", process 1 of {state.num_processes}"
        total = len(journals) * sum(len(work.questions) for work in share)
        self.done = total - sum(len(work.questions) * len(work.keys) for work in share)
        self.bar = tqdm(total=total, initial=self.done, desc=label, unit="answer", disable=not state.is_main_process)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def move(self, count: int) -> None:
        """So many answers of the group under way have ended."""
        self.bar.update(count)

    def finish(self, work: Work) -> None:
        """The group is done: masks that several rankings or K share were run once, rankings share their answers."""
        self.done += len(work.questions) * len(work.keys)
        self.bar.update(self.done - self.bar.n)


def write_results(round_: Round, entries: list[dict], fresh: list[dict]) -> None:
    """Puts fresh entries in the place of those of the same round, ranking and K, and writes and prints the table.

    Entries that are no longer of what lies in the folder are left out, with a line.
    """

    def key(entry):
        return entry["round"], entry["run"]["ranking"], entry["k"], entry["run"].get("ablation", "zero")

    entries = [old for old in entries if key(old) not in [key(new) for new in fresh]] + fresh
    path = round_.options.output_dir
    folder = folders.read(path, entries, round_.questions)
    files.write_results(path / "results.json", folder.entries)
    outputs.write(path, [folder], folder.entries)
    print(f"\n{tables.terminal(tables.frame(folder.entries))}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Round 1


def write_activations(round_: Round, journals: dict[str, Journal]) -> dict[Question, dict]:
    """Makes each ranking's journal one file, and its file of activations of it. Returns {kept question: its record}."""
    for name, journal in journals.items():
        records = journal.finish(question.id for question in round_.asked)
        samples = [make_sample(record) for record in records if "active" in record]
        run = journal.run | {"asked": len(records), "kept": len(samples)}
        files.write_activations(activations.name_file(round_.options, name), run, samples)
    first = next(iter(journals.values()))
    return find_kept(round_, first)


def find_kept(round_: Round, journal: Journal) -> dict[Question, dict]:
    """{question: its record} of those that a ranking's journal of round 1 keeps."""
    return {question: journal[question.id] for question in round_.asked if "active" in journal[question.id]}


def finish_round_1(round_: Round, entries: list[dict], journals: dict[str, Journal], keep_f1: float) -> None:
    """Writes and prints the results. keep_f1: from which F1 on an answer is right.

    Each ranking has figures of its own: where one was asked for later, on another device, its answers may differ.
    """
    options, fresh = round_.options, []
    by_name = {journal.run["ranking"]: journal for journal in journals.values()}
    samples = {name: list(find_kept(round_, journal).values()) for name, journal in by_name.items()}
    for name, journal in by_name.items():
        figures = summarize_round_1(round_, journal, keep_f1)
        contexts = [question.context for question in find_kept(round_, journal)]
        statistics = describe_latents(round_, samples, name, contexts)
        files = {"journal": journal.path.name, "run": journal.run}
        fresh.append(figures | files | {"round": "baseline", "k": None, "statistics": statistics})
    write_results(round_, entries, fresh)
    for entry in fresh:
        name = entry["run"]["ranking"]
        print(f"\n{name}: {tables.describe(entry['statistics'], name)}")
    counts = fresh[0]
    too_long = f", {len(round_.left_out)} left out as too long" if round_.left_out else ""
    print(
        f"\nRound 1: {counts['asked']} questions asked, {counts['kept']} answered right and kept "
        f"({100 * counts['kept'] / counts['asked']:.1f}%), {counts['wrong']} answered wrong, "
        f"{counts['unranked']} right but without any [ to rank at{too_long}. All files: {options.output_dir}"
    )


def summarize_round_1(round_: Round, journal: Journal, keep_f1: float) -> dict:
    """The figures of a ranking's unmasked answers: of those kept, of all, and how many of which kind there are."""
    asked, kept = round_.asked, find_kept(round_, journal)
    right = sum(record["f1"] >= keep_f1 for record in journal.values())
    figures = summarize(kept.values(), [question.context for question in kept])
    return figures | {
        "all": summarize(journal.values(), [question.context for question in asked]),
        "population": name_population(kept),
        "population_all": name_population(asked),
        "asked": len(asked),
        "kept": len(kept),
        "wrong": len(asked) - right,
        "unranked": right - len(kept),
        "left_out": round_.left_out,
    }


def summarize(records, contexts):
    columns = {metric: [record[metric] for record in records] for metric in ("em", "f1", "accuracy", "named")}
    return estimates.summarize(columns, contexts)


def make_sample(record):
    """A kept question as a file of activations has it: its record without the text."""
    return {field: value for field, value in record.items() if field != "text"}


def describe_latents(round_, samples, name, contexts):
    """Statistics of a ranking's lists, and what they share with the other rankings'."""
    options = round_.options
    statistics = estimates.latent_statistics(samples[name], contexts)
    others = {other: samples[other] for other in samples if other != name}
    statistics["overlap"] = {
        other: estimates.ranking_overlap(samples[name], theirs) for other, theirs in others.items()
    }
    for latent in statistics["most_frequent_topk"]:
        latent["neuronpedia"] = catalogue.neuronpedia_page(options.sae_release, options.sae_id, latent["latent"])
    return statistics


# ---------------------------------------------------------------------------------------------------------------------
# Rounds 2 and 3: what masking did


def name_journal(run, which, k):
    names = [] if run["ranking"] == "baseline" else [run["ranking"]]
    names += [WORDS[which]] + ([] if run["ablation"] == "zero" else [run["ablation"]])
    return "_".join(names + ([] if k == "50%" else [f"k{k.replace('%', 'pct')}"]))


def compare(ranked, k, journal, asked, left_out):
    """The entry of results.json of one ranking and K: means, drops from the unmasked answers to the same questions.

    left_out: ids of selected questions that do not fit the model's context.
    """
    records = journal.finish(question.id for question in asked)
    samples, contexts = [ranked.samples[question.id] for question in asked], [question.context for question in asked]
    after = estimates.collect_columns(records, samples)
    if ranked.selection:
        before = [  # what older files lack is scored again
            sample if "named" in sample else questions.score(sample["answer"], sample["answer"], q.truths) | sample
            for sample, q in zip(samples, asked)
        ]
        figures = estimates.compare(estimates.collect_columns(before, samples), after, contexts)
    else:
        figures = estimates.summarize(after, contexts) | {"clean": None, "drop": None}
    masks = describe_masks(ranked, k, samples)
    if masks["fewer_than_k"]:
        say(tell_fewer(ranked, k, samples))
    return figures | {
        "round": WORDS[ranked.which],
        "masked": ranked.which,
        "k": k,
        "run": journal.run,
        "journal": journal.path.name,
        "latents": ranked.name,
        **masks,
        "missing": ranked.missing,
        "left_out": [name for name in left_out if name in ranked.samples],
        "population": name_population(asked),
    }


def describe_masks(ranked: activations.Ranked, k: str, samples: list[dict]) -> dict[str, float | None]:
    """What was masked at K: latents a question, for how many questions the file has fewer than K, percent of the
    residual stream's norm removed, and how many questions of a matched ranking miss their target by over half of it;
    None for what is not known."""
    counts, removed, fewer, missed = [], [], 0, 0
    for sample in samples:
        latents, enough = lists.pick_latents(sample, ranked.which, k)
        counts.append(len(latents))
        removed.append(lists.find_removed(sample, ranked.which, len(latents)))
        fewer += not enough
        missed += lists.misses_target(sample, ranked.which, k)
    is_matched = any(f"target_{ranked.which}" in sample for sample in samples)
    return {
        "mean_k": sum(counts) / len(counts),
        "fewer_than_k": fewer,
        "removed": None if None in removed else 100 * sum(removed) / len(removed),
        "missed_target": missed if is_matched else None,
    }


def tell_fewer(ranked: activations.Ranked, k: str, samples: list[dict]) -> str:
    """Says of which ranking a file holds too little for K, and how much it holds: that is not K latents."""
    name = f"{ranked.run['ranking']}'s {estimates.MASKS[ranked.which]}"
    picked = [lists.pick_latents(sample, ranked.which, k) for sample in samples]
    lengths = [len(latents) for latents, enough in picked if not enough]
    of_them = f"{len(lengths)} of {len(samples)} questions"
    if any(f"target_{ranked.which}" in sample for sample in samples):
        return (
            f"{name}, K = {k}: for {of_them} the latents that {ranked.path.name} holds remove less than the "
            "baseline's: these are masked."
        )
    held = str(min(lengths)) if min(lengths) == max(lengths) else f"{min(lengths)} to {max(lengths)}"
    return f"{name}, K = {k}: {ranked.path.name} holds fewer latents for {of_them} ({held}): these are masked, not K."


def name_population(asked):
    """A short hash of the questions that a figure is a mean over."""
    return hashlib.sha256("\n".join(question.id for question in asked).encode()).hexdigest()[:16]
