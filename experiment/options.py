"""The command line: every option with its default and its help, in one place."""

import argparse
import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from experiment import UserError, catalogue, guard, own_rankings, say
from experiment.demo import DEMO, ROOT, bundled
from experiment.masks import DRAWN, OTHERS, SIDES, Side

TOKEN_FILE = "token.txt"  # at the top of the project: used where it exists
PAPER_DATASET = "rajpurkar/squad"
# Of intervention.rankings, and `effect`.
RANKINGS = ("baseline", "gradsae", "gradsae-answer", "attribution", "effect", "matched", "random")
CHOICES = (*RANKINGS, *OTHERS)  # of --ranking, besides one's own
# Options that not every round has: what the rounds mask that have them (None: round 1, which masks nothing).
OF_MASKS: dict[str, tuple[Side | None, ...]] = {
    "effects": (None,),
    "k": SIDES,
    "control": SIDES,
    "keep_only": ("topk",),
}
FLOATS = ("float16", "bfloat16", "float32")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def to_folder(text: str) -> Path:
    """A folder. An empty text, as of a variable that is not set, would be the one that one stands in."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return Path(text)


def latents_to_mask(text: str) -> str:
    """A K in its plain spelling: a number of latents, or a percentage."""
    match = re.fullmatch(r"(?P<number>[0-9]{1,18})(?P<percent>%?)", text)
    says = f"{text!r} is neither a number of latents nor a percentage from 1% to 50%"
    if not match:
        raise argparse.ArgumentTypeError(says)
    number = int(match["number"])
    if match["percent"] and not 1 <= number <= 50:
        raise argparse.ArgumentTypeError(says)
    return f"{number}{match['percent']}"


def ranking(text: str) -> str:
    """A name of CHOICES, or FILE.py:FUNCTION."""
    if text in CHOICES:
        return text
    if own_rankings.is_own(text):
        own_rankings.check(text)
        return text
    raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (give {', '.join(CHOICES)} or FILE.py:FUNCTION)")


def option(default: object, help: str, **settings: Any) -> Any:
    """A field of Options. A default of None is explained in `help`; `settings` go to argparse."""
    return dataclasses.field(default=default, metadata={"help": help} | settings)


NUMBER: dict[str, Any] = {"type": positive, "metavar": "N"}
NAMES: dict[str, Any] = {"type": ranking, "nargs": "+", "metavar": "NAME"}
KS: dict[str, Any] = {"type": latents_to_mask, "nargs": "+"}  # of rounds 2 and 3


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
    seed: int = option(42, "of all that is drawn: --sample, rankings at random, directions", type=int, metavar="N")
    prompt_template: str = option("auto", "auto, gemma, llama-3, chatml, or a text file with {context} and {question}")
    exclude_special_tokens: bool = option(False, "BOS and other special tokens bypass the SAE and count in no score")
    error_term: str = option("drop", "keep: what the SAE does not explain stays", choices=("drop", "keep"))
    ablation: str = option(
        "zero", "mean: masked latents get their mean (give it in round 1 too)", choices=("zero", "mean")
    )
    ranking: tuple[str, ...] = option(
        ("baseline",), f"what to rank latents by: {', '.join(CHOICES)}, or FILE.py:FUNCTION", **NAMES
    )
    draws: int = option(1, "how often what is drawn is drawn for each question: matched, random, directions", **NUMBER)
    effects: int = option(256, "of --ranking effect: latents masked one by one, at most, per question", **NUMBER)
    activations: Path | None = option(None, "round 1's file (default: activations_RANKING.json)", type=Path)
    k: tuple[str, ...] = option(("50%",), "latents to mask: numbers, or percentages of the active ones; 0: none", **KS)
    control: str = option(
        "none", "direction: each mask again, as large, in a random direction", choices=("none", "direction")
    )
    keep_only: bool = option(False, "mask everything but TopK, and for comparison everything")
    # Never None once parse() is done.
    output_dir: Path = option(None, "for all files (default: runs/demo, or runs/MODEL/RELEASE/ID)", type=to_folder)
    device: str = option("cuda", "torch device")
    device_map: str | None = option(None, "auto: spread a model over all GPUs (default: off)", choices=("auto",))
    dtype: str = option("float16", "of the model", choices=FLOATS)
    sae_dtype: str = option("float32", "of the SAE; tf32: faster and coarser, on CUDA", choices=(*FLOATS, "tf32"))
    batch_tokens: int | None = option(
        None, "tokens in one batch, padding included (default: what fits; on the CPU 4096)", **NUMBER
    )
    pool_tokens: int | None = option(
        None, "tokens of answers that go on together (default: what fits; on the CPU as --batch-tokens)", **NUMBER
    )
    max_new_tokens: int = option(50, "longest answer, in tokens", **NUMBER)
    overwrite: bool = option(False, "start this round again and replace its files")
    token_file: Path | None = option(None, "Hugging Face token (default: token.txt, where it exists)", type=Path)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def parse(argv: list[str] | None, doc: str | None, masks: Side | None) -> Options:
    """The Options of a round. Raises UserError for what cannot be meant.

    argv: its arguments; None: the command line's.  doc: the script's docstring, which --help shows.  masks: what the
    round masks, as 2 and 3 do; None: it is round 1.
    """
    if argv is None:
        argv = sys.argv[1:]
    defaults = _find_defaults("--demo" in argv)
    parser = _build_parser(doc, masks, defaults)
    given = vars(parser.parse_args(argv))
    if "list_saes" in given:
        print(catalogue.list_saes(given["list_saes"]))
        sys.exit(0)
    token_file = ROOT / TOKEN_FILE
    if token_file.is_file():
        defaults["token_file"] = token_file
    for name in given.keys() & {"model", "sae_release", "sae_id", "dataset", "split"}:
        _check_text(name, given[name])  # these stand in the files of a round
    if "batch_tokens" in given:
        defaults["pool_tokens"] = None  # the demo's goes with its own batches
    chosen = defaults | given | catalogue.settle_names(given, defaults)
    for name in ("ranking", "k"):
        each_once = dict.fromkeys(chosen[name])
        chosen[name] = tuple(each_once)
    options = Options(**chosen)
    _check(options)
    _check_masks(options, masks)
    if options.output_dir is None:
        folder = _name_output_dir(options)
        options = dataclasses.replace(options, output_dir=folder)
    return options


def stop_at_mistakes(doc: str | None, masks: Side | None) -> None:
    """Ends the process where the command line asks for help or a list, or holds a mistake. Parameters as in parse()."""
    code = guard(lambda: parse(None, doc, masks))
    if code:
        sys.exit(code)


def leave_out_others(options: Options) -> Options:
    """The options without the rankings that round 1 has nothing to do for; says so."""
    ranking = tuple(name for name in options.ranking if name not in OTHERS)
    if ranking != options.ranking:
        others = [name for name in options.ranking if name in OTHERS]
        say(f"--ranking {' '.join(others)}: masks by the baseline's lists, in rounds 2 and 3: nothing to rank here.")
    return dataclasses.replace(options, ranking=ranking)


def write_command(options: Options, **changed: Any) -> str:
    """The command of round 1 with these options, to be pasted into a shell; `changed` take their place."""
    options = dataclasses.replace(options, **changed)
    ranked = ["baseline" if name in OTHERS else name for name in options.ranking]
    options = dataclasses.replace(options, ranking=tuple(dict.fromkeys(ranked)))
    if not _draws_lists(options):
        options = dataclasses.replace(options, draws=1)
    defaults = _find_defaults(options.demo)
    defaults |= {"token_file": ROOT / TOKEN_FILE, "output_dir": _name_output_dir(options)}
    words = ["python", "baseline.py"]
    for name, default in defaults.items():
        value = getattr(options, name)
        if not _is_of_round(name, None) or value in (None, default):
            continue
        words.append(_write_flag(name))
        if isinstance(value, tuple):
            words += value
        elif value is not True:
            words.append(str(value))
    return shlex.join(words)


def _find_defaults(demo: bool) -> dict[str, Any]:
    """{field of Options: its default}, those of --demo or the paper's."""
    defaults = {field.name: field.default for field in dataclasses.fields(Options)}
    return defaults | DEMO if demo else defaults


def _build_parser(doc: str | None, masks: Side | None, defaults: Mapping[str, Any]) -> _Parser:
    """The parser of a round's options. masks: as of `parse`."""
    raw = argparse.RawDescriptionHelpFormatter
    # SUPPRESS: an option that is not given is absent, so that a release can say its model.
    parser = _Parser(description=doc, formatter_class=raw, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for field in dataclasses.fields(Options):
        if not _is_of_round(field.name, masks):
            continue
        default = defaults[field.name]
        settings = dict(field.metadata)
        if default is False:
            settings["action"] = "store_true"
        elif default is not None:
            explained = re.sub(r" \(default: .*\)$", "", settings["help"])  # as it is without --demo
            shown = _show_default(default).replace("%", "%%")
            settings["help"] = f"{explained} (default: {shown})"
        parser.add_argument(_write_flag(field.name), **settings)
    text = "print the instruction-tuned releases in SAELens' table (with WORD in their name), and stop"
    parser.add_argument("--list-saes", nargs="?", const="", metavar="WORD", help=text)
    return parser


def _is_of_round(name: str, masks: Side | None) -> bool:
    """Whether a round has this option. masks: as of `parse`."""
    return name not in OF_MASKS or masks in OF_MASKS[name]


def _write_flag(name: str) -> str:
    """--sae-id of sae_id."""
    return "--" + name.replace("_", "-")


def _show_default(default: object) -> str:
    """A default as one would type it."""
    if isinstance(default, tuple):
        return " ".join(default)
    return str(default) or "none"


def _check(options: Options) -> None:
    """Raises UserError for options that are empty, or do not go together."""
    for name in ("model", "sae_release", "dataset"):
        if not getattr(options, name):
            raise UserError(f"{_write_flag(name)}: is empty")
    _check_names_of_rankings(options.ranking)
    if options.limit is not None and options.sample is not None:
        raise UserError("--limit and --sample cannot be combined: leave one out")
    if options.activations and len(options.ranking) > 1:
        raise UserError("--activations: such a file holds one ranking: leave it out, or give one --ranking")
    if options.device_map:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes > 1:
            raise UserError("--device-map auto: spreads one process over all GPUs: start it without a launcher")
        if re.search(r":[0-9]+$", options.device):
            raise UserError(f"--device-map auto: spreads the model over all GPUs: leave --device {options.device} out")
    if options.sae_dtype == "tf32" and not options.device.startswith("cuda"):
        raise UserError(f"--sae-dtype tf32: only a CUDA device has it, not {options.device}: leave it out")
    if options.token_file and not options.token_file.is_file():
        raise UserError(f"--token-file {options.token_file}: there is no such file")


def _check_masks(options: Options, masks: Side | None) -> None:
    """Raises UserError for what cannot be masked, or drawn. masks: as of `parse`."""
    has_own_lists = not set(options.ranking) <= set(OTHERS)
    if masks is None and not has_own_lists:
        names = " ".join(options.ranking)
        raise UserError(f"--ranking {names}: masks by the baseline's lists, in rounds 2 and 3: give baseline here")
    has_control = options.control != "none"
    if options.keep_only and "0" in options.k:
        raise UserError("--keep-only: K = 0 keeps nothing, which is run for comparison as it is: leave it out of --k")
    if options.keep_only and has_control:
        raise UserError(f"--keep-only: has no control: leave --control {options.control} out")
    is_drawn = has_control or _draws_lists(options)
    if options.draws > 1 and not is_drawn:
        drawn = " or ".join(DRAWN) if masks is None else f"{', '.join(DRAWN)} or --control direction"
        raise UserError(f"--draws {options.draws}: nothing is drawn here: give {drawn} too, or leave it out")


def _draws_lists(options: Options) -> bool:
    """Whether any ranking's lists are drawn."""
    return any(name in DRAWN for name in options.ranking)


def _check_names_of_rankings(given: tuple[str, ...]) -> None:
    """Raises UserError for a ranking of one's own that is named as another one is: their files would be the same."""
    taken = {name.lower(): name for name in CHOICES}  # no file system has to tell capitals
    for one in given:
        if not own_rankings.is_own(one):
            continue
        name = own_rankings.name_of(one).lower()
        if name in taken:
            raise UserError(f"--ranking {one}: files are named after the function, as of {taken[name]}: rename it")
        taken[name] = one


def _check_text(name: str, text: str) -> None:
    """Raises UserError for what no file in UTF-8 can hold: bytes of a path that are no characters to this locale."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        shown = text.encode("utf-8", "backslashreplace").decode("utf-8")
        raise UserError(
            f"{_write_flag(name)} {shown}: holds bytes that are no characters in this locale: use another name, "
            "or a UTF-8 locale"
        ) from None


def _name_output_dir(options: Options) -> Path:
    """A folder named after what is run, in the current one: other questions than the default ones are in its name."""
    folder = Path("runs")
    if options.demo and _is_of_demo(options) and options.error_term == "drop":
        folder = folder / "demo"
    else:
        folder = folder / _name_model(options.model) / _name_model(options.sae_release) / _name_folder(options.sae_id)
    name = folder.name
    if options.error_term == "keep":
        name += "_error_term_keep"
    usual_dataset = DEMO["dataset"] if options.demo else PAPER_DATASET
    if options.dataset != usual_dataset:
        name += "_" + _name_folder(_name_dataset(options.dataset))
    return folder.with_name(name)


def _is_of_demo(options: Options) -> bool:
    """Whether model and SAE are the bundled ones."""
    return all(getattr(options, name) == DEMO[name] for name in ("model", "sae_release", "sae_id"))


def _name_model(name: str) -> str:
    """What a model or an SAE adds to the path of a folder: of a local folder its own name."""
    path = Path(bundled(name))
    return _name_folder(path.resolve().name if path.is_dir() else name)


def _name_dataset(dataset: str) -> str:
    """What a data set adds to the name of a folder: its own name, without what says of a file how to read it."""
    if os.path.isdir(dataset):
        return Path(dataset).resolve().name
    return Path(dataset).stem if os.path.isfile(dataset) else dataset


def _name_folder(name: str) -> str:
    """A name of a model, an SAE or a data set as the name of one folder."""
    return re.sub(r"[/\\:]+", "_", name.strip("./"))
