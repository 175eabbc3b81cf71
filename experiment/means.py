"""For --ablation mean: the mean activation of each latent, and what setting latents to it changes."""

from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from experiment import UserError, prompts
from experiment.intervention import generate, plan, ranked_lists
from experiment.intervention.forward import SplicedModel
from experiment.intervention.generate import Group
from experiment.intervention.memory import halve_on_oom
from experiment.intervention.plan import Sizes
from experiment.intervention.pool import Limits
from experiment.intervention.ranked_lists import RankedLists
from experiment.intervention.sequences import SequenceActivations, Sequences
from experiment.questions import Question
from experiment.records import files
from experiment.records.schema import KeptRecord, Means, RankedQuestion
from experiment.rounds import Experiment


def store(experiment: Experiment, model: SplicedModel, sizes: Sizes, kept: dict[Question, KeptRecord]) -> None:
    """Each latent's mean activation over all positions of the kept questions and answers, and what setting the first
    1, 2, ... latents of each list to it changes.

    kept: {question: its record}. The means go to means.json, the rest beside each ranking's activations: rounds 2 and 3
    read both. means.json comes last: where it is, the others are.
    """
    tokens = []
    for record in kept.values():
        assert record.tokens is not None  # round 1 writes them with the latents
        tokens.append(record.tokens)
    read = Reader(experiment, model, sizes, list(kept), tokens)
    means, positions = find_means(read)
    for ranking in experiment.options.ranking:
        path = experiment.activations_file(ranking)
        provenance = experiment.provenance_of(ranking)
        ranked: list[RankedQuestion] = []
        if kept:
            content = files.read_activations(path)
            assert isinstance(content, files.Activations)  # it is this round's own
            provenance, ranked = content
        measured = measure_lists(read, ranking, ranked, means)
        files.write_activations(files.name_mean_file(path), provenance.with_fields(ablation="mean"), measured)
    of_latents = Means(run=experiment.provenance, positions=positions, means=means.tolist())
    files.write_means(experiment.options.output_dir / "means.json", of_latents)


class Reader:
    """Kept questions and their answers, whose activations are read again, one batch after another.

    prompts, tokens: of each question, the prompt's and the answer's token ids.
    """

    def __init__(
        self,
        experiment: Experiment,
        model: SplicedModel,
        sizes: Sizes,
        questions: list[Question],
        tokens: list[list[int]],
    ):
        self.experiment = experiment
        self.model = model
        self.sizes = sizes
        self.contexts = [question.context for question in questions]
        self.prompts = [experiment.prompt_ids(question) for question in questions]
        self.tokens = tokens

    def plan(self) -> list[list[int]]:
        """Batches of the questions' numbers."""
        lengths = [len(prompt) + len(tokens) for prompt, tokens in zip(self.prompts, self.tokens)]
        return plan.plan_batches(lengths, self.sizes.batch, self.contexts)

    def read(self, part: Sequence[int]) -> SequenceActivations:
        """What the SAE reads in these questions' prompts and answers, but for the answers' last token."""
        texts = []  # each of them run as a prompt
        contexts: list[Hashable] = []
        for number in part:
            tokens = self.tokens[number]
            texts.append(self.prompts[number] + tokens[:-1])
            contexts.append(self.contexts[number])
        batch = list(range(len(part)))
        group = Group(texts, contexts, batches=[batch])
        # One token more says nothing new: what counts is what the SAE reads on the way there.
        limits = Limits(1, self.sizes.pool)
        _, read = generate.answer(self.model, group, limits)
        return read


def find_means(reader: Reader) -> tuple[Float[Tensor, "d_sae"], int]:
    """Each latent's mean activation over all positions of these prompts and answers, and how many there are."""
    splice = reader.model.splice
    total = torch.zeros(splice.d_sae, dtype=torch.float64, device=splice.device)
    positions = 0

    def add_up(part: Sequence[int]) -> None:
        nonlocal positions
        read = reader.read(part)
        lengths = read.rows.bincount().tolist()
        rows = list(range(len(part)))
        latents = read.select(rows, lengths).latents
        values = latents.values.double()
        total.index_add_(0, latents.ids, values)
        positions += int(latents.spliced.sum())

    for batch in reader.plan():
        halve_on_oom(add_up, batch)
    means = total / max(1, positions)
    return means.float(), positions


def measure_lists(
    reader: Reader, ranking: str, ranked: list[RankedQuestion], means: Float[Tensor, "d_sae"]
) -> list[RankedQuestion]:
    """Ranked questions with what setting their latents to these means changes, in place of what zeroing removes;
    of the matched ranking also what it changes of the baseline's."""
    tokenizer = reader.experiment.tokenizer
    measured: dict[int, RankedQuestion] = {}

    def measure(part: Sequence[int]) -> None:
        generated = [reader.tokens[number] for number in part]
        brackets = []
        for tokens in generated:
            bracket = prompts.find_bracket(tokenizer, tokens)
            assert bracket is not None  # without one a question is not kept
            brackets.append(bracket)
        sequences = Sequences(
            ids=[ranked[number].id for number in part],
            prompts=[reader.prompts[number] for number in part],
            generated=generated,
            brackets=brackets,
            answer_positions=[ranked[number].inside or [] for number in part],  # unknown in older files, not asked for
            rows=list(range(len(part))),
            read=reader.read(part),
            special_ids=prompts.find_special_ids(tokenizer),
        )
        lists = []
        for number in part:
            lists.append(take_lists(ranked[number]))
        lists = ranked_lists.measure_again(reader.model, ranking, sequences, lists, means)
        for number, of_question in zip(part, lists):
            measured[number] = ranked[number].with_fields(**of_question.fields())

    for batch in reader.plan():
        halve_on_oom(measure, batch)
    return [measured[number] for number in range(len(ranked))]


def take_lists(question: RankedQuestion) -> RankedLists:
    """A ranked question's lists of latents, those of further draws among them."""
    draws = None
    if question.more_draws is not None:
        draws = [RankedLists(draw.topk, draw.bottomk) for draw in question.more_draws]
    return RankedLists(question.topk, question.bottomk, more_draws=draws)


def load(experiment: Experiment, means: list[float], model: SplicedModel) -> Float[Tensor, "d_sae"]:
    """These means on the SAE's device."""
    if len(means) != model.splice.d_sae:
        raise UserError(f"{experiment.options.output_dir / 'means.json'}: is of another SAE: move it away")
    return torch.tensor(means, dtype=torch.float32, device=model.splice.device)
