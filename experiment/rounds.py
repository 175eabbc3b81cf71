"""The two flows: rank (round 1) and mask (rounds 2 and 3). The only module that knows the order of things."""

import functools
import importlib.metadata
import sys

from accelerate.utils.memory import release_memory, should_reduce_batch_size
from tqdm import tqdm

import common
from experiment import UserError, generation, latents, questions, records, report

KEEP_F1 = 0.9  # the authors keep a question whose unmasked answer reaches this F1, not only exact matches
FIRST_TOKENS = 24  # "Result = [[ ... ]]" and the end of the turn: answers of up to some fifteen tokens fit
NAMES = {"topk": ("false", "TopK"), "bottomk": ("true", "BottomK")}
PACKAGES = ("torch", "transformers", "transformer-lens", "sae-lens", "datasets")


def say(text):
    """News for the person who waits; results go to standard output, news to standard error."""
    print(text, file=sys.stderr, flush=True)


say_once = functools.cache(say)  # for what is true of several files alike


# ---------------------------------------------------------------------------------------------------------------------
# What both flows begin with


class Setup:
    """What a round knows before it loads a model: tokenizer, prompt template, the data set and the run it makes."""

    def __init__(self, options):
        common.prepare(options)
        self.options = options
        self.tokenizer = common.load_tokenizer(options)
        self.template = common.choose_template(options.prompt_template, self.tokenizer)
        with common.hub_errors(options.dataset):
            self.dataset, unanswerable = questions.load(common.bundled(options.dataset), options.split)
        if unanswerable:
            say(f"{options.dataset}: {unanswerable} questions without a ground truth are left out")
        self.selected = questions.select(self.dataset, options.limit, options.sample, options.seed)
        self.run = {
            "demo": options.demo,
            "model": options.model,
            "sae_release": options.sae_release,
            "sae_id": options.sae_id,
            "ranking": "baseline",
            "dtype": options.dtype,
            "sae_dtype": options.sae_dtype,
            "dataset": options.dataset,
            "split": None if questions.is_local(options.dataset) else options.split,
            "questions": questions.digest(self.dataset),
            "prompt_template": self.template,
            "max_new_tokens": options.max_new_tokens,
            "limit": options.limit,
            "sample": options.sample,
            "seed": options.seed if options.sample else None,
            "device": options.device,
            "batch_tokens": options.batch_tokens,
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        }
        # Last: a mistake in the options touches no file.
        self.out = records.folder(options.output_dir)
        self.lock = records.lock(self.out)  # held as long as this process lives

    def prompt(self, question):
        return common.build_prompt(self.template, question.context, question.question)

    def prompt_ids(self, question):
        return common.tokenize(self.tokenizer, self.prompt(question))

    def load(self, journal, activations_run=None):
        """Model and SAE. Completes the run with what only the SAE's configuration says, and checks that too."""
        say(f"Loading {self.options.sae_release} and {self.options.model} ...")
        model, sae = common.load(self.options, self.tokenizer)
        late = {"hook_name": sae.cfg.metadata.hook_name, "d_sae": sae.cfg.d_sae}
        for found, path in ((journal.run, journal.path), (activations_run, self.options.activations)):
            if found and (named := records.differences(found, late, late)):
                raise UserError(f"{path}: is of another SAE ({named})")
        journal.run.update(late)
        return model, sae


def work_off(asked, setup, model, journal, work, label, share=False):
    """Answers every question that `journal` lacks.  work(batch, max_new_tokens): indices into `asked` -> records, with
    None for an answer that was not finished within max_new_tokens.

    The batches depend on the questions alone, and one with an unfinished question runs again whole: half-precision
    answers depend a little on the batch, so an interrupted run ends in the same bytes as an uninterrupted one.
    A batch lasts as long as its longest answer. So each first gets FIRST_TOKENS; the few answers that need more are
    put off (the journal says which) and generated from the start, together, when all others are done.
    """
    most, budget = setup.options.max_new_tokens, setup.options.batch_tokens
    lengths = [len(setup.prompt_ids(question)) for question in asked]
    check_lengths(asked, lengths, most, model)
    done = len(journal)
    if done:
        say(f"{done} of {len(asked)} questions are in {journal.path} already")
    work = halved_when_memory_runs_out(work)
    with tqdm(total=len(asked), initial=done, desc=label, unit="question", smoothing=0.1) as bar:
        first = min(FIRST_TOKENS, most)
        for tokens in sorted({first, most}):
            left = [i for i, question in enumerate(asked) if tokens == first or journal.put_off(question.id)]
            contexts = [asked[i].context for i in left] if share else None
            for batch in generation.plan_batches([lengths[i] for i in left], budget, contexts):
                batch = [left[i] for i in batch]
                if all(asked[i].id in journal or tokens < most and journal.put_off(asked[i].id) for i in batch):
                    continue
                found = work(batch, tokens)
                before = len(journal)
                journal.append(
                    [record for record in found if record], [asked[i].id for i, r in zip(batch, found) if r is None]
                )
                bar.update(len(journal) - before)


def check_lengths(asked, lengths, max_new_tokens, model):
    """Refuses, before anything is answered, prompts that with their answers do not fit the model's context."""
    longest = max(range(len(asked)), key=lambda i: lengths[i])
    if lengths[longest] + max_new_tokens > model.cfg.n_ctx:
        raise UserError(
            f"question {asked[longest].id}: its prompt of {lengths[longest]} tokens and an answer of {max_new_tokens} "
            f"do not fit the model's context of {model.cfg.n_ctx} tokens: shorten or remove it"
        )


def halved_when_memory_runs_out(work):
    """`work` in parts: after an out-of-memory error in halves, quarters ..., from then on. Says so each time."""
    largest = None

    def in_parts(batch, tokens):
        nonlocal largest
        while True:
            size = min(len(batch), largest or len(batch))
            try:
                return [r for start in range(0, len(batch), size) for r in work(batch[start : start + size], tokens)]
            except Exception as error:
                if size == 1 or not should_reduce_batch_size(error):
                    raise
            largest = size // 2
            release_memory()
            say(f"Out of memory with {size} questions in a batch: going on with {largest}; nothing is lost.")

    return in_parts


def answered(setup, model, question, ids, max_new_tokens):
    """The record of one generated answer: its text, the answer parsed from it, and its scores; None if it goes on."""
    ended = ids[-1] in model.original_model.generation_config.eos_token_id
    if not ended and max_new_tokens < setup.options.max_new_tokens:
        return None
    text = setup.tokenizer.decode(ids)
    answer = common.parse_answer(setup.tokenizer.decode(ids, skip_special_tokens=True))
    return {"id": question.id, "text": text, "answer": answer} | questions.score(answer, question.truths)


def finish(setup, journal, entry, entries):
    """Puts a round's entry into results.json, in place of the one of the same round and K."""
    fresh = [e for e in entries if (e["round"], e["k"]) != (entry["round"], entry["k"])]
    records.write_results(setup.out / "results.json", [*fresh, {"run": journal.run} | entry])


# ---------------------------------------------------------------------------------------------------------------------
# Round 1


def rank(options):
    """Round 1: answer every question, keep the right ones, rank the latents of those -> activations_baseline.json."""
    setup = Setup(options)
    asked = setup.selected
    entries = records.read_results(setup.out / "results.json", setup.run, options.overwrite, say_once)
    check_old_activations(setup)
    journal = records.Journal(setup.out / "predictions_baseline.jsonl", setup.run, options.overwrite, say_once)
    if len(journal) < len(asked):
        model, sae = setup.load(journal)
        work = functools.partial(answer_and_rank, setup, model, sae, asked)
        work_off(asked, setup, model, journal, work, "Round 1", share=True)
    else:
        say(f"Round 1 is finished ({journal.path}); --overwrite starts it again.")
    counts, clean = count_answers(journal, asked)
    run = journal.run | {"asked": counts["asked"], "kept": counts["kept"]}
    samples = (
        {name: record[name] for name in ("id", "answer", "em", "f1", "active", "topk", "bottomk")}
        for record in journal.read(q.id for q in asked)
        if "topk" in record
    )
    records.write_activations(options.activations, run, samples)
    rows = [{"masked": f"none, {which}", "k": "-"} | clean[which] for which in ("all asked", "kept")]
    finish(setup, journal, {"round": "baseline", "k": None} | counts | clean["kept"], entries)
    print(
        f"\nRound 1: {counts['asked']} questions asked, {counts['kept']} answered right and kept "
        f"({100 * counts['kept'] / counts['asked']:.1f}%), {counts['wrong']} answered wrong, "
        f"{counts['unranked']} right but without any [ to rank at.\n\n{report.table(rows)}\n\n"
        f"Latents of the kept questions: {options.activations}"
    )


def check_old_activations(setup):
    """Refuses, before anything is run, to replace the activations file of another run, or a file that is none."""
    path = setup.options.activations
    if path.exists() and not setup.options.overwrite:
        found, _ = records.read_activations(path)
        if found is None:
            raise UserError(f"{path}: is the authors' published file: give another --activations, or --overwrite")
        fields = {field: setup.run[field] for field in found if field in setup.run}
        records.replaceable(path, found, fields, False, say_once)


def answer_and_rank(setup, model, sae, asked, batch, max_new_tokens):
    """The records of a batch of round 1: answers and, for questions answered right with a [ in them, latents."""
    batch = [asked[i] for i in batch]
    prompts = [setup.prompt_ids(question) for question in batch]
    contexts = [question.context for question in batch]
    outputs, residuals = generation.answer(model, sae, prompts, max_new_tokens, contexts=contexts, keep_residuals=True)
    found = [answered(setup, model, question, ids, max_new_tokens) for question, ids in zip(batch, outputs)]
    for record, prompt, ids, residual in zip(found, prompts, outputs, residuals):
        bracket = last_bracket(setup.tokenizer, ids)
        if record and record["f1"] >= KEEP_F1 and bracket is not None:
            # The residual does not depend on the splice, which comes after it: what was seen while answering will do.
            record |= latents.rank(sae, residual[: len(prompt) + bracket])
    return found


def last_bracket(tokenizer, ids):
    """The position of the last generated token whose text contains [, or None. Latents are ranked just before it."""
    for position in reversed(range(len(ids))):
        if "[" in tokenizer.decode([ids[position]]):
            return position
    return None


def count_answers(journal, asked):
    """How many were asked, kept, wrong and right but not to be ranked; and the scores of all asked and of the kept."""
    counts = dict.fromkeys(("asked", "kept", "wrong", "unranked"), 0)
    scores = {"all asked": [], "kept": []}
    for record in journal.read(question.id for question in asked):
        score = {metric: record[metric] for metric in report.METRICS}
        counts["asked"] += 1
        counts["kept" if "topk" in record else "unranked" if record["f1"] >= KEEP_F1 else "wrong"] += 1
        scores["all asked"].append(score)
        if "topk" in record:
            scores["kept"].append(score)
    return counts, {which: report.mean_scores(values) for which, values in scores.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Rounds 2 and 3


def mask(options, which):
    """Rounds 2 and 3: the kept questions again, each with its own TopK (`which`: topk) or BottomK (bottomk) masked."""
    word, label = NAMES[which]
    activations_run, samples = records.read_activations(options.activations)
    setup = Setup(options)
    samples, missing = match_samples(setup, activations_run, samples)
    asked = [question for question in setup.selected if question.id in samples]
    if not asked:
        raise UserError(
            f"{options.activations}: none of its questions is among the {len(setup.selected)} selected ones"
        )
    masked = {q.id: samples[q.id][which][: masked_count(options.k, samples[q.id]["active"])] for q in asked}
    fewer = sum(len(masked[q.id]) < masked_count(options.k, samples[q.id]["active"]) for q in asked)
    run = setup.run | {"masked": which, "k": options.k, "activations": records.digest_samples(samples.values())}

    suffix = "" if options.k == "50%" else f"_k{options.k.replace('%', 'pct')}"
    entries = records.read_results(setup.out / "results.json", run, options.overwrite, say_once)
    journal = records.Journal(setup.out / f"predictions_{word}{suffix}.jsonl", run, options.overwrite, say_once)
    if len(journal) < len(asked):
        model, sae = setup.load(journal, activations_run)
        check_latents(options.activations, masked, sae.cfg.d_sae)

        def answer_masked(batch, max_new_tokens):
            prompts = [setup.prompt_ids(asked[i]) for i in batch]
            rows = [masked[asked[i].id] for i in batch]
            outputs, _ = generation.answer(model, sae, prompts, max_new_tokens, rows)
            return [answered(setup, model, asked[i], ids, max_new_tokens) for i, ids in zip(batch, outputs)]

        work_off(asked, setup, model, journal, answer_masked, f"{label} masked")
    else:
        say(f"This round is finished ({journal.path}); --overwrite starts it again.")

    # Unmasked and masked figures are over the same questions, in the same order.
    clean = None
    if activations_run is not None:
        clean = report.mean_scores(questions.score(samples[q.id]["answer"], q.truths) for q in asked)
    after = report.mean_scores(journal.read(q.id for q in asked))
    drop = report.drops(clean, after)
    mean_k = sum(map(len, masked.values())) / len(masked)
    rows = [{"masked": "none", "k": "-"} | clean] if clean else []
    rows.append({"masked": label, "k": f"{options.k} (mean {mean_k:.1f})", "drop": drop} | after)
    entry = {"round": word, "k": options.k, "mean_k": mean_k, "fewer_than_k": fewer, "clean": clean, "drop": drop}
    entry["missing"] = missing  # in the activations file, but not in the data set: in no figure
    finish(setup, journal, entry | after, entries)
    print(f"\n{label} of each question masked:\n\n{report.table(rows)}\n")
    if clean is None:
        print(f"{options.activations} holds no unmasked answers: there is nothing to compute a drop from.")
    if fewer:
        print(
            f"{fewer} of {len(asked)} questions have fewer than {options.k} ranked latents: all they have are masked."
        )


def match_samples(setup, activations_run, samples):
    """The samples by question id, and what names those that the data set lacks. Refuses activations of another run."""
    path = setup.options.activations
    known = {question.id: question for question in setup.dataset}
    if activations_run is None:
        say(f"{path}: the authors' published form: model, SAE, layer and dtype that made it cannot be checked.")
        by_prompt = {}
        for question in setup.dataset:
            by_prompt.setdefault(setup.prompt(question), []).append(question.id)
        for sample in samples:  # the same prompt twice: the first stands for the first question, and so on
            ids = by_prompt.get(sample["prompt"])
            sample["id"] = ids.pop(0) if ids else None
        missing = [sample["prompt"] for sample in samples if sample["id"] is None]
    else:
        if named := records.differences(activations_run, setup.run, records.COMPARED):
            raise UserError(f"{path}: is of another run ({named}): repeat its options, or run baseline.py again")
        missing = [sample["id"] for sample in samples if sample["id"] not in known]
    if missing:
        named = ", ".join(repr(name[-80:]) for name in missing[:5])
        say(f"{path}: {len(missing)} of its {len(samples)} questions are not in the data set: {named}")
    return {sample["id"]: sample for sample in samples if sample["id"] in known}, missing


def masked_count(k, active):
    """K for one question: the number asked for, or that percentage (rounded down) of its active latents."""
    return len(active) * int(k[:-1]) // 100 if k.endswith("%") else int(k)


def check_latents(path, masked, d_sae):
    for question_id, ids in masked.items():
        if ids and max(ids) >= d_sae:
            raise UserError(f"{path}: question {question_id} names latent {max(ids)}, but the SAE has {d_sae}")
