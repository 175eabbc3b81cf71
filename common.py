"""What the three scripts share: model and SAE loading, prompt templates, the answer parser, and the masked round.

Importing it takes seconds (PyTorch): the scripts do so once their options are known to be good.
"""

import copy
import dataclasses
import datetime
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from accelerate import PartialState
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiment import (
    UserError,
    activations,
    catalogue,
    hub,
    masked,
    patches,
    questions,
    results,
    rounds,
    saes,
    say,
)
from experiment import means as means_of_latents
from experiment.demo import bundled
from experiment.intervention import generate, plan, ranked_lists
from experiment.intervention.ablations import Ablation
from experiment.intervention.forward import SplicedModel
from experiment.intervention.generate import Group
from experiment.intervention.plan import Sizes
from experiment.intervention.pool import Limits
from experiment.intervention.rows import Answer
from experiment.intervention.splice import Splice
from experiment.masked import MaskName
from experiment.masks import Side
from experiment.options import Options
from experiment.prompts import BRACKETS, decode, find_special_ids, read_template
from experiment.questions import Question
from experiment.records.journal import Journal
from experiment.records.lists import RankedFile
from experiment.records.provenance import refuse_other_run
from experiment.records.schema import Provenance, Record
from experiment.report import estimates
from experiment.rounds import Bar, Experiment, Work
from experiment.scores import score_answer

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
    return read_template(name, named=list(TEMPLATES))


def parse_answer(text: str) -> str:
    """The answer in a generated text: what the first [ ... ] on one line holds, or all of it; without [, ] and =."""
    match = BRACKETS.search(text)
    inside = match[1] if match else text
    return re.sub(r"[\[\]=]", "", inside).strip()


def make_record(tokenizer: PreTrainedTokenizerBase, question: Question, answer: Answer) -> Record:
    """A journal's record of an Answer: its text, the answer parsed from it, and its scores."""
    text = decode(tokenizer, answer.tokens)
    parsed = parse_answer(text)
    return Record(
        id=question.id,
        text=cast(str, tokenizer.decode(answer.tokens)),  # a list is of several sequences
        answer=parsed,
        **score_answer(parsed, text, question.truths),
        log_probs=[round(log_prob, 4) for log_prob in answer.log_probs],
    )


# ---------------------------------------------------------------------------------------------------------------------
# Model and SAE


def load_tokenizer(options: Options) -> PreTrainedTokenizerBase:
    """The model's tokenizer. No code that comes with a model is run."""
    name = catalogue.official_name(bundled(options.model))
    with hub.hub_errors(options.model):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    # Where there are no tokenizer files, some families' tokenizers are made all the same, of special tokens alone.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise UserError(f"{options.model}: {hub.NO_TOKENIZER}")
    return tokenizer


def load_sae(options: Options) -> "SAE":
    """The SAE, in --sae-dtype on --device. Its own configuration says where in the model it belongs."""
    return saes.load(options).eval().requires_grad_(False)


def load_model(options: Options, tokenizer: PreTrainedTokenizerBase) -> "TransformerBridge":
    """The model: a TransformerBridge over Transformers' own weights, greedy and nothing else."""
    from transformer_lens.model_bridge import TransformerBridge

    with (
        hub.hub_errors(options.model),
        patches.no_processor(),
        patches.weights_read_in_parts(),
        patches.attention_as_it_is(),
    ):
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
    config = saes.read_config(options)
    hub.check_fit(options, config)
    sae = load_sae(options)
    model = load_model(options, tokenizer)
    place = sae.cfg.metadata.hook_name
    if place not in model.hook_dict:
        raise UserError(f"{options.sae_release}: is for {place}, a place that {options.model} does not have")
    seconds = time.monotonic() - start
    say(f"Loaded in {seconds:.0f} s.")
    bypass = find_special_ids(tokenizer) if options.exclude_special_tokens else []
    splice = Splice(sae, options.error_term, bypass)
    return SplicedModel(model, splice)


# ---------------------------------------------------------------------------------------------------------------------
# Rounds


def prepare(options: Options) -> Experiment:
    """The Experiment that these options ask for: libraries, tokenizer, template and questions."""
    on_cpu = options.device == "cpu"
    longest_wait = datetime.timedelta(days=30)  # one process may wait hours for another
    state = PartialState(cpu=on_cpu, timeout=longest_wait)
    device = options.device_map or options.device  # as files record it: without this process's number
    if state.num_processes > 1 and device == "cuda":
        options = dataclasses.replace(options, device=f"cuda:{state.local_process_index}")
    hub.prepare_libraries(options)
    tokenizer = load_tokenizer(options)
    template = choose_template(options.prompt_template, tokenizer)
    hub.warn_of_base_model(options, tokenizer)
    dataset = bundled(options.dataset)
    with hub.hub_errors(options.dataset):
        all_questions, unanswerable, digest = questions.load(dataset, options.split, options.dataset_config)
    if unanswerable:
        say(f"{options.dataset}: {unanswerable} questions without a ground truth are left out")
    asked = questions.select(all_questions, options.limit, options.sample, options.seed)
    provenance = rounds.make_provenance(options, template, digest, device)
    experiment = Experiment(options, state, tokenizer, all_questions, asked, provenance)
    context_length = hub.find_context_length(options)
    return rounds.leave_out_long(experiment, context_length)


def load_for(
    experiment: Experiment, journals: Mapping[Any, Journal], ranked: dict[str, RankedFile] | None = None
) -> tuple[SplicedModel, Sizes]:
    """The model with its SAE, and how many tokens are run at once. Both go into the journals' provenance.

    ranked: by ranking, the files whose latents are masked; None in round 1.
    Raises UserError where the SAE's place or width is not that of a journal or of one of these files.
    """
    options = experiment.options
    model = load(options, experiment.tokenizer)
    for ranking in options.ranking:
        ranked_lists.refuse_unmeasurable(ranking, model.splice)
    of_sae = {"hook_name": model.hook_name, "d_sae": model.splice.d_sae}
    loaded = Provenance.model_validate(of_sae)
    files = ranked or {}
    for file in files.values():
        refuse_other_run(file.path, file.provenance, loaded, of_sae.keys())
    sizes = rounds.settle_sizes(options, model, journals)
    if model.device.type == "cuda":  # elsewhere there is memory enough, and smaller parts are no slower
        model.gradient_room = plan.room_of(sizes, model.lm.config, model.lm.dtype)
    for journal in journals.values():
        refuse_other_run(journal.path, journal.provenance, loaded, of_sae.keys())
        of_sizes = {"batch_tokens": sizes.batch, "pool_tokens": sizes.pool}
        journal.provenance = journal.provenance.with_fields(**of_sae, **of_sizes)
    activations.check_latents(files, model)
    return model, sizes


def masked_round(options: Options, side: Side) -> None:
    """Rounds 2 and 3: the kept questions again, each with its own TopK (`side`: topk) or BottomK (bottomk) masked.

    K, of --k, is a number, or a share of the latents active at the last position that round 1 ranked. A control
    (--control direction) takes away as much as such a mask, in a direction drawn at random; what is drawn, that or a
    ranking's lists, is drawn --draws times. Each of these masks has a journal. Killed, a round goes on as round 1 does.
    """
    # 1. The latents that round 1 ranked, and the questions they are of
    experiment = prepare(options)
    stored_means = activations.read_stored_means(experiment) if options.ablation == "mean" else None
    ranked = activations.read_all_ranked(experiment, side)
    asked = activations.find_asked(experiment, ranked)
    # The masks, one for each ranking, K, control and draw: the lists that it takes its latents from
    lists_of = masked.find_lists(experiment, ranked, stored_means)
    with rounds.open_output_folder(experiment) as entries:
        # 2. What an earlier run left: a journal for each mask
        journals = masked.open_journals(experiment, lists_of)
        if not rounds.is_finished(asked, journals):
            # 3. The model, with the SAE's reconstruction in its residual stream
            model, sizes = load_for(experiment, journals, ranked)
            means = means_of_latents.load(experiment, stored_means, model) if stored_means else None
            # 4. Answer with the latents masked, a group of batches at a time, and score. The unmasked answers are
            # proposed to the masked model as drafts: that saves steps and changes no answer.
            drafts = activations.find_drafts(asked, ranked)
            share = rounds.plan_work(experiment, sizes, asked, journals, drafts)
            fate = "kept alone" if options.keep_only else "masked"
            label = f"{estimates.MASKS[side]} {fate}"
            with Bar(experiment, label, share, len(journals)) as bar:
                for work in share:
                    if work.is_done:
                        continue
                    answers = mask_and_answer(experiment, model, sizes, work, lists_of, drafts, means, bar)
                    for name in work.keys:
                        records = []
                        for question, answer in zip(work.questions, answers[name]):
                            records.append(make_record(experiment.tokenizer, question, answer))
                        journals[name].append(records)
                    bar.finish(work)
        # 5. Compare with the unmasked answers to the same questions; write and print
        if rounds.wait_for_all(experiment):
            fresh = masked.make_entries(experiment, lists_of, journals, asked)
            results.report_results(experiment, entries, fresh)
            folder = options.output_dir
            print(f"\nAll files: {folder}\nThe page: {folder / 'results.html'}")


def mask_and_answer(
    experiment: Experiment,
    model: SplicedModel,
    sizes: Sizes,
    work: Work[MaskName],
    lists_of: dict[MaskName, RankedFile],
    drafts: dict[str, list[int]],
    means: Float[Tensor, "d_sae"] | None,
    bar: Bar,
) -> dict[MaskName, list[Answer]]:
    """{mask: the answers} to the questions of a group of batches, each with its own latents masked.

    Masks that are the same for all these questions, as those of K = 0 are, are run once.
    """
    masks: list[Ablation] = []
    numbers = {}
    for name in work.keys:
        mask = masked.make_ablation(name, lists_of[name], work.questions, experiment.options)
        if mask not in masks:
            masks.append(mask)
        numbers[name] = masks.index(mask)
    group = Group(
        prompts=[experiment.prompt_ids(question) for question in work.questions],
        contexts=[question.context for question in work.questions],
        batches=work.batches,
        drafts=[drafts[question.id] for question in work.questions],
        masks=masks,
    )
    limits = Limits(experiment.options.max_new_tokens, sizes.pool)
    answers = generate.answer_masked(model, group, limits, means, bar.move)
    return {name: answers[number] for name, number in numbers.items()}
