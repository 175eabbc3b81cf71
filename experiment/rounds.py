"""The two flows: rank (round 1) and mask (rounds 2 and 3). The only module that knows the order of things."""

import array
import contextlib
import dataclasses
import functools
import importlib.metadata
import os
import sys

from accelerate.utils.memory import release_memory, should_reduce_batch_size
from tqdm import tqdm

import common
from experiment import UserError, generation, latents, questions, records, report

KEEP_F1 = 0.9  # the authors keep a question whose unmasked answer reaches this F1, not only exact matches
FEW = 16  # one question in so many may keep a batch no longer: to begin its answer again later costs less
GRADIENT_TOKENS = 16  # an estimate: what a token takes on the way back, against one in the cache; not measured
WORDS = {"topk": "false", "bottomk": "true"}  # the authors' names of rounds 2 and 3
PACKAGES = ("torch", "transformers", "transformer-lens", "sae-lens", "datasets")


def say(text):
    """News for the person who waits; results go to standard output, news to standard error."""
    if common.is_first_process():
        print(text, file=sys.stderr, flush=True)


say_once = functools.cache(say)  # for what is true of several files alike


# ---------------------------------------------------------------------------------------------------------------------
# What both flows begin with


class Setup:
    """What a round knows before it loads a model: tokenizer, prompt template, the data set and the run it makes."""

    def __init__(self, options):
        common.prepare(options)
        self.number, self.processes, self.wait = common.processes(options)
        self.is_first = self.number == 0  # the one process that writes more than a part of a journal
        self.options = options
        self.tokenizer = common.load_tokenizer(options)
        self.template = common.choose_template(options.prompt_template, self.tokenizer)
        if common.seems_untuned(options, self.tokenizer):
            say(
                f"Warning: {options.model} looks like a base model, not an instruction-tuned one: such a model was not "
                "trained to follow the prompt."
            )
        self.bypass = common.special_ids(self.tokenizer) if options.exclude_special_tokens else ()
        with common.hub_errors(options.dataset):
            self.dataset, unanswerable = questions.load(common.bundled(options.dataset), options.split)
        if unanswerable:
            say(f"{options.dataset}: {unanswerable} questions without a ground truth are left out")
        self.selected = questions.select(self.dataset, options.limit, options.sample, options.seed)
        # The run of the unmasked answers, which are the same for every ranking and have the baseline's beside them.
        self.run = {
            "demo": options.demo,
            "model": options.model,
            "sae_release": options.sae_release,
            "sae_id": options.sae_id,
            "ranking": "baseline",
            "dtype": options.dtype,
            "sae_dtype": options.sae_dtype,
            "exclude_special_tokens": options.exclude_special_tokens,
            "dataset": options.dataset,
            "split": None if questions.is_local(options.dataset) else options.split,
            "questions": questions.digest(self.dataset),
            "prompt_template": self.template,
            "max_new_tokens": options.max_new_tokens,
            "limit": options.limit,
            "sample": options.sample,
            "seed": options.seed if options.sample else None,
            "device": options.device_map or options.device,
            "batch_tokens": options.batch_tokens,
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        }
        self.ranked_run = self.run | {"ranking": options.ranking}
        if options.ranking == "random":
            self.ranked_run["ranking_seed"] = options.seed
        self._loaded = None

    def prompt(self, question):
        return common.build_prompt(self.template, question.context, question.question)

    def prompt_ids(self, question):
        return common.tokenize(self.tokenizer, self.prompt(question))

    @contextlib.contextmanager
    def writing(self):
        """Keeps the output folder to this process, and reads and checks its results. Until then no file is touched."""
        self.out = records.folder(self.options.output_dir)
        lock = records.lock(self.out) if self.is_first else None
        try:
            self.results = self.out / "results.json"
            self.entries = records.read_results(self.results, self.ranked_run, self.options.overwrite, say_once)
            try:
                report.table(self.entries)
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise UserError(f"{self.results}: is damaged ({error!r}): move it away") from None
            yield
            self.wait()
        finally:
            if self.is_first:
                lock.release()

    def journal(self, name, run):
        """A journal as an earlier run left it, parts of several processes included."""
        path, overwrite = self.out / f"predictions_{name}.jsonl", self.options.overwrite
        if self.is_first:
            journal = records.Journal(path, run, overwrite, say_once)
            journal.absorb_parts(overwrite)
        self.wait()
        return journal if self.is_first else records.Journal(path, run, overwrite, say_once)

    def load(self, journal, activations_run=None):
        """Model and SAE. Completes the journal's run with what only the SAE's configuration says, and checks it."""
        if self._loaded is None:
            say(f"Loading {self.options.sae_release} and {self.options.model} ...")
            self._loaded = common.load(self.local_options(), self.tokenizer)
        model, sae = self._loaded
        late = {"hook_name": sae.cfg.metadata.hook_name, "d_sae": sae.cfg.d_sae}
        for found, path in ((journal.run, journal.path), (activations_run, self.options.activations)):
            if found and (named := records.differences(found, late, late)):
                raise UserError(f"{path}: is of another SAE ({named})")
        journal.run.update(late)
        return model, sae

    def local_options(self):
        """The options with this process's own device, where there are several."""
        if self.processes > 1 and self.options.device == "cuda":
            return dataclasses.replace(self.options, device=f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        return self.options

    def tell(self, text):
        """Results, once."""
        if self.is_first:
            print(text)

    def finish(self, run, entry):
        """Puts a round's entry into results.json, in place of the one of the same round, ranking and K."""

        def key(entry):
            return entry["round"], entry["run"]["ranking"], entry["k"]

        entry = {"run": run} | entry
        self.entries = [old for old in self.entries if key(old) != key(entry)] + [entry]
        if self.is_first:
            records.write_results(self.results, self.entries)


def work_off(setup, asked, lengths, journal, work, label, budget, contexts=None):
    """Answers every question that `journal` lacks.  work(batch, few): indices into `asked` -> records, with None for
    the at most `few` answers that are unfinished when all others have ended.

    lengths: tokens of each.  budget, contexts: as in `generation.plan_batches`.
    The batches depend on the questions alone, and one with an unfinished question runs again whole: half-precision
    answers depend a little on the batch, so an interrupted run ends in the same bytes as an uninterrupted one.
    A batch lasts as long as its longest answer. So its last few are put off (the journal says which), and generated
    from the start, together, when all others are done.
    Several processes take the batches in turn; which one answers a batch changes nothing.
    """
    done = len(journal)
    if done:
        say(f"{done} of {len(asked)} questions are in {journal.path} already")
    work = halved_when_memory_runs_out(work)
    plans = []
    if setup.processes > 1:
        label += f", process 1 of {setup.processes}"
    with tqdm(desc=label, unit="question", smoothing=0.1, disable=not setup.is_first) as bar:
        for first in (True, False):
            left = [i for i, question in enumerate(asked) if first or journal.put_off(question.id)]
            keys = contexts and [contexts[i] for i in left]
            plan = generation.plan_batches([lengths[i] for i in left], budget, keys)
            plan = [[left[i] for i in batch] for batch in plan]
            plans.append([[asked[i].id for i in batch] for batch in plan])
            share = plan[setup.number :: setup.processes]
            if first:
                bar.reset(total=sum(map(len, share)))
                bar.update(sum(asked[i].id in journal for batch in share for i in batch))
            mine = journal if setup.processes == 1 else journal.part(setup.number)
            for batch in share:
                if all(asked[i].id in journal or first and journal.put_off(asked[i].id) for i in batch):
                    continue
                found = work(batch, len(batch) // FEW if first else 0)
                before = len(mine)
                late = [asked[i].id for i, record in zip(batch, found) if record is None]
                mine.append([record for record in found if record], [late])
                bar.update(len(mine) - before)
            gather(setup, journal)
    if setup.is_first:
        journal.arrange(*plans)
    gather(setup, journal)


def gather(setup, journal):
    """Puts together what all processes have written; afterwards each knows it."""
    if setup.processes > 1:
        setup.wait()
        if setup.is_first:
            journal.absorb_parts()
        setup.wait()
        if not setup.is_first:
            journal.reload()


def work_off_answers(setup, model, asked, journal, work, label, share):
    """`work_off` for answers: from the prompts' lengths; share: whether the questions of a context stay together."""
    lengths = [len(setup.prompt_ids(question)) for question in asked]
    check_lengths(asked, lengths, setup.options.max_new_tokens, model)
    contexts = [question.context for question in asked] if share else None
    work_off(setup, asked, lengths, journal, work, label, setup.options.batch_tokens, contexts)


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

    def in_parts(batch, few):
        nonlocal largest
        while True:
            size = min(len(batch), largest or len(batch))
            try:
                return [r for start in range(0, len(batch), size) for r in work(batch[start : start + size], few)]
            except Exception as error:
                if size == 1 or not should_reduce_batch_size(error):
                    raise
            largest = size // 2
            release_memory()
            say(f"Out of memory with {size} questions in a batch: going on with {largest}; nothing is lost.")

    return in_parts


def answered(setup, model, question, ids):
    """The record of one generated answer: its text, the answer parsed from it, and its scores; None if it goes on."""
    ended = ids[-1] in model.original_model.generation_config.eos_token_id
    if not ended and len(ids) < setup.options.max_new_tokens:
        return None
    text = setup.tokenizer.decode(ids)
    answer = common.parse_answer(setup.tokenizer.decode(ids, skip_special_tokens=True))
    return {"id": question.id, "text": text, "answer": answer} | questions.score(answer, question.truths)


def scores_of(record):
    return {metric: record[metric] for metric in report.METRICS}


# ---------------------------------------------------------------------------------------------------------------------
# Round 1


def rank(options):
    """Round 1: answer every question, keep the right ones, rank the latents of those -> activations_<ranking>.json."""
    setup = Setup(options)
    with setup.writing():
        if options.no_splice:
            answer_without_sae(setup)
        else:
            answer_and_rank(setup)


def answer_and_rank(setup):
    """Round 1 itself."""
    options, asked = setup.options, setup.selected
    check_old_activations(setup)
    journal = answers = answer_all(setup, asked)
    counts, entry = count_answers(answers, asked)
    entry |= {"round": "baseline", "k": None} | counts
    if not any(old["round"] == "baseline" and old["run"]["ranking"] == "baseline" for old in setup.entries):
        setup.finish(answers.run, entry)  # the unmasked figures, whatever the ranking
    setup.tell(
        f"\nRound 1: {counts['asked']} questions asked, {counts['kept']} answered right and kept "
        f"({100 * counts['kept'] / counts['asked']:.1f}%), {counts['wrong']} answered wrong, "
        f"{counts['unranked']} right but without any [ to rank at.\n"
    )
    kept = [q for q, record in zip(asked, answers.read(q.id for q in asked)) if "topk" in record]
    if options.ranking != "baseline":
        journal = rank_kept(setup, answers, kept)

    def samples():
        for record in journal.read(q.id for q in kept):
            yield {name: record[name] for name in ("id", "answer", "em", "f1", "active", "topk", "bottomk")}

    run = journal.run | {"asked": counts["asked"], "kept": counts["kept"]}
    if setup.is_first:
        records.write_activations(options.activations, run, samples())
    statistics = report.latent_statistics(samples(), [q.context for q in kept])
    statistics["overlap"] = {
        ranking: report.ranking_overlap(samples(), others) for ranking, others in other_rankings(setup)
    }
    for latent in statistics["most_frequent_topk"]:
        latent["neuronpedia"] = common.neuronpedia_page(options, latent["latent"])
    setup.finish(journal.run, entry | {"statistics": statistics})
    setup.tell(f"{report.table(setup.entries)}\n\n{report.describe(statistics, options.ranking)}\n")
    setup.tell(f"Latents of the kept questions: {options.activations}")


def check_old_activations(setup):
    """Refuses, before anything is run, to replace the activations file of another run, or a file that is none."""
    path = setup.options.activations
    if path.exists() and not setup.options.overwrite:
        found, _ = records.read_activations(path)
        if found is None:
            raise UserError(f"{path}: is the authors' published file: give another --activations, or --overwrite")
        fields = {field: setup.ranked_run[field] for field in found if field in setup.ranked_run}
        records.replaceable(path, found, fields, False, say_once)


def answer_all(setup, asked):
    """The journal of the unmasked answers, the baseline's ranking beside those that are kept."""
    journal = setup.journal("baseline", setup.run)
    if len(journal) == len(asked):
        say(f"Round 1's answering is finished ({journal.path}); --overwrite starts it again.")
        return journal
    model, sae = setup.load(journal)
    most = setup.options.max_new_tokens

    def answer_and_rank_batch(batch, few):
        batch = [asked[i] for i in batch]
        prompts, contexts = [setup.prompt_ids(q) for q in batch], [q.context for q in batch]
        outputs, residuals = generation.answer(
            model, sae, prompts, most, bypass=setup.bypass, contexts=contexts, keep_residuals=True, few=few
        )
        found = [answered(setup, model, question, ids) for question, ids in zip(batch, outputs)]
        for record, prompt, ids, residual in zip(found, prompts, outputs, residuals):
            bracket = last_bracket(setup.tokenizer, ids)
            if record and record["f1"] >= KEEP_F1 and bracket is not None:
                # The residual does not depend on the splice, which comes after it: what was seen while answering will
                # do. `tokens`: what other rankings need to run the sequence again.
                sequence = prompt + ids[:bracket]
                record["tokens"] = ids[: bracket + 1]
                record |= latents.rank(sae, residual[latents.counted_positions(sequence, setup.bypass)])
        return found

    work_off_answers(setup, model, asked, journal, answer_and_rank_batch, "Round 1", share=True)
    return journal


def last_bracket(tokenizer, ids):
    """The position of the last generated token whose text contains [, or None. Latents are ranked just before it."""
    for position in reversed(range(len(ids))):
        if "[" in tokenizer.decode([ids[position]]):
            return position
    return None


def rank_kept(setup, answers, kept):
    """The journal of the kept questions' records with another ranking's latents in place of the baseline's."""
    ranking = setup.options.ranking
    run = setup.ranked_run | {
        "answers": records.digest(answers.read(q.id for q in kept), "id", "answer", "tokens", "active")
    }
    journal = setup.journal(ranking, run)
    if len(journal) == len(kept):
        say(f"The {ranking} ranking is finished ({journal.path}); --overwrite starts it again.")
        return journal
    model, sae = setup.load(journal)

    def rank_again(batch, few):
        found = list(answers.read(kept[i].id for i in batch))
        sequences = [setup.prompt_ids(kept[i]) + r["tokens"][:-1] for i, r in zip(batch, found)]
        if ranking == "gradsae":
            next_ids = [record["tokens"][-1] for record in found]
            scores = latents.gradient_scores(model, sae, sequences, next_ids, setup.bypass)
        else:
            contexts = [kept[i].context for i in batch]
            _, residuals = generation.answer(
                model, sae, sequences, 1, bypass=setup.bypass, contexts=contexts, keep_residuals=True
            )
            scores = [
                latents.random_scores(
                    sae, residual[latents.counted_positions(ids, setup.bypass)], f"{setup.options.seed} {record['id']}"
                )
                for ids, residual, record in zip(sequences, residuals, found)
            ]
        for record, of_latents in zip(found, scores):
            topk, bottomk = latents.top_and_bottom(of_latents, len(record["active"]) // 2)
            record |= {"topk": topk, "bottomk": bottomk}
        return found

    lengths = [
        len(setup.prompt_ids(q)) + len(record["tokens"]) - 1
        for q, record in zip(kept, answers.read(q.id for q in kept))
    ]
    if ranking == "gradsae":
        budget, contexts = max(1, setup.options.batch_tokens // GRADIENT_TOKENS), None
    else:
        budget, contexts = setup.options.batch_tokens, [q.context for q in kept]
    work_off(setup, kept, lengths, journal, rank_again, f"Ranking ({ranking})", budget, contexts)
    return journal


def count_answers(journal, asked):
    """How many were asked, kept, wrong and right but not to be ranked; and the scores of all asked and of the kept."""
    counts = dict.fromkeys(("asked", "kept", "wrong", "unranked"), 0)
    every, kept = ([], []), ([], [])
    for question, record in zip(asked, journal.read(question.id for question in asked)):
        counts["asked"] += 1
        counts["kept" if "topk" in record else "unranked" if record["f1"] >= KEEP_F1 else "wrong"] += 1
        for scores, contexts in (every, kept) if "topk" in record else (every,):
            scores.append(scores_of(record))
            contexts.append(question.context)
    return counts, {"all": report.summarize(*every)} | report.summarize(*kept)


def other_rankings(setup):
    """(ranking, samples) of each activations file beside this ranking's that is of the same run."""
    fields = [field for field in records.COMPARED if field != "ranking"]
    for ranking in common.RANKINGS:
        path = setup.out / f"activations_{ranking}.json"
        if ranking != setup.options.ranking and path.exists():
            try:
                found, samples = records.read_activations(path)
            except UserError as error:
                say(f"{error}: not compared with")
                continue
            if found and not records.differences(found, setup.run, fields):
                yield ranking, samples


def answer_without_sae(setup):
    """Round 1 with --no-splice: what the model answers by itself, so that the splice's own cost shows."""
    asked, run = setup.selected, setup.run | {"splice": False}
    journal = setup.journal("no_splice", run)
    if len(journal) < len(asked):
        say(f"Loading {setup.options.model} ...")
        model = common.load_model(setup.local_options(), setup.tokenizer)

        def answer(batch, few):
            batch = [asked[i] for i in batch]
            prompts, contexts = [setup.prompt_ids(q) for q in batch], [q.context for q in batch]
            most = setup.options.max_new_tokens
            outputs, _ = generation.answer(model, None, prompts, most, contexts=contexts, few=few)
            return [answered(setup, model, question, ids) for question, ids in zip(batch, outputs)]

        work_off_answers(setup, model, asked, journal, answer, "Without SAE", share=True)
    else:
        say(f"Answering without SAE is finished ({journal.path}); --overwrite starts it again.")
    scores = [scores_of(record) for record in journal.read(q.id for q in asked)]
    setup.finish(journal.run, {"round": "no_splice", "k": None} | report.summarize(scores, [q.context for q in asked]))
    setup.tell(f"\n{report.table(setup.entries)}")


# ---------------------------------------------------------------------------------------------------------------------
# Rounds 2 and 3


def mask(options, which):
    """Rounds 2 and 3: the kept questions again, each with its own TopK (`which`: topk) or BottomK (bottomk) masked."""
    activations_run, samples = records.read_activations(options.activations)
    setup = Setup(options)
    samples, missing = match_samples(setup, activations_run, samples)
    asked = [question for question in setup.selected if question.id in samples]
    if not asked:
        raise UserError(
            f"{options.activations}: none of its questions is among the {len(setup.selected)} selected ones"
        )
    run = setup.ranked_run | {"masked": which, "activations": records.digest(samples.values(), "id", "topk", "bottomk")}
    contexts = [question.context for question in asked]
    clean = None
    if activations_run is not None:
        clean = [questions.score(samples[q.id]["answer"], q.truths) for q in asked]
    active = [len(samples[q.id]["active"]) for q in asked]
    ranked = [array.array("q", samples[q.id][which]) for q in asked]
    del samples  # as Python objects they take many times that, and a model is yet to come

    with setup.writing():
        prefix = "" if options.ranking == "baseline" else f"{options.ranking}_"
        journals = {}
        for k in options.k:
            suffix = "" if k == "50%" else f"_k{k.replace('%', 'pct')}"
            journals[k] = setup.journal(f"{prefix}{WORDS[which]}{suffix}", run | {"k": k})
        for k, journal in journals.items():
            masked = [row[: masked_count(k, n)] for row, n in zip(ranked, active)]
            if len(journal) < len(asked):
                model, sae = setup.load(journal, activations_run)
                check_latents(options.activations, asked, ranked, sae.cfg.d_sae)
                work = functools.partial(answer_masked, setup, model, sae, asked, masked)
                label = f"{report.LABELS[which]} masked, K = {k}"
                work_off_answers(setup, model, asked, journal, work, label, share=False)
            else:
                say(f"This round is finished for K = {k} ({journal.path}); --overwrite starts it again.")
            after = [scores_of(record) for record in journal.read(q.id for q in asked)]
            entry = masked_entry(which, k, masked, active, clean, after, contexts)
            setup.finish(journal.run, entry | {"missing": missing})  # in no figure: the data set lacks them
            if entry["fewer_than_k"]:
                fewer = f"{entry['fewer_than_k']} of {len(asked)} questions"
                say(f"{fewer} have fewer than {k} ranked latents: all they have are masked.")
        if setup.is_first:
            records.write_figure(setup.out / "results.png", lambda file: report.draw(file, setup.entries))
    setup.tell(f"\n{report.table(setup.entries)}")
    if clean is None:
        setup.tell(f"\n{options.activations} holds no unmasked answers: there is nothing to compute a drop from.")


def masked_entry(which, k, masked, active, clean, after, contexts):
    """A K's entry of results.json. masked: the latents of each question; active: how many it has; clean (or None) and
    after: its scores unmasked and masked, in the same order."""
    if clean is None:
        figures = report.summarize(after, contexts) | {"clean": None, "drop": None, "p": None}
    else:
        figures = report.compare(clean, after, contexts)
    return figures | {
        "round": WORDS[which],
        "k": k,
        "masked": which,
        "mean_k": sum(map(len, masked)) / len(masked),
        "fewer_than_k": sum(len(row) < masked_count(k, n) for row, n in zip(masked, active)),
    }


def answer_masked(setup, model, sae, asked, masked, batch, few):
    """The records of a batch of rounds 2 and 3; masked: the latents of each question in `asked`."""
    prompts, rows = [setup.prompt_ids(asked[i]) for i in batch], [masked[i].tolist() for i in batch]
    most = setup.options.max_new_tokens
    outputs, _ = generation.answer(model, sae, prompts, most, masked=rows, bypass=setup.bypass, few=few)
    return [answered(setup, model, asked[i], ids) for i, ids in zip(batch, outputs)]


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
        if named := records.differences(activations_run, setup.ranked_run, records.COMPARED):
            raise UserError(f"{path}: is of another run ({named}): repeat its options, or run baseline.py again")
        missing = [sample["id"] for sample in samples if sample["id"] not in known]
    if missing:
        named = ", ".join(repr(name[-80:]) for name in missing[:5])
        say(f"{path}: {len(missing)} of its {len(samples)} questions are not in the data set: {named}")
    return {sample["id"]: sample for sample in samples if sample["id"] in known}, missing


def masked_count(k, active):
    """K for one question: the number asked for, or that percentage (rounded down) of its `active` latents."""
    return active * int(k[:-1]) // 100 if k.endswith("%") else int(k)


def check_latents(path, asked, ranked, d_sae):
    for question, row in zip(asked, ranked):
        if row and max(row) >= d_sae:
            raise UserError(f"{path}: question {question.id} names latent {max(row)}, but the SAE has {d_sae}")
