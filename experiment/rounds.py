"""The two flows: rank (round 1) and mask (rounds 2 and 3). The only module that knows the order of things."""

import array
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata

import common
from experiment import UserError, generation, latents, names, questions, records, report, say, work

KEEP_F1 = 0.9  # the authors keep a question whose unmasked answer reaches this F1, not only exact matches
GRADIENT_TOKENS = 16  # an estimate: what a token takes on the way back, against one in the cache; not measured
WORDS = {"topk": "false", "bottomk": "true"}  # the authors' names of rounds 2 and 3
PACKAGES = ("torch", "transformers", "transformer-lens", "sae-lens", "datasets")

say_once = functools.cache(say)  # for what is true of several files alike


# ---------------------------------------------------------------------------------------------------------------------
# What both flows begin with


class Setup:
    """What a round knows before it loads a model: tokenizer, prompt template, the data set and the run it makes."""

    def __init__(self, options):
        self.crew = work.Crew(options.device)
        self.options = dataclasses.replace(options, device=self.crew.device)
        common.prepare(self.options)
        common.check_local_sae(options)
        self.tokenizer = common.load_tokenizer(options)
        self.template = common.choose_template(options.prompt_template, self.tokenizer)
        if common.seems_untuned(options, self.tokenizer):
            say(
                f"Warning: {options.model} looks like a base model, not an instruction-tuned one: such a model was not "
                "trained to follow the prompt."
            )
        self.bypass = common.special_ids(self.tokenizer) if options.exclude_special_tokens else ()
        with common.hub_errors(options.dataset):
            self.dataset, unanswerable, digest = questions.load(common.bundled(options.dataset), options.split)
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
            "questions": digest,
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
        lock = records.lock(self.out) if self.crew.is_first else contextlib.nullcontext()
        with lock:
            self.results = self.out / "results.json"
            self.entries = records.read_results(self.results, self.ranked_run, self.options.overwrite, say_once)
            try:
                report.table(self.entries)
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise UserError(f"{self.results}: is damaged ({error!r}): move it away") from None
            yield
            self.crew.wait()
            self.crew.end()

    def journal(self, name, run):
        """A journal as an earlier run left it, parts of several processes included."""
        path, overwrite = self.out / f"predictions_{name}.jsonl", self.options.overwrite
        if self.crew.is_first:
            journal = records.Journal(path, run, overwrite, say_once)
            journal.absorb_parts(overwrite)
        self.crew.wait()
        return journal if self.crew.is_first else records.Journal(path, run, overwrite, say_once)

    def load(self, journal, activations_run=None):
        """Model and SAE. Completes the journal's run with what only the SAE's configuration says, and checks it."""
        if self._loaded is None:
            say(f"Loading {self.options.sae_release} and {self.options.model} ...")
            self._loaded = common.load(self.options, self.tokenizer)
        model, sae = self._loaded
        late = {"hook_name": sae.cfg.metadata.hook_name, "d_sae": sae.cfg.d_sae}
        for found, path in ((journal.run, journal.path), (activations_run, self.options.activations)):
            if found and (named := records.differences(found, late, late)):
                raise UserError(f"{path}: is of another SAE ({named})")
        journal.run.update(late)
        return model, sae

    def tell(self, text):
        """Results, once."""
        if self.crew.is_first:
            print(text)

    def finish(self, run, entry):
        """Puts a round's entry into results.json, in place of the one of the same round, ranking and K."""

        def key(entry):
            return entry["round"], entry["run"]["ranking"], entry["k"]

        entry = {"run": run} | entry
        self.entries = [old for old in self.entries if key(old) != key(entry)] + [entry]
        if self.crew.is_first:
            records.write_results(self.results, self.entries)


def work_off_answers(setup, model, asked, journal, answer, label, share):
    """`work.work_off` for answers, by their prompts' lengths; share: whether questions on a context stay together."""
    lengths = array.array("q", (len(setup.prompt_ids(question)) for question in asked))
    check_lengths(asked, lengths, setup.options.max_new_tokens, model)
    contexts = asked.contexts if share else None
    work.work_off(setup.crew, asked, lengths, journal, answer, label, setup.options.batch_tokens, contexts)


def check_lengths(asked, lengths, max_new_tokens, model):
    """Refuses, before anything is answered, prompts that with their answers do not fit the model's context."""
    longest = max(range(len(asked)), key=lambda i: lengths[i])
    if lengths[longest] + max_new_tokens > model.cfg.n_ctx:
        raise UserError(
            f"question {asked.ids[longest]}: its prompt of {lengths[longest]} tokens and an answer of {max_new_tokens} "
            f"do not fit the model's context of {model.cfg.n_ctx} tokens: shorten or remove it"
        )


def answered(setup, model, question, ids):
    """The record of one generated answer: its text, the answer parsed from it, and its scores; None if it goes on."""
    ended = ids[-1] in model.original_model.generation_config.eos_token_id
    if not ended and len(ids) < setup.options.max_new_tokens:
        return None
    text = setup.tokenizer.decode(ids)
    answer = common.parse_answer(setup.tokenizer.decode(ids, skip_special_tokens=True))
    return {"id": question.id, "text": text, "answer": answer} | questions.score(answer, question.truths)


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
    kept, counts, entry = count_answers(answers, asked)
    entry |= {"round": "baseline", "k": None} | counts
    if not any(old["round"] == "baseline" and old["run"]["ranking"] == "baseline" for old in setup.entries):
        setup.finish(answers.run, entry)  # the unmasked figures, whatever the ranking
    setup.tell(
        f"\nRound 1: {counts['asked']} questions asked, {counts['kept']} answered right and kept "
        f"({100 * counts['kept'] / counts['asked']:.1f}%), {counts['wrong']} answered wrong, "
        f"{counts['unranked']} right but without any [ to rank at.\n"
    )
    if options.ranking != "baseline":
        journal = rank_kept(setup, answers, kept)

    def samples():
        for record in journal.read(kept.ids):
            yield {name: record[name] for name in ("id", "answer", "em", "f1", "active", "topk", "bottomk")}

    run = journal.run | {"asked": counts["asked"], "kept": counts["kept"]}
    if setup.crew.is_first:
        records.write_activations(options.activations, run, samples())
    by_context = sorted(range(len(kept)), key=kept.contexts.__getitem__)
    statistics = report.latent_statistics(
        journal.read(kept.ids[i] for i in by_context), [kept.contexts[i] for i in by_context]
    )
    statistics["overlap"] = {
        ranking: report.ranking_overlap(samples(), others) for ranking, others in other_rankings(setup)
    }
    for latent in statistics["most_frequent_topk"]:
        latent["neuronpedia"] = names.neuronpedia_page(options.sae_release, options.sae_id, latent["latent"])
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
        contexts, batch = [asked.contexts[i] for i in batch], [asked[i] for i in batch]
        prompts = [setup.prompt_ids(question) for question in batch]
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
    run = setup.ranked_run | {"answers": records.digest(answers.read(kept.ids), "id", "answer", "tokens", "active")}
    journal = setup.journal(ranking, run)
    if len(journal) == len(kept):
        say(f"The {ranking} ranking is finished ({journal.path}); --overwrite starts it again.")
        return journal
    model, sae = setup.load(journal)

    def rank_again(batch, few):
        found = list(answers.read(kept.ids[i] for i in batch))
        sequences = [setup.prompt_ids(kept[i]) + r["tokens"][:-1] for i, r in zip(batch, found)]
        if ranking == "gradsae":
            next_ids = [record["tokens"][-1] for record in found]
            scores = latents.gradient_scores(model, sae, sequences, next_ids, setup.bypass)
        else:
            contexts = [kept.contexts[i] for i in batch]
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

    lengths = array.array(
        "q", (len(setup.prompt_ids(q)) + len(r["tokens"]) - 1 for q, r in zip(kept, answers.read(kept.ids)))
    )
    if ranking == "gradsae":
        budget, contexts = max(1, setup.options.batch_tokens // GRADIENT_TOKENS), None
    else:
        budget, contexts = setup.options.batch_tokens, kept.contexts
    work.work_off(setup.crew, kept, lengths, journal, rank_again, f"Ranking ({ranking})", budget, contexts)
    return journal


def count_answers(journal, asked):
    """The questions that are kept; how many were asked, kept, wrong and right but not to be ranked; and the scores of
    all asked and of the kept."""
    kept, unranked = [], 0
    for number, record in enumerate(journal.read(asked.ids)):
        if "topk" in record:
            kept.append(number)
        else:
            unranked += record["f1"] >= KEEP_F1
    counts = {"asked": len(asked), "kept": len(kept), "wrong": len(asked) - len(kept) - unranked, "unranked": unranked}
    scores, questions_kept = report.columns(journal.read(asked.ids)), asked.only(kept)
    of_all = report.summarize(scores, asked.contexts)
    return questions_kept, counts, {"all": of_all} | report.summarize(scores[kept], questions_kept.contexts)


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
        model = common.load_model(setup.options, setup.tokenizer)

        def answer(batch, few):
            contexts, batch = [asked.contexts[i] for i in batch], [asked[i] for i in batch]
            prompts, most = [setup.prompt_ids(question) for question in batch], setup.options.max_new_tokens
            outputs, _ = generation.answer(model, None, prompts, most, contexts=contexts, few=few)
            return [answered(setup, model, question, ids) for question, ids in zip(batch, outputs)]

        work_off_answers(setup, model, asked, journal, answer, "Without SAE", share=True)
    else:
        say(f"Answering without SAE is finished ({journal.path}); --overwrite starts it again.")
    scores = report.columns(journal.read(asked.ids))
    setup.finish(journal.run, {"round": "no_splice", "k": None} | report.summarize(scores, asked.contexts))
    setup.tell(f"\n{report.table(setup.entries)}")


# ---------------------------------------------------------------------------------------------------------------------
# Rounds 2 and 3


def mask(options, which):
    """Rounds 2 and 3: the kept questions again, each with its own TopK (`which`: topk) or BottomK (bottomk) masked."""
    activations_run, samples = records.read_activations(options.activations)
    setup = Setup(options)
    ranked = Ranked(setup, activations_run, samples, which)
    asked = ranked.asked
    run = setup.ranked_run | {"masked": which, "activations": ranked.digest}
    with setup.writing():
        prefix = "" if options.ranking == "baseline" else f"{options.ranking}_"
        journals = {}
        for k in options.k:
            suffix = "" if k == "50%" else f"_k{k.replace('%', 'pct')}"
            journals[k] = setup.journal(f"{prefix}{WORDS[which]}{suffix}", run | {"k": k})
        for k, journal in journals.items():
            if len(journal) < len(asked):
                model, sae = setup.load(journal, activations_run)
                ranked.check(sae.cfg.d_sae)
                answer = functools.partial(answer_masked, setup, model, sae, ranked, k)
                label = f"{report.LABELS[which]} masked, K = {k}"
                work_off_answers(setup, model, asked, journal, answer, label, share=False)
            else:
                say(f"This round is finished for K = {k} ({journal.path}); --overwrite starts it again.")
            entry = masked_entry(ranked, k, report.columns(journal.read(asked.ids)))
            setup.finish(journal.run, {"round": WORDS[which]} | entry)
            if entry["fewer_than_k"]:
                fewer = f"{entry['fewer_than_k']} of {len(asked)} questions"
                say(f"{fewer} have fewer than {k} ranked latents: all they have are masked.")
        if setup.crew.is_first:
            records.write_figure(setup.out / "results.png", lambda file: report.draw(file, setup.entries))
    setup.tell(f"\n{report.table(setup.entries)}")
    if ranked.clean is None:
        setup.tell(f"\n{options.activations} holds no unmasked answers: there is nothing to compute a drop from.")


class Ranked:
    """The questions of an activations file among the selected ones, and each one's ranked latents.

    asked: those Questions.  which: topk or bottomk.  active, lengths: of each the number of latents that are active
    and that are ranked.  clean: the scores of the unmasked answers, or None.  missing: ids (or prompts) that the data
    set lacks; they are in no figure.  digest: ties a journal to these latents.
    """

    def __init__(self, setup, activations_run, samples, which):
        self.path, self.which, self._samples = setup.options.activations, which, samples
        places, self.missing = match_samples(setup, activations_run, samples)
        self.digest = records.digest(
            (samples[place] | {"id": i} for i, place in places.items()), "id", "topk", "bottomk"
        )
        self.asked = setup.selected.only(i for i, question_id in enumerate(setup.selected.ids) if question_id in places)
        if not len(self.asked):
            raise UserError(f"{self.path}: none of its questions is among the {len(setup.selected)} selected ones")
        self._places = array.array("q", (places[question_id] for question_id in self.asked.ids))
        self.active, self.lengths = array.array("q"), array.array("q")
        self._highest = -1, ""  # latent, and the question that names it
        for question_id, place in zip(self.asked.ids, self._places):
            sample = samples[place]
            self.active.append(len(sample["active"]))
            self.lengths.append(len(sample[which]))
            self._highest = max(self._highest, (max(sample[which], default=-1), question_id))
        self.clean = None
        if activations_run is not None:
            answers = (samples[place]["answer"] for place in self._places)
            self.clean = report.columns(questions.score(a, q.truths) for a, q in zip(answers, self.asked))

    def masked(self, number, k):
        """The latents that question `number` of `asked` has masked."""
        return self._samples[self._places[number]][self.which][: masked_count(k, self.active[number])]

    def check(self, d_sae):
        latent, question_id = self._highest
        if latent >= d_sae:
            raise UserError(f"{self.path}: question {question_id} names latent {latent}, but the SAE has {d_sae}")


def match_samples(setup, activations_run, samples):
    """Where in `samples` each question of the data set stands, by id, in the file's order; and what names those that
    the data set lacks. Refuses activations of another run."""
    path, known = setup.options.activations, setup.dataset.ids
    if activations_run is None:
        say(f"{path}: the authors' published form: model, SAE, layer and dtype that made it cannot be checked.")
        by_prompt = {}
        for question in setup.dataset:
            by_prompt.setdefault(hashlib.sha256(setup.prompt(question).encode()).digest(), []).append(question.id)

        def find(sample):  # the same prompt twice: the first stands for the first question, and so on
            ids = by_prompt.get(hashlib.sha256(sample["prompt"].encode(errors="replace")).digest())
            return ids.pop(0) if ids else None

    else:
        if named := records.differences(activations_run, setup.ranked_run, records.COMPARED):
            raise UserError(f"{path}: is of another run ({named}): repeat its options, or run baseline.py again")
        known = set(known)

        def find(sample):
            return sample["id"] if sample["id"] in known else None

    places, missing = {}, []
    for place, sample in enumerate(samples):
        question_id = find(sample)
        if question_id is None:
            missing.append(sample.get("prompt") or sample["id"])
        else:
            places[question_id] = place
    if missing:
        named = ", ".join(repr(name[-80:]) for name in missing[:5])
        say(f"{path}: {len(missing)} of its {len(samples)} questions are not in the data set: {named}")
    return places, missing


def masked_count(k, active):
    """K for one question: the number asked for, or that percentage (rounded down) of its `active` latents."""
    return active * int(k[:-1]) // 100 if k.endswith("%") else int(k)


def masked_entry(ranked, k, after):
    """A K's entry of results.json. after: the scores of the masked answers."""
    if ranked.clean is None:
        figures = report.summarize(after, ranked.asked.contexts) | {"clean": None, "drop": None, "p": None}
    else:
        figures = report.compare(ranked.clean, after, ranked.asked.contexts)
    wanted = [masked_count(k, active) for active in ranked.active]
    return figures | {
        "k": k,
        "masked": ranked.which,
        "mean_k": sum(map(min, ranked.lengths, wanted)) / len(wanted),
        "fewer_than_k": sum(have < want for have, want in zip(ranked.lengths, wanted)),
        "missing": ranked.missing,
    }


def answer_masked(setup, model, sae, ranked, k, batch, few):
    """The records of a batch of rounds 2 and 3."""
    asked, rows = [ranked.asked[i] for i in batch], [ranked.masked(i, k) for i in batch]
    prompts, most = [setup.prompt_ids(question) for question in asked], setup.options.max_new_tokens
    outputs, _ = generation.answer(model, sae, prompts, most, masked=rows, bypass=setup.bypass, few=few)
    return [answered(setup, model, question, ids) for question, ids in zip(asked, outputs)]
