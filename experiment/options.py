"""The command line: every option with its default and its help, in one place."""

import argparse
import dataclasses
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from experiment import UserError, catalogue

ROOT = Path(__file__).resolve().parent.parent
DEMO = {  # what --demo changes
    "model": "demo/model",
    "sae_release": "demo/sae",
    "sae_id": "",
    "dataset": "demo/questions.jsonl",
    "split": "",
    "device": "cpu",
    "dtype": "float32",
    "batch_tokens": 16384,
    "pool_tokens": 32768,
}
TOKEN_FILE = "token.txt"  # at the top of the project: used where it exists
PAPER_DATASET = "rajpurkar/squad"
RANKINGS = ("baseline", "gradsae", "gradsae-answer", "matched", "random")  # of intervention.rankings
FLOATS = ("float16", "bfloat16", "float32")


def bundled(name):
    """A path of the bundled demo as it is on this machine; any other name as it is."""
    return str(ROOT / name) if name in (DEMO["model"], DEMO["sae_release"], DEMO["dataset"]) else name


def positive(text):
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def latents_to_mask(text):
    match = re.fullmatch(r"([0-9]{1,18})(%?)", text)
    if not match or (match[2] and not 1 <= int(match[1]) <= 50):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of latents nor a percentage from 1% to 50%")
    return f"{int(match[1])}{match[2]}"


def option(default, help, **settings):
    """A field of Options. A default of None is explained in `help`; `settings` go to argparse."""
    return dataclasses.field(default=default, metadata={"help": help} | settings)


NUMBER = {"type": positive, "metavar": "N"}
NAMES = {"choices": RANKINGS, "nargs": "+", "metavar": "NAME"}
KS = {"type": latents_to_mask, "nargs": "+"}  # of rounds 2 and 3


@dataclass(frozen=True)
class Options:
    """What was asked for. The defaults are the paper's experiment; --demo changes those in DEMO."""

    demo: bool = option(False, "the bundled model, SAE and questions, on the CPU: no network, no token")
    model: str = option("gemma-2-9b-it", "a model TransformerLens knows, or a local folder")
    sae_release: str = option(
        "gemma-scope-9b-it-res-canonical",
        "a release in SAELens' table, or an SAE of SAELens or sparsify: a folder, or a Hub repository",
    )
    sae_id: str = option("layer_9/width_131k/canonical", "an id of that release")
    dataset: str = option(PAPER_DATASET, "Hub data set with SQuAD's columns, or local file or folder")
    split: str = option("validation", "split of a Hub data set, or of a folder")
    dataset_config: str | None = option(None, "of a data set that has several (default: none)", metavar="NAME")
    limit: int | None = option(None, "only the first N questions (default: all)", **NUMBER)
    sample: int | None = option(None, "only N questions, drawn (default: all)", **NUMBER)
    seed: int = option(42, "seed of --sample, and in round 1 of random rankings", type=int, metavar="N")
    prompt_template: str = option("auto", "auto, gemma, llama-3, chatml, or a text file with {context} and {question}")
    exclude_special_tokens: bool = option(False, "BOS and other special tokens bypass the SAE and count in no score")
    error_term: str = option("drop", "keep: what the SAE does not explain stays", choices=("drop", "keep"))
    ablation: str = option(
        "zero", "mean: masked latents get their mean (give it in round 1 too)", choices=("zero", "mean")
    )
    ranking: tuple[str, ...] = option(("baseline",), "what to rank latents by: %(choices)s", **NAMES)
    activations: Path | None = option(None, "round 1's file (default: activations_RANKING.json)", type=Path)
    k: tuple[str, ...] = option(("50%",), "latents to mask: numbers, or percentages of the active ones; 0: none", **KS)
    output_dir: Path | None = option(None, "for all files (default: runs/demo, or runs/MODEL/RELEASE/ID)", type=Path)
    device: str = option("cuda", "torch device")
    device_map: str | None = option(None, "auto: spread a model over all GPUs (default: off)", choices=("auto",))
    dtype: str = option("float16", "of the model", choices=FLOATS)
    sae_dtype: str = option("float32", "of the SAE; tf32: faster and coarser, on CUDA", choices=(*FLOATS, "tf32"))
    batch_tokens: int | None = option(
        None, "tokens in one batch, padding included (default: what fits; on the CPU 4096)", **NUMBER
    )
    pool_tokens: int | None = option(
        None, "tokens of answers that go on together (default: as --batch-tokens)", **NUMBER
    )
    max_new_tokens: int = option(50, "longest answer, in tokens", **NUMBER)
    overwrite: bool = option(False, "start this round again and replace its files")
    token_file: Path | None = option(None, "Hugging Face token (default: token.txt, where it exists)", type=Path)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists the options)")


def parse(argv, doc, masks):
    """The Options of a round. Raises UserError for what cannot be meant.

    argv: its arguments; None: the command line's.  doc: the script's docstring, which --help shows.  masks: whether the
    round masks latents, as 2 and 3 do: only these have --k.
    """
    argv = sys.argv[1:] if argv is None else argv
    defaults = {field.name: field.default for field in dataclasses.fields(Options)} | (DEMO if "--demo" in argv else {})
    given = vars(_build_parser(doc, masks, defaults).parse_args(argv))
    if "list_saes" in given:
        print(catalogue.list_saes(given["list_saes"]))
        sys.exit(0)
    if (ROOT / TOKEN_FILE).is_file():
        defaults["token_file"] = ROOT / TOKEN_FILE
    for name in given.keys() & {"model", "sae_release", "sae_id", "dataset", "split"}:
        _check_text(name, given[name])  # these stand in the files of a round
    if "batch_tokens" in given:
        defaults["pool_tokens"] = None  # the demo's goes with its own batches
    chosen = defaults | given | _settle_names(given, defaults)
    chosen |= {name: tuple(dict.fromkeys(chosen[name])) for name in ("ranking", "k")}  # each once
    options = Options(**chosen)
    _check(options)
    return dataclasses.replace(options, output_dir=options.output_dir or _name_output_dir(options))


def write_command(options: Options, **changed: object) -> str:
    """The command of round 1 with these options, to be pasted into a shell; `changed` take their place."""
    options = dataclasses.replace(options, **changed)
    defaults = {field.name: field.default for field in dataclasses.fields(Options)} | (DEMO if options.demo else {})
    defaults |= {"token_file": ROOT / "token.txt", "output_dir": _name_output_dir(options)}
    words = ["python", "baseline.py"]
    for name, default in defaults.items():
        value = getattr(options, name)
        if name == "k" or value in (None, default):
            continue
        words.append("--" + name.replace("_", "-"))
        if isinstance(value, tuple):
            words += value
        elif value is not True:
            words.append(str(value))
    return shlex.join(words)


def _build_parser(doc, masks, defaults):
    raw = argparse.RawDescriptionHelpFormatter
    # SUPPRESS: an option that is not given is absent, so that a release can say its model.
    parser = _Parser(description=doc, formatter_class=raw, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for field in dataclasses.fields(Options):
        default, settings = defaults[field.name], dict(field.metadata)
        if default is False:
            settings["action"] = "store_true"
        elif default is not None:
            shown = " ".join(default) if isinstance(default, tuple) else str(default) or "none"
            says = settings["help"].split(" (default: ")[0]  # the demo has one where there is none otherwise
            settings["help"] = says + f" (default: {shown})".replace("%", "%%")
        if field.name != "k" or masks:
            parser.add_argument("--" + field.name.replace("_", "-"), **settings)
    text = "print the instruction-tuned releases in SAELens' table (with WORD in their name), and stop"
    parser.add_argument("--list-saes", nargs="?", const="", metavar="WORD", help=text)
    return parser


def _check(options: Options) -> None:
    for name in ("model", "sae_release", "dataset"):
        if not getattr(options, name):
            raise UserError(f"--{name.replace('_', '-')}: is empty")
    if options.limit is not None and options.sample is not None:
        raise UserError("--limit and --sample cannot be combined: leave one out")
    if options.activations and len(options.ranking) > 1:
        raise UserError("--activations: such a file holds one ranking: leave it out, or give one --ranking")
    if options.device_map and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--device-map auto: spreads one process over all GPUs: start it without a launcher")
    if options.device_map and re.search(r":[0-9]+$", options.device):
        raise UserError(f"--device-map auto: spreads the model over all GPUs: leave --device {options.device} out")
    if options.sae_dtype == "tf32" and not options.device.startswith("cuda"):
        raise UserError(f"--sae-dtype tf32: only a CUDA device has it, not {options.device}: leave it out")
    if options.token_file and not options.token_file.is_file():
        raise UserError(f"--token-file {options.token_file}: there is no such file")


def _check_text(name: str, text: str) -> None:
    """Raises UserError for what no file in UTF-8 can hold: bytes of a path that are no characters to this locale."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        shown = text.encode("utf-8", "backslashreplace").decode("utf-8")
        raise UserError(
            f"--{name.replace('_', '-')} {shown}: holds bytes that are no characters in this locale: use another name, "
            "or a UTF-8 locale"
        ) from None


def _settle_names(given: dict[str, object], defaults: dict[str, object]) -> dict[str, str]:
    """Model and SAE id where the release says them. Refuses names that do not belong together. Downloads nothing."""
    if not given.keys() & {"model", "sae_release", "sae_id"}:
        return {}
    release = given.get("sae_release", defaults["sae_release"])
    if "sae_release" not in given and "model" in given and release in catalogue.sae_table():
        _ask_for_release(given["model"], release)
    sae_id = given.get("sae_id", defaults["sae_id"] if release == defaults["sae_release"] else "")
    on_hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+", release) and release not in catalogue.sae_table()
    if on_hub and not Path(release).is_dir():
        _refuse_repository_of_table(release)
    if on_hub or Path(bundled(release)).is_dir():
        return {"sae_id": sae_id}  # a folder, or a repository on the Hub, may hold one SAE that has no id
    its_model, sae_id = catalogue.find_sae(release, sae_id)
    model = given.get("model", DEMO["model"] if "demo" in given else its_model)
    if model == DEMO["model"] or not catalogue.same_model(model, its_model):
        raise UserError(f"--sae-release {release}: belongs to {its_model}, not to {model}")
    return {"model": model, "sae_id": sae_id}


def _ask_for_release(model: str, release: str) -> None:
    """Raises UserError for a model that is given alone and that the default SAE is not for: downloading that SAE would
    only show that it does not fit."""
    if not model:
        return  # _check says so
    if not Path(bundled(model)).is_dir():
        catalogue.official_name(model)  # a name that is mistyped is that first
    found = catalogue.releases_for(bundled(model))
    if release in found:
        return
    advice = f"SAELens' table has {catalogue.enumerate_briefly(found)}"
    if model == DEMO["model"]:
        advice = f"{DEMO['sae_release']} is for it"
    elif not found:
        advice = "SAELens' table has none for it: give a local SAE folder, or a repository on the Hub"
    its_model = catalogue.sae_table()[release]["model"]
    raise UserError(f"--model {model}: give --sae-release too, for the default SAE is for {its_model}: {advice}")


def _refuse_repository_of_table(repository: str) -> None:
    """Raises UserError for a repository whose files SAELens reads by the names of releases in its table alone."""
    releases = catalogue.releases_of_repository(repository)
    if releases:
        raise UserError(
            f"--sae-release {repository}: give the name that SAELens' table has for it: "
            f"{catalogue.enumerate_briefly(releases)} (--list-saes RELEASE prints the ids)"
        )


def _name_output_dir(options: Options) -> Path:
    """A folder named after what is run, in the current one: other questions than the default ones are in its name."""
    changes = []
    if options.error_term == "keep":
        changes.append("error_term_keep")
    if options.dataset != (DEMO["dataset"] if options.demo else PAPER_DATASET):
        changes.append(_name_dataset(options.dataset))
    of_demo = all(getattr(options, name) == DEMO[name] for name in ("model", "sae_release", "sae_id"))
    if options.demo and of_demo and options.error_term == "drop":
        names = ["demo"]
    else:
        names = [bundled(options.model), bundled(options.sae_release)]
        names = [Path(name).resolve().name if Path(name).is_dir() else name for name in names] + [options.sae_id]
    folder = Path("runs", *(_name_folder(name) for name in names))
    return folder.with_name("_".join([folder.name, *map(_name_folder, changes)]))


def _name_dataset(dataset: str) -> str:
    """What a data set adds to the name of a folder: its own name, without what says of a file how to read it."""
    if os.path.isdir(dataset):
        return Path(dataset).resolve().name
    return Path(dataset).stem if os.path.isfile(dataset) else dataset


def _name_folder(name: str) -> str:
    """A name of a model, an SAE or a data set as the name of one folder."""
    return re.sub(r"[/\\:]+", "_", name.strip("./"))
