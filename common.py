"""What the three scripts share: model and SAE loading, prompt templates, the answer parser, and the masked round.

Importing it takes seconds (PyTorch): the scripts do so once the options are known to be good.
"""

import copy
import dataclasses
import datetime
import importlib.metadata
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from accelerate import PartialState
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiment import UserError, catalogue, patches, questions, results, rounds, saes, say
from experiment import means as means_of_latents
from experiment.hub import NO_TOKENIZER, check_fit, hub_errors, prepare_libraries
from experiment.intervention import generate, plan, rankings
from experiment.intervention.forward import SplicedModel
from experiment.intervention.generate import Group
from experiment.intervention.plan import Sizes
from experiment.intervention.pool import Limits
from experiment.intervention.rows import Answer
from experiment.intervention.splice import Splice
from experiment.options import Options, bundled, parse
from experiment.prompts import BRACKETS, build_prompt, decode, find_special_ids, tokenize
from experiment.questions import Question
from experiment.records import activations, lists, provenance
from experiment.records.activations import RankedFile
from experiment.records.journal import Journal
from experiment.records.schema import Provenance, Record, Side
from experiment.report import estimates
from experiment.rounds import Bar, Experiment, Work

if TYPE_CHECKING:  # importing these libraries takes seconds
    from sae_lens import SAE
    from transformer_lens.model_bridge import TransformerBridge

ANSWER_BEGINS = "Result = [["
INSTRUCTION = (
    "Answer the following question based on the context.\nContext:\n{context}\n\nQuestion:\n{question}\n\n"
    f'Please organize your final answer in this format: "{ANSWER_BEGINS} label ]]"\n'
)
# Each by the special token that a tokenizer of its family has. Gemma's is the paper's, to the letter: the turn is
# left open, and the model begins its answer in it. The tokenizer adds BOS.
TEMPLATES = {
    "gemma": ("<start_of_turn>", "<start_of_turn>user\n" + INSTRUCTION),
    "llama-3": (
        "<|start_header_id|>",
        f"<|start_header_id|>user<|end_header_id|>\n\n{INSTRUCTION}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "chatml": ("<|im_start|>", f"<|im_start|>user\n{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"),
}
END_OF_TURN = ("<end_of_turn>", "<|eot_id|>", "<|im_end|>")
# The options that a run names as they are.
RECORDED = (
    *("demo", "model", "sae_release", "sae_id", "dtype", "sae_dtype", "error_term", "exclude_special_tokens"),
    *("dataset", "dataset_config", "max_new_tokens", "limit", "sample"),
)
OF_ONE_QUESTION = Limits(Options.max_new_tokens, pool_tokens=2**20)  # a person's own question: nothing to share
PACKAGES = ("torch", "transformers", "transformer-lens", "sae-lens", "datasets")


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and answers


def choose_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a prompt template: a named one, a file's, or (auto) the one whose special token the tokenizer has."""
    vocabulary = tokenizer.get_vocab()
    if name == "auto":
        for marker, text in TEMPLATES.values():
            if marker in vocabulary:
                return text
        raise UserError(
            "no built-in prompt template fits this model's tokenizer: give --prompt-template a text file with "
            "{context} and {question} in the model's own chat format"
        )
    if name in TEMPLATES:
        marker, text = TEMPLATES[name]
        if marker not in vocabulary:
            raise UserError(f"--prompt-template {name}: this model's tokenizer has no {marker}: leave it to auto")
        return text
    return _read_template(name)


def _read_template(name: str) -> str:
    """A template from a text file, which holds each of the two fields once."""
    try:
        text = Path(name).read_text(encoding="utf-8-sig")  # a BOM, as Windows writes it, is no text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-template {name}: neither {', '.join(TEMPLATES)} nor a text file ({error})") from None
    for field in ("{context}", "{question}"):
        if text.count(field) != 1:
            raise UserError(f"--prompt-template {name}: must hold {field} exactly once")
    return text


def parse_answer(text: str) -> str:
    """The answer in a generated text: what the first [ ... ] on one line holds, or all of it; without [, ] and =."""
    match = BRACKETS.search(text)
    inside = match[1] if match else text
    return re.sub(r"[\[\]=]", "", inside).strip()


def score(tokenizer: PreTrainedTokenizerBase, question: Question, answer: Answer) -> Record:
    """A journal's record of an Answer: its text, the answer parsed from it, and its scores."""
    text = decode(tokenizer, answer.tokens)
    parsed = parse_answer(text)
    return Record(
        id=question.id,
        text=cast(str, tokenizer.decode(answer.tokens)),  # a list is of several sequences
        answer=parsed,
        **questions.score(parsed, text, question.truths),
        log_probs=[round(log_prob, 4) for log_prob in answer.log_probs],
    )


# ---------------------------------------------------------------------------------------------------------------------
# Model and SAE


def load_tokenizer(options: Options) -> PreTrainedTokenizerBase:
    """The model's tokenizer. No code that comes with a model is run."""
    name = catalogue.official_name(bundled(options.model))
    with hub_errors(options.model):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    # Where there are no tokenizer files, some families' tokenizers are made all the same, of special tokens alone.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise UserError(f"{options.model}: {NO_TOKENIZER}")
    return tokenizer


def find_context_length(options: Options) -> int | None:
    """How many tokens the model can read, prompt and answer together; None where its configuration does not say."""
    with hub_errors(options.model):
        name = catalogue.official_name(bundled(options.model))
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_sae(options: Options) -> "SAE":
    """The SAE, in --sae-dtype on --device. Its own configuration says where in the model it belongs."""
    return saes.load(options).eval().requires_grad_(False)


def load_model(options: Options, tokenizer: PreTrainedTokenizerBase) -> "TransformerBridge":
    """The model: a TransformerBridge over Transformers' own weights, greedy and nothing else."""
    from transformer_lens.model_bridge import TransformerBridge

    with hub_errors(options.model), patches.no_processor(), patches.weights_read_in_parts():
        model = TransformerBridge.boot_transformers(
            catalogue.official_name(bundled(options.model)),
            dtype=getattr(torch, options.dtype),
            trust_remote_code=False,
            tokenizer=copy.deepcopy(tokenizer),  # one without BOS (Qwen's) may be given one, and padding
            device_map=options.device_map or {"": options.device},  # straight to where it belongs
        )
    configure_generation(cast(PreTrainedModel, model.original_model), tokenizer)
    return model


def configure_generation(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """What rounds, tests and benchmarks need of a Transformers model: no gradients, greedy answers that end.

    Nothing of the model's own generation config counts but the ids that end an answer: it may hold sampling or a
    repetition penalty.
    """
    lm.requires_grad_(False)
    # TransformerLens asks for the attention matrices of all layers: 44 MB per token of width on gemma-2-9b-it.
    for config in (lm.config, lm.config.get_text_config()):
        config.output_attentions = False
    ends = find_end_ids(lm, tokenizer)
    pad = tokenizer.pad_token_id
    if pad is None:  # Llama 3 has none; any id will do
        pad = ends[0]
    lm.generation_config = transformers.GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=pad)


def find_end_ids(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer, ascending: the model's own, the tokenizer's, and its family's end of turn."""
    own = lm.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id}
    ends.update(own if isinstance(own, list) else [own])
    vocabulary = tokenizer.get_vocab()
    for token in END_OF_TURN:
        ends.add(vocabulary.get(token))
    return sorted(ends - {None})


def load(options: Options, tokenizer: PreTrainedTokenizerBase) -> SplicedModel:
    """The model with the SAE in it. Configurations come first, for a wrong name should cost no download of weights."""
    say(f"Loading {options.sae_release} and {options.model} ...")
    start = time.monotonic()
    check_fit(options, saes.read_config(options))
    sae = load_sae(options)
    model = load_model(options, tokenizer)
    place = sae.cfg.metadata.hook_name
    if place not in model.hook_dict:
        raise UserError(f"{options.sae_release}: is for {place}, a place that {options.model} does not have")
    say(f"Loaded in {time.monotonic() - start:.0f} s.")
    bypass = find_special_ids(tokenizer) if options.exclude_special_tokens else ()
    return SplicedModel(model, Splice(sae, options.error_term, bypass))


# ---------------------------------------------------------------------------------------------------------------------
# From Python: examples/quickstart.py


def open_model(*arguments: str) -> tuple[SplicedModel, PreTrainedTokenizerBase]:
    """A model with the SAE in it, and its tokenizer. arguments: the scripts' options, as "--demo"."""
    options = parse(list(arguments), __doc__, masks=True)
    prepare_libraries(options)
    tokenizer = load_tokenizer(options)
    return load(options, tokenizer), tokenizer


def ask(
    model: SplicedModel, tokenizer: PreTrainedTokenizerBase, context: str, question: str, masked: Sequence[int] = ()
) -> str:
    """What the model answers with these latents masked at every position, as a round of a single question."""
    group = _make_group_of_one(tokenizer, context, question, masked)
    [[answer]] = generate.answer_masked(model, group, OF_ONE_QUESTION)
    return decode(tokenizer, answer.tokens)


def mean_activations(
    model: SplicedModel, tokenizer: PreTrainedTokenizerBase, context: str, question: str
) -> Float[Tensor, "d_sae"]:
    """Each latent's mean activation over the prompt and the unmasked answer."""
    group = _make_group_of_one(tokenizer, context, question, ())
    _, read = generate.answer(model, group, OF_ONE_QUESTION)
    return rankings.mean(model, read)[0]


def _make_group_of_one(tokenizer: PreTrainedTokenizerBase, context: str, question: str, masked: Sequence[int]) -> Group:
    template = choose_template("auto", tokenizer)
    prompt = tokenize(tokenizer, build_prompt(template, context, question))
    return Group([prompt], [context], batches=[[0]], drafts=[[]], masks=[[list(masked)]])


# ---------------------------------------------------------------------------------------------------------------------
# Rounds


def prepare(options: Options) -> Experiment:
    """The Experiment that these options ask for: libraries, tokenizer, template and questions."""
    state = PartialState(cpu=options.device == "cpu", timeout=datetime.timedelta(days=30))  # waiting may take hours
    device = options.device_map or options.device
    if state.num_processes > 1 and device == "cuda":
        options = dataclasses.replace(options, device=f"cuda:{state.local_process_index}")
    prepare_libraries(options)
    tokenizer = load_tokenizer(options)
    template = choose_template(options.prompt_template, tokenizer)
    in_folder = Path(bundled(options.model)).is_dir()
    if not (tokenizer.chat_template if in_folder else catalogue.INSTRUCTION_TUNED.search(options.model)):
        if bundled(options.model) == options.model:  # the demo's has no chat template, but was tuned
            say(f"Warning: {options.model} looks like a base model: such a model was not trained to follow the prompt.")
    with hub_errors(options.dataset):
        all_questions, unanswerable, digest = questions.load(
            bundled(options.dataset), options.split, options.dataset_config
        )
    if unanswerable:
        say(f"{options.dataset}: {unanswerable} questions without a ground truth are left out")
    asked = questions.select(all_questions, options.limit, options.sample, options.seed)
    settings = {name: getattr(options, name) for name in RECORDED}
    fields = {
        **settings,
        "ranking": "baseline",
        "split": None if questions.is_local(options.dataset) else options.split,
        "questions": digest,
        "prompt_template": template,
        "seed": options.seed if options.sample else None,
        **provenance.digest_local(bundled(options.model), bundled(options.sae_release), options.sae_id),
        "device": device,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    made = Provenance.model_validate(fields)
    experiment = Experiment(options, state, tokenizer, all_questions, asked, made)
    return rounds.leave_out_long(experiment, find_context_length(options))


def load_for(
    experiment: Experiment, journals: Mapping[Any, Journal], ranked: dict[str, RankedFile] | None = None
) -> tuple[SplicedModel, Sizes]:
    """The model with its SAE, and how many tokens are run at once.

    What only these say goes into the journals' runs, and is held against them.
    """
    options = experiment.options
    model = load(options, experiment.tokenizer)
    for ranking in options.ranking:
        rankings.refuse_unmeasurable(ranking, model.splice)
    of_sae = {"hook_name": model.hook_name, "d_sae": model.splice.d_sae}
    wanted = Provenance.model_validate(of_sae)
    for file in (ranked or {}).values():
        provenance.refuse_other_run(file.path, file.provenance, wanted, of_sae)
    sizes = choose_sizes(options, model, journals)
    if model.device.type == "cuda":  # elsewhere there is memory enough, and smaller parts are no slower
        model.gradient_room = plan.room_of(sizes, model.lm.config, model.lm.dtype)
    for journal in journals.values():
        provenance.refuse_other_run(journal.path, journal.provenance, wanted, of_sae)
        of_sizes = {"batch_tokens": sizes.batch, "pool_tokens": sizes.pool}
        journal.provenance = journal.provenance.with_fields(**of_sae, **of_sizes)
    activations.check_latents(ranked or {}, model)
    return model, sizes


def choose_sizes(options: Options, model: SplicedModel, journals: Mapping[Any, Journal]) -> Sizes:
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


def masked_round(options: Options, side: Side) -> None:
    """Rounds 2 and 3: the kept questions again, each with its own TopK (`side`: topk) or BottomK (bottomk) masked.

    K, of --k, is a number, or a share of the latents active at the last position that round 1 ranked.
    """
    # 1. The latents that round 1 ranked, and the questions they are of
    experiment = prepare(options)
    stored = activations.read_stored_means(experiment) if options.ablation == "mean" else None
    ranked = {ranking: activations.read_ranked(experiment, ranking, side) for ranking in options.ranking}
    asked = activations.find_asked(experiment, ranked)
    with rounds.open_output_folder(experiment) as entries:
        # 2. What an earlier run left: a journal for each ranking and K
        journals = open_masked_journals(experiment, ranked, side, stored)
        if not rounds.is_finished(asked, journals):
            # 3. The model, with the SAE's reconstruction in its residual stream
            model, sizes = load_for(experiment, journals, ranked)
            means = means_of_latents.load(experiment, stored, model) if stored else None
            # 4. Answer with the latents masked, a group of batches at a time, and score
            drafts = find_drafts(asked, ranked)
            share = rounds.plan_work(experiment, sizes, asked, journals, drafts)
            with rounds.Bar(experiment, f"{estimates.MASKS[side]} masked", share, journals) as bar:
                for work in share:
                    if work.is_done:
                        continue
                    answers = answer_masked(experiment, model, sizes, work, ranked, drafts, means, bar)
                    for key in work.keys:
                        records = []
                        for question, answer in zip(work.questions, answers[key]):
                            records.append(score(experiment.tokenizer, question, answer))
                        journals[key].append(records)
                    bar.finish(work)
        # 5. Compare with the unmasked answers to the same questions; write and print
        if rounds.wait_for_all(experiment):
            fresh = []
            for (ranking, k), journal in journals.items():
                fresh.append(results.make_masked_entry(ranked[ranking], k, journal, asked, experiment.left_out))
            results.report_results(experiment, entries, fresh)
            folder = options.output_dir
            print(f"\nAll files: {folder}\nThe page: {folder / 'results.html'}")


def open_masked_journals(
    experiment: Experiment, ranked: dict[str, RankedFile], side: Side, means: list[float] | None
) -> dict[tuple[str, str], Journal]:
    """{(ranking, K): its journal}."""
    journals: dict[tuple[str, str], Journal] = {}
    for ranking, file in ranked.items():
        for k in experiment.options.k:
            made = file.provenance.with_fields(k=k)
            if means:
                made = made.with_fields(means=provenance.digest_numbers(means))
            journals[ranking, k] = experiment.journal(results.name_journal(made, side, k), made, file.digest_used)
    return journals


def find_drafts(asked: list[Question], ranked: dict[str, RankedFile]) -> dict[str, list[int]]:
    """{id: the unmasked answer's tokens}, none where the file does not have them; the same for all rankings."""
    first = next(iter(ranked.values()))
    return {question.id: first.questions[question.id].tokens or [] for question in asked}


def answer_masked(
    experiment: Experiment,
    model: SplicedModel,
    sizes: Sizes,
    work: Work[tuple[str, str]],
    ranked: dict[str, RankedFile],
    drafts: dict[str, list[int]],
    means: Float[Tensor, "d_sae"] | None,
    bar: Bar,
) -> dict[tuple[str, str], list[Answer]]:
    """{(ranking, K): the answers} to the questions of a group of batches, each under its own mask.

    Masks that are the same for all questions, as those of K = 0 are, are run once.
    """
    masks: list[list[list[int]]] = []  # [mask][question][latent]
    mask_of = {}
    for ranking, k in work.keys:
        file = ranked[ranking]
        latents = []
        for question in work.questions:
            of_question, _ = lists.find_latents_to_mask(file.questions[question.id], file.side, k)
            latents.append(of_question)
        if latents not in masks:
            masks.append(latents)
        mask_of[ranking, k] = masks.index(latents)
    group = Group(
        prompts=[experiment.prompt_ids(question) for question in work.questions],
        contexts=[question.context for question in work.questions],
        batches=work.batches,
        drafts=[drafts[question.id] for question in work.questions],
        masks=masks,
    )
    limits = Limits(experiment.options.max_new_tokens, sizes.pool)
    answers = generate.answer_masked(model, group, limits, means, bar.move)
    return {key: answers[number] for key, number in mask_of.items()}
