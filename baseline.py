"""Round 1: answer, keep the right ones, rank their latents.

    python baseline.py --demo                                # the bundled model, on the CPU
    python baseline.py                                       # gemma-2-9b-it, on a CUDA GPU
    python baseline.py --ranking baseline gradsae random     # the same answers, their latents ranked in three ways

Every question is answered with the residual stream at one layer replaced by an SAE's reconstruction. For each question
answered right, the TopK and BottomK latents by mean activation go to activations_baseline.json.
"""

import sys

from experiment import guard, options

KEEP_F1 = 0.9  # the authors keep a question whose unmasked answer reaches this F1, not only exact matches


def main():
    chosen = options.parse(None, __doc__, masks=False)
    import common  # brings in PyTorch: only once the options are known to be good
    from experiment import activations, answers, rounds

    # 1. The questions
    round_ = common.prepare(chosen)
    with rounds.writing(round_) as entries:
        # 2. What an earlier run left: a journal for each ranking
        activations.refuse_others(round_)
        journals = {name: round_.journal(name, round_.run_of(name)) for name in chosen.ranking}
        model = None
        if not rounds.is_finished(round_.asked, journals):
            # 3. The model, with the SAE's reconstruction in its residual stream
            model = common.load_for(round_, journals)
            # 4. Answer, score, keep, rank
            for batch, names, _ in rounds.share_batches(round_, model, round_.asked, journals, label="Round 1"):
                answered = answers.in_halves(
                    lambda part, names=names: answer_and_rank(round_, model, part, names), batch
                )
                for name in names:
                    journals[name].append([records[name] for records in answered])
        # 5. Write the activations, compare, print
        if rounds.is_last(round_):
            kept = rounds.write_activations(round_, journals)
            if chosen.ablation == "mean":
                activations.store_means(round_, model or common.load_for(round_, {}), kept)
            rounds.finish_round_1(round_, entries, journals, KEEP_F1)


def answer_and_rank(round_, model, batch, names):
    """{ranking: a journal's record} of each question of a batch: its answer, and where that is kept its latents.

    Answers are greedy, with the SAE spliced in and nothing masked. What is ranked is the sequence of prompt and answer
    before the last token with a [ in it.
    """
    import common
    from experiment import answers, prompts, rankings

    tokenizer, token_ids = round_.tokenizer, [round_.prompt_ids(question) for question in batch]
    contexts = [question.context for question in batch]
    guess = tokenizer(common.ANSWER_BEGINS, add_special_tokens=False)["input_ids"]  # saves time where it is right
    batch_answers, trace = answers.answer(model, token_ids, contexts, round_.options.max_new_tokens, guess)
    records = [common.score(tokenizer, question, answer) for question, answer in zip(batch, batch_answers)]
    brackets = [prompts.find_bracket(tokenizer, answer.tokens) for answer in batch_answers]
    kept = [n for n, record in enumerate(records) if record["f1"] >= KEEP_F1 and brackets[n] is not None]
    by_ranking = [dict.fromkeys(names, record) for record in records]
    if not kept:
        return by_ranking
    sequences = rankings.Sequences(
        ids=[batch[n].id for n in kept],
        prompts=[token_ids[n] for n in kept],
        generated=[batch_answers[n].tokens for n in kept],
        brackets=[brackets[n] for n in kept],
        insides=[prompts.find_answer(tokenizer, batch_answers[n].tokens) for n in kept],
        rows=kept,
        trace=trace,
        special_ids=prompts.find_special_ids(tokenizer),
    )
    for name in names:
        of_kept = zip(kept, sequences.generated, sequences.insides, sequences.active)
        for (n, tokens, inside, active), lists in zip(
            of_kept, rankings.rank(model, name, sequences, round_.options.seed)
        ):
            by_ranking[n][name] = records[n] | {"tokens": tokens, "inside": inside, "active": active} | lists
    return by_ranking


if __name__ == "__main__":
    sys.exit(guard(main))
