"""What all rounds begin with: questions, the folder, batches shared among processes."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from accelerate import PartialState
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from experiment import UserError, name_some, own_rankings, questions, say
from experiment.demo import bundled
from experiment.intervention import plan
from experiment.intervention.forward import SplicedModel
from experiment.intervention.memory import memory_errors
from experiment.intervention.plan import Sizes
from experiment.masks import DRAWN, EFFECT
from experiment.options import Options
from experiment.prompts import build_prompt, tokenize
from experiment.questions import Question
from experiment.records import files
from experiment.records.entries import Entry
from experiment.records.journal import Journal, name_unmasked, read_provenance
from experiment.records.provenance import ALL, SELECTION, differences, digest_local
from experiment.records.schema import Provenance

Key = TypeVar("Key")  # of a round's journals: a ranking in round 1, a MaskName in rounds 2 and 3
PACKAGES = ("torch", "transformers", "transformer-lens", "sae-lens", "datasets")
# The options that a provenance has as they are.
RECORDED = (
    "demo", "model", "sae_release", "sae_id", "dtype", "sae_dtype", "error_term", "exclude_special_tokens",
    "dataset", "dataset_config", "max_new_tokens", "limit", "sample",
)  # fmt: skip
DigestUsed = Callable[[list[str]], dict[str, str]]  # fields of a provenance that hang on the questions, by their ids


@dataclass(frozen=True)
class Experiment:
    """What a round knows before the model is loaded.

    state: this process among those a launcher started.  questions: of the whole data set; asked: those selected.
    provenance: of the unmasked answers, and with them of the baseline's ranking.  lengths: tokens of the prompts of
    those asked, by id.  left_out: the ids of selected questions that do not fit the model's context: they are not
    asked.
    """

    options: Options
    state: PartialState
    tokenizer: PreTrainedTokenizerBase
    questions: list[Question]
    asked: list[Question]
    provenance: Provenance
    lengths: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def asked_ids(self) -> list[str]:
        return [question.id for question in self.asked]

    def prompt(self, question: Question) -> str:
        template = self.provenance.prompt_template
        assert template is not None  # every round has chosen one
        return build_prompt(template, question.context, question.question)

    def prompt_ids(self, question: Question) -> list[int]:
        return tokenize(self.tokenizer, self.prompt(question))

    def provenance_of(self, ranking: str) -> Provenance:
        """The provenance of a ranking of the same answers. ranking: as --ranking takes it."""
        provenance = self.provenance.with_fields(ranking=own_rankings.name_of(ranking))
        is_own = own_rankings.is_own(ranking)
        if is_own:
            provenance = provenance.with_fields(ranking_digest=own_rankings.digest(ranking))
        if is_own or ranking in DRAWN:  # one's own is handed the seed
            provenance = provenance.with_fields(ranking_seed=self.options.seed)
        return provenance

    def round_1_of(self, ranking: str) -> Provenance:
        """The provenance of round 1's journal and file of a ranking, which holds as many lists as are asked for."""
        provenance = self.provenance_of(ranking)
        if ranking in DRAWN and self.options.draws > 1:
            provenance = provenance.with_fields(draws=self.options.draws)
        if ranking == EFFECT:
            provenance = provenance.with_fields(effects=self.options.effects, measured_for=self._name_others())
        return provenance

    def _name_others(self) -> str:
        """The command's rankings but for `effect`, in any order, each with what its scores hang on."""
        names = []
        for ranking in self.options.ranking:
            if ranking == EFFECT:
                continue
            provenance = self.provenance_of(ranking)
            parts = (provenance.ranking, provenance.ranking_seed, provenance.ranking_digest)
            names.append(" ".join(str(part) for part in parts if part is not None))
        return ", ".join(sorted(names))

    def select_as(self, stored: Provenance) -> list[Question]:
        """The questions that the run of a file asked, which was of the same data set."""
        return questions.select(self.questions, stored.limit, stored.sample, stored.seed)

    def adopt_selection(
        self, provenance: Provenance, stored: Provenance, digest_used: DigestUsed | None = None
    ) -> Provenance:
        """The provenance that a file has to have so that this round can go on with it, or build on it.

        That is `provenance`; where all questions that the file is of are asked now, too, with the file's selection of
        them: a file of fewer questions can be gone on with.  stored: the provenance that the file has.
        """
        if differences(stored, provenance, ["questions"]):
            return provenance
        earlier = [question.id for question in self.select_as(stored)]
        now = {question.id for question in self.asked}
        now.update(self.left_out)
        if not now.issuperset(earlier):
            return provenance
        selected: dict[str, object] = {name: getattr(stored, name) for name in SELECTION}
        if digest_used is not None:
            selected |= digest_used(earlier)
        return provenance.with_fields(**selected)

    def activations_file(self, ranking: str) -> Path:
        """Where round 1 writes a ranking's activations. ranking: as --ranking takes it."""
        usual = self.options.output_dir / f"activations_{own_rankings.name_of(ranking)}.json"
        return self.options.activations or usual

    def journal(
        self,
        name: str,
        provenance: Provenance,
        digest_used: DigestUsed | None = None,
        only: Collection[str] | None = None,
    ) -> Journal:
        """The journal of this file name; of more questions than an earlier one of the same name, it goes on.

        only: as of a Journal.
        """
        return Journal(
            self.options.output_dir / name,
            provenance,
            process=self.state.process_index,
            overwrite=self.options.overwrite,
            adopt_selection=lambda stored: self.adopt_selection(provenance, stored, digest_used),
            only=only,
        )

    def is_begun(self, ranking: str) -> bool:
        """Whether round 1's journal is of this run: what is there of another one, an interrupted --overwrite left."""
        provenance = self.round_1_of(ranking)
        stored = read_provenance(self.options.output_dir / name_unmasked(provenance))
        if stored is None:
            return False
        return not differences(stored, self.adopt_selection(provenance, stored), ALL)


def make_provenance(options: Options, template: str, questions_digest: str, device: str) -> Provenance:
    """What makes the unmasked answers, but for what the SAE says once it is loaded.

    template: the prompt template's text.  device: where the model is, or the device map that spreads it.
    """
    fields = {name: getattr(options, name) for name in RECORDED}
    fields |= {
        "ranking": "baseline",
        "split": None if questions.is_local(options.dataset) else options.split,
        "questions": questions_digest,
        "prompt_template": template,
        "seed": options.seed if options.sample else None,
    }
    fields |= digest_local(bundled(options.model), bundled(options.sae_release), options.sae_id)
    fields["device"] = device
    fields["versions"] = {name: importlib.metadata.version(name) for name in PACKAGES}
    return Provenance.model_validate(fields)


def leave_out_long(experiment: Experiment, context: int | None) -> Experiment:
    """The Experiment without those of the selected questions whose prompt and answer may not fit the model's context,
    of `context` tokens (None: of no known limit). Raises UserError where none is left.
    """
    longest_answer = experiment.options.max_new_tokens
    asked: list[Question] = []
    lengths: dict[str, int] = {}
    left_out: list[str] = []
    for question in experiment.asked:
        length = len(experiment.prompt_ids(question))
        if context is not None and length + longest_answer > context:
            left_out.append(question.id)
        else:
            asked.append(question)
            lengths[question.id] = length
    dataset = experiment.options.dataset
    limit = f"the model's context of {context} tokens, with an answer of {longest_answer}"
    if not asked:
        raise UserError(f"{dataset}: no selected question fits {limit}: shorten them")
    if left_out:
        say(f"{dataset}: {len(left_out)} questions do not fit {limit}: they are left out ({name_some(left_out)})")
    return dataclasses.replace(experiment, asked=asked, lengths=lengths, left_out=left_out)


@contextlib.contextmanager
def open_output_folder(experiment: Experiment) -> Iterator[list[Entry]]:
    """Keeps the output folder to this round, and gives the entries that its results.json holds already."""
    folder = experiment.options.output_dir
    state = experiment.state
    lock = files.lock(folder) if state.is_main_process else contextlib.nullcontext()
    with lock, memory_errors():
        options = experiment.options
        # Entries of another run are replaced with --overwrite, and where one was interrupted that had begun to.
        replaces = options.overwrite or any(experiment.is_begun(ranking) for ranking in options.ranking)
        entries = files.read_results_of(folder / "results.json", experiment.provenance, replaces)
        state.wait_for_everyone()
        yield entries
        if state.num_processes > 1:
            state.destroy_process_group()


def wait_for_all(experiment: Experiment) -> bool:
    """Waits until all processes have done their share. True in the first one, which finishes the round."""
    experiment.state.wait_for_everyone()
    return experiment.state.is_main_process


def is_finished(asked: list[Question], journals: Mapping[Any, Journal]) -> bool:
    """Whether every journal has every question; says so."""
    for journal in journals.values():
        if _lacks_any(journal, asked):
            return False
    say("This round is finished; --overwrite starts it again.")
    return True


@dataclass(frozen=True)
class Work(Generic[Key]):
    """Batches that this process works off together; journals get their records at once.

    questions: of all the batches.  batches: numbers of these questions.  keys: of the journals that lack any of them.
    """

    questions: list[Question]
    batches: list[list[int]]
    keys: list[Key]

    @property
    def is_done(self) -> bool:
        """Whether no journal lacks any of the answers."""
        return not self.keys


def settle_sizes(options: Options, model: SplicedModel, journals: Mapping[Any, Journal]) -> Sizes:
    """Tokens in a batch and in the pool: what is asked for, what a journal that goes on was made with, or what fits."""
    batch = options.batch_tokens
    pool = options.pool_tokens
    for journal in journals.values():
        if journal:  # it goes on: the same batches give the same last digits
            batch = batch or journal.provenance.batch_tokens
            pool = pool or journal.provenance.pool_tokens
    sizes = plan.choose_sizes(model.device, model.lm.config, model.lm.dtype, batch, pool)
    say(f"{sizes.batch} tokens in a batch, {sizes.pool} in answers that go on together.")
    return sizes


def plan_work(
    experiment: Experiment,
    sizes: Sizes,
    asked: list[Question],
    journals: Mapping[Key, Journal],
    drafts: dict[str, list[int]] | None = None,
) -> list[Work[Key]]:
    """This process's share of the round, what is finished included: there `keys` is empty.

    drafts: tokens that each question's prompt is run with, by id. Batches and groups depend on the questions alone, so
    that an interrupted round ends in the same bytes as another, also in half precision.
    """
    state = experiment.state
    state.wait_for_everyone()  # all have read the journals before one of them writes
    lengths = []
    for question in asked:
        draft = drafts[question.id] if drafts else []
        lengths.append(experiment.lengths[question.id] + len(draft))
    contexts = [question.context for question in asked]
    batches = plan.plan_batches(lengths, sizes.batch, contexts)
    share = []
    first = 0  # the number of the group's first batch: processes take turns over all of them, groups of one included
    for group in plan.plan_groups(batches, lengths, sizes.group):
        start = (state.process_index - first) % state.num_processes
        own = group[start :: state.num_processes]
        first += len(group)
        if own:
            share.append(_make_work(asked, own, journals))
    return share


def _make_work(asked: list[Question], batches: list[list[int]], journals: Mapping[Key, Journal]) -> Work[Key]:
    """The Work of these batches, which are numbers of questions in `asked`."""
    questions: list[Question] = []
    numbers = []
    for batch in batches:
        of_batch = []
        for index in batch:
            of_batch.append(len(questions))
            questions.append(asked[index])
        numbers.append(of_batch)
    keys = []
    for key, journal in journals.items():
        if _lacks_any(journal, questions):
            keys.append(key)
    return Work(questions, numbers, keys)


def _lacks_any(journal: Journal, questions: list[Question]) -> bool:
    """Whether a journal lacks the record of any of these questions."""
    return any(journal.lacks(question.id) for question in questions)


class Bar:
    """Shows how many answers of this process's share are there. Moves within a group, and is right at its end.

    masks: how many answers each question gets; 1 in round 1, whose rankings share it.
    """

    def __init__(self, experiment: Experiment, label: str, share: list[Work[Key]], masks: int = 1):
        state = experiment.state
        if state.num_processes > 1:
            label += f", process 1 of {state.num_processes}"
        self.masks = masks
        total = masks * sum(len(work.questions) for work in share)
        missing = sum(self._count_missing(work) for work in share)
        self.done = total - missing  # once a group is finished
        self.reached: float = self.done  # within it
        self.bar = tqdm(total=total, initial=self.done, desc=label, unit="answer", disable=not state.is_main_process)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def _count_missing(self, work: Work) -> int:
        """How many answers of a group were not there when the round began."""
        return len(work.questions) * min(self.masks, len(work.keys))

    def move(self, count: float) -> None:
        """So many answers of the group under way have ended; parts of one add up."""
        self.reached += count
        self._show()

    def finish(self, work: Work) -> None:
        """The group is done: masks that several rankings or K share were run once."""
        self.done += self._count_missing(work)
        self.reached = self.done
        self._show()

    def _show(self) -> None:
        self.bar.update(int(self.reached) - self.bar.n)
