"""Round 1: answer, keep the right ones, rank their latents.

    python baseline.py --demo                                # the bundled model, on the CPU
    python baseline.py                                       # gemma-2-9b-it, on a CUDA GPU
    python baseline.py --ranking baseline gradsae random     # the same answers, their latents ranked in three ways

Every question is answered with the residual stream at one layer replaced by an SAE's reconstruction. For each question
answered right, the TopK and BottomK latents by mean activation go to activations_baseline.json.
"""

import sys

from experiment import guard, options, say

KEEP_F1 = 0.9  # the authors keep a question whose unmasked answer reaches this F1, not only exact matches


def main():
    chosen = options.parse(None, __doc__, masks=False)
    import common  # brings in PyTorch: only once the options are known to be good
    from experiment import activations, rounds

    # 1. The questions
    round_ = common.prepare(chosen)
    asked, names = round_.asked, list(dict.fromkeys(["baseline", *chosen.ranking]))  # the baseline's comes by itself

    with rounds.writing(round_) as entries:
        # 2. What an earlier run left: the baseline's journal has every answer, another ranking's those that are kept
        rounds.check_old_activations(round_, names)
        journals = {name: round_.journal(name, round_.run_of(name)) for name in names}

        def is_done(batch):
            return all(
                question.id in journals["baseline"]
                and ("latents" not in journals["baseline"][question.id] or question.id in journals[name])
                for question in batch
                for name in names
            )

        model = None
        if is_done(asked):
            say("Round 1 is finished; --overwrite starts it again.")
        else:
            # 3. The model, with the SAE's reconstruction in its residual stream
            model = common.load_for(round_, journals.values())
            # 4. Answer, score, keep, rank
            for batch in rounds.share_batches(round_, model, asked, [[]] * len(asked), is_done, "Round 1"):
                records, sequences = answer(round_, model, batch, journals["baseline"])
                ranked = rank(model, sequences, names, chosen.seed)
                for name in reversed(names):  # the answers last: a batch that has them has all its rankings
                    lists = {question_id: {"latents": {name: found}} for question_id, found in ranked[name].items()}
                    kept = [record | lists[record["id"]] for record in records if record["id"] in lists]
                    wrong = [record for record in records if record["id"] not in lists]
                    journals[name].append(kept + wrong if name == "baseline" else kept)

        # 5. Write the activations, count, print
        kept = rounds.finish_round_1(round_, entries, journals, KEEP_F1)
        if chosen.ablation == "mean" and round_.state.is_main_process:
            tokens = [journals["baseline"][question.id]["tokens"] for question in kept]
            activations.store_means(round_, model or common.load_for(round_, []), kept, tokens)


def answer(round_, model, batch, answered):
    """Answers a batch of questions greedily, with the SAE spliced in and nothing masked.

    Returns a journal's record of each, and for each that is kept the sequence of tokens whose latents are ranked: the
    prompt, and what was generated before the last token with a [ in it.
    """
    import common
    from experiment import answers, prompts, rankings

    known = all(question.id in answered for question in batch)  # another ranking of finished answers is asked for
    if known:
        batch = [question for question in batch if "latents" in answered[question.id]]

    def work(part):
        ids, contexts = [round_.prompt_ids(q) for q in part], [q.context for q in part]
        tokens = [answered[q.id]["tokens"] for q in part] if known else None
        return answers.answer(model, ids, contexts, round_.options.max_new_tokens, tokens)

    records, sequences = [], []
    for question, found in zip(batch, answers.in_halves(work, batch) if batch else []):
        record = answered[question.id] if known else common.score(round_.tokenizer, question, found)
        bracket = prompts.find_bracket(round_.tokenizer, found.tokens)
        if record["f1"] >= KEEP_F1 and bracket is not None:
            inside = prompts.find_answer(round_.tokenizer, found.tokens)
            sequence = rankings.Sequence(
                question.id, round_.prompt_ids(question), found.tokens, bracket, inside, found.latents
            )
            record = record | {"tokens": found.tokens, "active": sequence.active}
            sequences.append(sequence)
        records.append({name: value for name, value in record.items() if name != "latents"})
    return records, sequences


def rank(model, sequences, names, seed):
    """{ranking: {question id: its lists topk and bottomk, and what masking their beginnings removes}}."""
    from experiment import rankings

    ranked = {}
    for name in names:
        found = rankings.rank(model, name, sequences, seed, ranked.get("baseline"))
        ranked[name] = {sequence.id: lists for sequence, lists in zip(sequences, found)}
    return ranked


if __name__ == "__main__":
    sys.exit(guard(main))
