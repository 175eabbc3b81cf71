"""Round 1: answer, keep the right ones, rank their latents.

    python baseline.py --demo                                # the bundled model, on the CPU
    python baseline.py                                       # gemma-2-9b-it, on a CUDA GPU
    python baseline.py --ranking baseline gradsae random     # the same answers, their latents ranked in three ways

Every question is answered with the residual stream at one layer replaced by an SAE's reconstruction. Those answered
right (F1 >= 0.9) are kept. What is ranked is the prompt with the answer up to its last [: the latents of highest and
lowest mean activation over these positions go to activations_baseline.json, 100 of each at least, where there are so
many. How many of them rounds 2 and 3 mask, their --k says: a number, or a share of the latents active at the last of
these positions (half of them, as in the paper).

A round works off a group of batches at a time, and every finished group is on disk before the next begins. Killed, it
has lost the group under way; the same command goes on with that one.
"""

import sys

from experiment import guard, options

if __name__ == "__main__":
    options.stop_at_mistakes(__doc__, masks=None)  # before PyTorch is imported, which takes seconds

import common
from experiment import activations, means, own_rankings, prompts, results, rounds, say
from experiment.intervention import effects, generate, ranked_lists
from experiment.intervention.forward import SplicedModel
from experiment.intervention.generate import Group
from experiment.intervention.memory import halve_on_oom
from experiment.intervention.plan import Sizes
from experiment.intervention.pool import Limits
from experiment.intervention.ranked_lists import RankedLists
from experiment.intervention.rows import Answer
from experiment.intervention.sequences import SequenceActivations, Sequences
from experiment.masks import EFFECT
from experiment.records.journal import Journal, name_unmasked
from experiment.records.schema import KeptRecord, Record
from experiment.rounds import Bar, Experiment, Work

KEEP_F1 = 0.9  # the authors keep a question whose unmasked answer reaches this F1, not only exact matches


def main() -> None:
    chosen = options.leave_out_others(options.parse(None, __doc__, masks=None))

    # 1. The questions
    experiment = common.prepare(chosen)
    with rounds.open_output_folder(experiment) as entries:
        # 2. What an earlier run left: a journal for each ranking
        activations.refuse_others(experiment)
        journals: dict[str, Journal] = {}
        for ranking in chosen.ranking:
            provenance = experiment.round_1_of(ranking)
            journals[ranking] = experiment.journal(name_unmasked(provenance), provenance)
        model = None
        if not rounds.is_finished(experiment.asked, journals):
            # 3. The model, with the SAE's reconstruction in its residual stream
            for ranking in chosen.ranking:
                if own_rankings.is_own(ranking):
                    own_rankings.load(ranking)  # one that cannot be imported fails before weights are loaded
            model, sizes = common.load_for(experiment, journals)
            # 4. Answer, score, keep, rank: a group of batches at a time, of those that fall to this process
            share = rounds.plan_work(experiment, sizes, experiment.asked, journals)
            say_cost_of_effects(experiment, model, sizes, share)
            with Bar(experiment, "Round 1", share) as bar:
                for work in share:
                    if work.is_done:
                        continue
                    records = answer_and_rank(experiment, model, sizes, work, bar)
                    for ranking in work.keys:
                        journals[ranking].append(records[ranking])
                    bar.finish(work)
        # 5. Write the activations, compare, print
        if rounds.wait_for_all(experiment):
            kept = results.store_activations(experiment, journals)
            if chosen.ablation == "mean":
                if model is None:
                    model, sizes = common.load_for(experiment, journals)
                means.store(experiment, model, sizes, kept)
            results.finish_round_1(experiment, entries, journals, KEEP_F1)


def say_cost_of_effects(experiment: Experiment, model: SplicedModel, sizes: Sizes, share: list[Work[str]]) -> None:
    """Says how many passes it takes at most to mask latents one by one, where that is what is left to do."""
    lengths = []
    for work in share:
        if EFFECT in work.keys:
            lengths += [experiment.lengths[question.id] for question in work.questions]
    if lengths:
        latents = min(experiment.options.effects, model.splice.d_sae)
        passes = effects.count_passes(lengths, latents, sizes.batch)
        say(
            f"--ranking effect: up to {latents} latents of each question that is kept are masked one by one: "
            f"about {passes} passes of {sizes.batch} tokens at most."
        )


def answer_and_rank(
    experiment: Experiment, model: SplicedModel, sizes: Sizes, work: Work[str], bar: Bar
) -> dict[str, list[Record]]:
    """{ranking: a record of each question of a group of batches}: its answer, and where that is kept its latents.

    Answers are greedy, with the SAE spliced in and nothing masked.
    """
    chosen = experiment.options
    tokenizer = experiment.tokenizer
    group = Group(
        prompts=[experiment.prompt_ids(question) for question in work.questions],
        contexts=[question.context for question in work.questions],
        batches=work.batches,
    )
    # Proposed to the model, which takes it or not: it saves steps and changes no answer.
    opening = tokenizer(common.ANSWER_BEGINS, add_special_tokens=False)["input_ids"]
    limits = Limits(chosen.max_new_tokens, sizes.pool)

    def move_with_answers(count: int) -> None:
        """Moves the bar as answers end, unless effects are to come, which take most of the time."""
        if EFFECT not in work.keys:
            bar.move(count)

    answers, read = generate.answer(model, group, limits, opening, move_with_answers)
    records = []
    for question, answer in zip(work.questions, answers):
        records.append(common.make_record(tokenizer, question, answer))
    right = sum(record.f1 >= KEEP_F1 for record in records)
    by_ranking = {ranking: list(records) for ranking in work.keys}
    settings = ranked_lists.Settings(chosen.seed, sizes.batch, chosen.effects, chosen.draws)

    def move_with_effects(count: int) -> None:
        """Moves the bar where the effects of so many right answers are measured: the wrong ones take no time."""
        bar.move(count * len(records) / right)

    def rank(part: list[int]) -> None:
        """Puts latents into the records of a batch's right answers, or of a part's that memory is enough for."""
        sequences = find_sequences(experiment, group, answers, records, read, part)
        if not sequences.rows:
            return
        ranked = ranked_lists.rank_all(model, work.keys, sequences, settings, chosen.ranking, move_with_effects)
        for ranking, lists in ranked.items():
            for number, row in enumerate(sequences.rows):
                kept = make_kept(records[row], sequences, number, lists[number])
                by_ranking[ranking][row] = kept

    for batch in work.batches:
        halve_on_oom(rank, batch)
    return by_ranking


def make_kept(record: Record, sequences: Sequences, number: int, lists: RankedLists) -> KeptRecord:
    """A right answer's record with its latents by one ranking. number: the answer's in `sequences`."""
    latents = {
        "tokens": sequences.generated[number],
        "inside": sequences.answer_positions[number],
        "active": sequences.active[number],  # at the last position: what a K in percent is a share of
    }
    fields = record.fields() | latents | lists.fields()
    return KeptRecord.model_validate(fields)


def find_sequences(
    experiment: Experiment,
    group: Group,
    answers: list[Answer],
    records: list[Record],
    read: SequenceActivations,
    batch: list[int],
) -> Sequences:
    """The right answers of a batch with their prompts, and the place in each where what is ranked of it ends.

    That is before the last token with a [ in it, as in the paper (the parser of answers takes the first [); an answer
    without any is not ranked, and so not kept. `Sequences.ranked` cuts there.
    read: what the SAE read in the whole group.  batch: numbers of the group's questions.
    """
    tokenizer = experiment.tokenizer
    rows = []
    brackets = []
    for row in batch:
        bracket = prompts.find_bracket(tokenizer, answers[row].tokens)
        if records[row].f1 >= KEEP_F1 and bracket is not None:
            rows.append(row)
            brackets.append(bracket)
    generated = [answers[row].tokens for row in rows]
    return Sequences(
        ids=[records[row].id for row in rows],
        prompts=[group.prompts[row] for row in rows],
        generated=generated,
        brackets=brackets,
        answer_positions=[prompts.find_answer(tokenizer, tokens) for tokens in generated],
        rows=rows,
        read=read,
        special_ids=prompts.find_special_ids(tokenizer),
    )


if __name__ == "__main__":
    sys.exit(guard(main))
