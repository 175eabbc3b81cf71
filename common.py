"""What the three scripts share: options, model and SAE loading, prompt templates, the answer parser.

Nothing heavy is imported before the options have been read: `--help` and a typing mistake answer at once.
"""

import argparse
import contextlib
import copy
import json
import os
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from experiment import UserError, is_first_process, names

ROOT = Path(__file__).resolve().parent

DEFAULTS = {
    "model": "gemma-2-9b-it",
    "sae_release": "gemma-scope-9b-it-res-canonical",
    "sae_id": "layer_9/width_131k/canonical",
    "dataset": "rajpurkar/squad",
    "split": "validation",
    "device": "cuda",
    "dtype": "float16",
    # The KV cache takes 344 KB a token on gemma-2-9b-it: 11 GB, beside 18.5 GB of model and 3.8 GB of SAE.
    "batch_tokens": 32768,
}
DEMO_DEFAULTS = {
    "model": "demo/model",
    "sae_release": "demo/sae",
    "sae_id": "",
    "dataset": "demo/questions.jsonl",
    "split": "",
    "device": "cpu",
    "dtype": "float32",
    "batch_tokens": 16384,
}

INSTRUCTION = (
    "Answer the following question based on the context.\nContext:\n{context}\n\nQuestion:\n{question}\n\n"
    'Please organize your final answer in this format: "Result = [[ label ]]"\n'
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
RANKINGS = ("baseline", "gradsae", "random")
# Not hook_resid_mid: TransformerLens replaces what the MLP reads there, but not what is added to the MLP's output.
PLACES = r"blocks\.[0-9]+\.(?:hook_resid_pre|hook_resid_post|hook_mlp_out|hook_attn_out|attn\.hook_z)"
END_OF_TURN = ("<end_of_turn>", "<|eot_id|>", "<|im_end|>")


# ---------------------------------------------------------------------------------------------------------------------
# Options


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line, defaults filled in; DESIGN names and README explains each."""

    demo: bool
    model: str
    sae_release: str
    sae_id: str
    dataset: str
    split: str
    limit: int | None
    sample: int | None
    seed: int
    prompt_template: str
    exclude_special_tokens: bool
    ranking: str
    no_splice: bool  # round 1's
    activations: Path
    k: tuple[str, ...]  # rounds 2 and 3's
    output_dir: Path
    device: str
    device_map: str | None
    dtype: str
    sae_dtype: str
    batch_tokens: int
    max_new_tokens: int
    overwrite: bool
    token_file: Path


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists the options)")


def positive(text):
    if not re.fullmatch(r"[0-9]+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def masked_latents(text):
    """Checks --k: a number of latents, or a percentage of those active at the last position."""
    match = re.fullmatch(r"([0-9]+)(%?)", text)
    if not match or int(match[1]) < 1 or (match[2] and int(match[1]) > 50):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of latents nor a percentage from 1% to 50%")
    return f"{int(match[1])}{match[2]}"


def parse_options(argv, doc, masks):
    """The Options of a round, from its arguments (None: the command line's). masks: whether it masks latents."""
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument

    def default(name):
        return f"default: {DEFAULTS[name]}; with --demo: {DEMO_DEFAULTS[name] or 'none'}"

    floats = ["float16", "bfloat16", "float32"]
    add("--demo", action="store_true", help="the bundled model, SAE and questions, on the CPU: no network, no token")
    add("--model", help=f"a model TransformerLens knows, or a local folder ({default('model')})")
    add(
        "--list-saes",
        nargs="?",
        const="",
        metavar="WORD",
        help="print the instruction-tuned releases in SAELens' table (with WORD in their name), and stop",
    )
    add("--sae-release", help=f"a release in SAELens' table, or a local SAE folder ({default('sae_release')})")
    add("--sae-id", help=f"an id of that release ({default('sae_id')})")
    add("--dataset", help=f"Hub data set with SQuAD's columns, or local .json/.jsonl ({default('dataset')})")
    add("--split", help=f"split of a Hub data set ({default('split')})")
    add("--limit", type=positive, metavar="N", help="only the first N questions (default: all)")
    add("--sample", type=positive, metavar="N", help="only N questions, drawn (default: all)")
    add("--seed", type=int, default=42, help="seed of --sample and of the random ranking (default: 42)")
    add(
        "--prompt-template",
        default="auto",
        help=f"auto, {', '.join(TEMPLATES)}, or a text file with {{context}} and {{question}} (default: auto)",
    )
    add(
        "--exclude-special-tokens",
        action="store_true",
        help="BOS and other special tokens bypass the SAE and count in no score (default: as in the paper, no)",
    )
    add(
        "--ranking",
        choices=RANKINGS,
        default="baseline",
        help="latents by mean activation, by GradSAE's gradient score, or drawn: the control (default: baseline)",
    )
    add(
        "--activations",
        type=Path,
        metavar="FILE",
        help=f"round 1's file, {'read' if masks else 'written'} (default: activations_RANKING.json in --output-dir)",
    )
    if masks:
        add(
            "--k",
            type=masked_latents,
            nargs="+",
            default=["50%"],
            help="latents to mask: numbers, or percentages of those active at the last position (default: 50%%)",
        )
    else:
        add("--no-splice", action="store_true", help="only answer, with no SAE at all: what the splice itself costs")
    add("--output-dir", type=Path, default=Path("."), metavar="FOLDER", help="for journals and results (default: .)")
    add("--device", help=f"torch device ({default('device')})")
    add("--device-map", choices=["auto"], help="auto: spread a model that one GPU cannot hold (default: off)")
    add("--dtype", choices=floats, help=f"of the model ({default('dtype')})")
    add("--sae-dtype", choices=floats, default="float32", help="of the SAE (default: float32)")
    add("--batch-tokens", type=positive, metavar="N", help=f"prompt tokens a batch ({default('batch_tokens')})")
    add("--max-new-tokens", type=positive, default=50, metavar="N", help="longest answer, in tokens (default: 50)")
    add("--overwrite", action="store_true", help="start this round again and replace its files")
    add("--token-file", type=Path, metavar="FILE", help="Hugging Face token (default: token.txt, where it exists)")
    given = vars(parser.parse_args(argv))
    word = given.pop("list_saes")
    if word is not None:
        print(names.list_saes(word))
        sys.exit(0)
    if given["limit"] is not None and given["sample"] is not None:
        raise UserError("--limit and --sample cannot be combined: leave one out")
    if given["device_map"] and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--device-map auto: spreads one process over all GPUs: start it without a launcher")
    if given["token_file"] is None:
        given["token_file"] = ROOT / "token.txt"
    elif not given["token_file"].is_file():
        raise UserError(f"--token-file {given['token_file']}: there is no such file")
    defaults = DEMO_DEFAULTS if given["demo"] else DEFAULTS
    if given["model"] or given["sae_release"] or given["sae_id"]:
        settle_names(given, defaults)
    for name, value in defaults.items():
        if given[name] is None:
            given[name] = value
    if given["activations"] is None:
        given["activations"] = given["output_dir"] / f"activations_{given['ranking']}.json"
    given["k"] = tuple(dict.fromkeys(given.get("k", ())))  # each once
    return Options(**({"no_splice": False} | given))


def settle_names(given, defaults):
    """Fills in model and SAE id where the release alone says them, and refuses names that do not belong together.

    Nothing is downloaded for it, and nothing slow imported.
    """
    release = given["sae_release"] or defaults["sae_release"]
    of_hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+", release) and release not in names.sae_table()
    if of_hub or Path(bundled(release)).is_dir():
        given["sae_id"] = given["sae_id"] or ""  # a folder, or a repository on the Hub, that may hold a single SAE
        return
    default_id = defaults["sae_id"] if release == defaults["sae_release"] else None
    model = given["model"] or (defaults["model"] if given["demo"] else None)
    of_demo = model == DEMO_DEFAULTS["model"]
    found, given["sae_id"] = names.find_sae(release, given["sae_id"], None if of_demo else model, default_id)
    if of_demo:
        raise UserError(f"--sae-release {release}: belongs to {found}, not to {model}")
    given["model"] = found


def guard(main):
    """Runs a script's main. A person's mistake is one line and exit code 2, Ctrl-C 130; only our bugs trace back."""
    try:
        main()
        return 0
    except UserError as error:
        if is_first_process():
            print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted: what was finished is kept; the same command goes on from there.", file=sys.stderr)
        return 130


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and answers


def choose_template(name, tokenizer):
    """The text of a prompt template: a named one, a file's, or (auto) the one whose special token the tokenizer has."""
    if name == "auto":
        vocabulary = tokenizer.get_vocab()
        for marker, text in TEMPLATES.values():
            if marker in vocabulary:
                return text
        raise UserError(
            "no built-in prompt template fits this model's tokenizer: give --prompt-template a text file with "
            "{context} and {question} in the model's own chat format"
        )
    if name in TEMPLATES:
        marker, text = TEMPLATES[name]
        if marker not in tokenizer.get_vocab():
            raise UserError(f"--prompt-template {name}: this model's tokenizer has no {marker}: leave it to auto")
        return text
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-template {name}: neither {', '.join(TEMPLATES)} nor a text file ({error})") from None
    for field in ("{context}", "{question}"):
        if text.count(field) != 1:
            raise UserError(f"--prompt-template {name}: must hold {field} exactly once")
    return text


def build_prompt(template, context, question):
    """The prompt's text, BOS not included. Only the two fields are filled in: other braces stay as they are."""
    fields = {"{context}": context, "{question}": question}
    return re.sub(r"\{context\}|\{question\}", lambda match: fields[match[0]], template)


def tokenize(tokenizer, text):
    """Token ids of a prompt; BOS stands first exactly once, whether or not the text begins with it."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def special_ids(tokenizer):
    """The ids of BOS, padding, turn markers and the like, ascending."""
    added = (token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)
    return sorted({*tokenizer.all_special_ids, *added})


def parse_answer(text):
    """The answer in a generated text: what the first [ ... ] on one line holds, or all of it; without [, ] and =."""
    match = re.search(r"\[\s*(.*?)\s*\]", text)
    return re.sub(r"[\[\]=]", "", match[1] if match else text).strip()


# ---------------------------------------------------------------------------------------------------------------------
# Model and SAE


def bundled(name):
    """A path of the bundled demo as it is on this machine; any other name as it is."""
    return str(ROOT / name) if name in DEMO_DEFAULTS.values() and name else name


def prepare(options):
    """Before any library is asked for anything: device there, token in place, the libraries' small talk off."""
    import huggingface_hub
    import torch
    import transformers

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            "no CUDA device here: add --demo for the bundled model, or --device cpu to run this model on the CPU (slow)"
        )
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {options.device}: PyTorch has no such device here") from None
    if options.token_file.is_file():
        token = options.token_file.read_text(encoding="utf-8", errors="replace").strip()
        if not re.fullmatch(r"hf_[A-Za-z0-9]{8,}", token):
            raise UserError(f"{options.token_file}: holds no Hugging Face token (hf_...): put yours in, or remove it")
        os.environ["HF_TOKEN"] = token
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # the line above hides downloads too: those a person waits for


@contextlib.contextmanager
def hub_errors(name):
    """Turns what the Hub's libraries raise about `name` into one line that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except (OSError, ValueError) as error:  # OSError: the Hub's own errors, ConnectionError, a file that is not there
        chain, cause = [], error
        while cause is not None:
            chain.append(cause)
            cause = cause.__cause__ or cause.__context__

        def among(*types):
            return any(isinstance(link, types) for link in chain)

        # A broken connection comes up as the HTTP library's own error, which the Hub's libraries do not always wrap.
        broken = any(type(link).__module__.startswith("http") for link in chain)
        status = next((r.status_code for link in chain if (r := getattr(link, "response", None)) is not None), None)
        # A gated repository is a kind of repository that is not found, so it has to be asked for first.
        if among(errors.GatedRepoError):
            advice = (
                "is gated: accept its licence on its Hub page, then give a token of that account "
                "(token.txt, HF_TOKEN or `hf auth login`)"
            )
        elif status == 401 or "401 Client Error" in str(error):
            advice = "the Hub refused the token, or the name: check both (token.txt, HF_TOKEN or `hf auth login`)"
        elif among(errors.RepositoryNotFoundError) or type(error).__name__ == "DatasetNotFoundError":
            advice = "there is no such repository on the Hub, or it is private and the token is not allowed in"
        elif broken or among(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
            advice = "is not on this machine and the Hub cannot be reached: check the network (and HF_HUB_OFFLINE)"
        else:
            advice = str(error).strip().split("\n")[0]
        raise UserError(f"{name}: {advice}") from error


def load_tokenizer(options):
    from transformers import AutoTokenizer

    name = names.official_name(bundled(options.model))
    with hub_errors(options.model):
        return AutoTokenizer.from_pretrained(name)


def check_local_sae(options):
    """Holds a local SAE's configuration against the model's, before anything that takes long is imported or loaded.

    What only the loaded model knows is checked once more by `load`.
    """
    from transformers import AutoConfig

    folder = Path(bundled(options.sae_release)) / options.sae_id
    if not Path(bundled(options.sae_release)).is_dir():
        return
    try:
        sae = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
        found = sae.get("metadata") or sae  # where SAELens keeps these names now, and where it did
        hook_name, made_for = found.get("hook_name") or found["hook_point"], found.get("model_name")
        check_sae(folder, sae.get("architecture", "standard"), hook_name, found.get("hook_name_out"))
    except OSError as error:
        raise UserError(f"{folder}: holds no SAE: its cfg.json cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder}: its cfg.json is not an SAE's ({error!r})") from None
    if made_for in names.aliases() and not names.same_model(bundled(options.model), made_for):
        raise UserError(
            f"{folder}: its cfg.json says that it is for {made_for}, not for {options.model}: if that is meant, give "
            "the model as a local folder"
        )
    with hub_errors(options.model):
        config = AutoConfig.from_pretrained(names.official_name(bundled(options.model))).get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = {"layers": config.num_hidden_layers, "d_model": config.hidden_size}
    check_fit(options, hook_name, sae.get("d_in"), **sizes, d_heads=config.num_attention_heads * head)


def check_sae(name, architecture, hook_name, hook_name_out):
    if "transcoder" in architecture or (hook_name_out or hook_name) != hook_name:
        raise UserError(f"{name}: a transcoder, which reconstructs another place than it reads: give an SAE")
    if not re.fullmatch(PLACES, hook_name or ""):
        raise UserError(
            f"{name}: is for {hook_name}, but only a layer's hook_resid_pre, hook_resid_post, hook_mlp_out, "
            "hook_attn_out or attn.hook_z can be replaced"
        )


def check_fit(options, hook_name, d_in, layers, d_model, d_heads):
    """Refuses an SAE of another model. d_heads: the width of all heads together, which `hook_z` sees."""
    if int(hook_name.split(".")[1]) >= layers:
        raise UserError(f"{options.sae_release}: is for {hook_name}, but {options.model} has {layers} layers")
    dimensions = d_heads if hook_name.endswith("attn.hook_z") else d_model
    if d_in != dimensions:
        raise UserError(
            f"{options.sae_release}: reads {d_in} dimensions, but {options.model} has {dimensions}: "
            "this SAE belongs to another model"
        )


def load_sae(options):
    """The SAE, in --sae-dtype on --device. Its own configuration says where in the model it belongs."""
    from sae_lens import SAE

    folder = Path(bundled(options.sae_release)) / options.sae_id
    where = {"device": options.device, "dtype": options.sae_dtype}
    name = f"{options.sae_release} {options.sae_id}".strip()
    with hub_errors(name):
        try:
            if folder.is_dir():
                sae = SAE.load_from_disk(folder, **where)
            else:
                sae = SAE.from_pretrained(options.sae_release, options.sae_id, **where)
        except (KeyError, TypeError, RuntimeError) as error:  # a folder that holds something else than an SAE
            raise UserError(f"{name}: SAELens cannot read it ({error})") from error
    metadata = sae.cfg.metadata
    check_sae(name, sae.cfg.architecture(), metadata.hook_name, metadata.hook_name_out)
    return sae.eval().requires_grad_(False)


def seems_untuned(options, tokenizer):
    """Whether a model looks like a base model: by its name, or for a folder by a tokenizer without a chat template."""
    if Path(bundled(options.model)).is_dir():
        return not options.demo and not tokenizer.chat_template
    return not names.INSTRUCTION_TUNED.search(options.model)


def load_model(options, tokenizer):
    """The model: a TransformerBridge over Transformers' own weights, greedy and nothing else."""
    import torch
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GenerationConfig

    name = names.official_name(bundled(options.model))
    # For a model that also reads pictures (Gemma 3 from 4b on) TransformerLens asks for its processor, and where that
    # needs torchvision it has pip install it in the middle of the round, and another torch with it. Text needs neither.
    no_processor = mock.patch("transformers.AutoProcessor.from_pretrained", lambda *_, **__: None)
    # The tokenizer is a copy: one without BOS (Qwen's) may be given one, and padding.
    with hub_errors(options.model), no_processor:
        where = {"device_map": options.device_map} if options.device_map else {"device": options.device}
        model = TransformerBridge.boot_transformers(
            name, dtype=getattr(torch, options.dtype), tokenizer=copy.deepcopy(tokenizer), **where
        )
    model.requires_grad_(False)
    # A model's own generation config may hold sampling or a repetition penalty.
    ends = end_ids(model, tokenizer)
    pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # Llama 3 has none; any id will do
    model.original_model.generation_config = GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=pad)
    return model


def load(options, tokenizer):
    """The model and the SAE that belongs to one of its layers.

    The SAE comes first: a wrong name costs seconds then, not the model's download.
    """
    sae = load_sae(options)
    model = load_model(options, tokenizer)
    hook_name = sae.cfg.metadata.hook_name
    d_heads = model.cfg.n_heads * model.cfg.d_head
    check_fit(options, hook_name, sae.cfg.d_in, model.cfg.n_layers, model.cfg.d_model, d_heads)
    if hook_name not in model.hook_dict:
        raise UserError(f"{options.sae_release}: is for {hook_name}, a place that {options.model} does not have")
    return model, sae


def end_ids(model, tokenizer):
    """The ids that end an answer: the model's own end-of-sequence ids, and its family's end-of-turn marker."""
    own = model.original_model.generation_config.eos_token_id
    ids = set(own if isinstance(own, list) else [own]) | {tokenizer.eos_token_id}
    vocabulary = tokenizer.get_vocab()
    ids |= {vocabulary.get(marker) for marker in END_OF_TURN}
    return sorted(ids - {None})
