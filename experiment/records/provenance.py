"""What a file depends on, said in one place: two figures stand side by side only where this says that they may.

A run is a dict that says what made a file. Journals, activations, means, results and the report all compare runs here,
and none of them compares the spelling of a path: what lies in a folder is known by its content, what lies on the Hub by
its full name, a data set by the hash of its questions. Knows nothing of models.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from experiment import UserError, catalogue, os_errors

# Of the unmasked answers.
SETTINGS = (
    *("model", "sae_release", "sae_id", "hook_name", "d_sae", "dtype", "sae_dtype", "error_term"),
    *("exclude_special_tokens", "questions", "prompt_template", "max_new_tokens"),
)
RANKED = (*SETTINGS, "ranking", "ranking_seed")  # of a ranking's lists
SELECTION = ("limit", "sample", "seed")  # which of the data set's questions are asked
MASK = ("masked", "k", "ablation", "activations", "means")  # of a masked round; the last two are digests
ALL = (*RANKED, *SELECTION, *MASK)  # of a journal
# Compared where both runs have them: the SAE says the first two once it is loaded, round 1 the third.
WHERE_BOTH = ("hook_name", "d_sae", "ranking_seed")
DEFAULTS = {"error_term": "drop"}  # of files older than the field
# A local folder's name, or that of a ranking of one's own: the field with its digest.
CONTENT = {"model": "model_digest", "sae_release": "sae_digest", "ranking": "ranking_digest"}
UNMASKED = ("answer", "tokens", "inside")  # of a record or a sample: its unmasked answer
# The files of a model or an SAE that a round reads; not what somebody has it write beside them.
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.npz", "*.index.json")
CONFIGS = ("*config.json", "cfg.json", "*tokenizer*", "*.model", "vocab*", "merges.txt", "added_tokens.json")
CONFIGS += ("special_tokens_map.json", "chat_template*")


def depends_on(run: dict) -> dict[str, object]:
    """{field of ALL: its value}: what decides what a file of this run holds.

    Versions, device and batch size are in a run too, for readers, and make no other one.
    """
    values = {field: run.get(field, DEFAULTS.get(field)) for field in ALL}
    if isinstance(run.get("model"), str):
        values["model"] = catalogue.aliases().get(run["model"], run["model"])
    if "masked" in run:
        values["ablation"] = run.get("ablation", "zero")
    for name, digest in CONTENT.items():
        if digest in run:
            values[name] = run[digest]
    if "ranking_digest" in run:
        values["ranking"] = f"{run['ranking']} {run['ranking_digest']}"  # a file may hold several functions
    if "sae_digest" in run:
        values["sae_id"] = ""  # a part of the folder's path, and of the digest
    return values


def differences(made: dict, wanted: dict, fields: Iterable[str]) -> str:
    """Names each of `fields` in which two runs differ, with both values; an empty text where they agree."""
    old, new, named = depends_on(made), depends_on(wanted), []
    for field in fields:
        unknown = field in WHERE_BOTH and None in (old[field], new[field])
        if old[field] != new[field] and not unknown:
            named.append(f"{field} {_describe(made, field, old)}, now {_describe(wanted, field, new)}")
    return "; ".join(named)


def _describe(run: dict, field: str, values: dict[str, object]) -> str:
    """A field's value for a reader: a folder by its name and a few digits of its digest, no text over 60 characters."""
    if CONTENT.get(field) in run:
        return f"{_shorten(run[field])} (content {_shorten(run[CONTENT[field]])})"
    return _shorten(values[field])


def _shorten(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return value[:8]
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}"


def refuse_other_run(path: Path, made: dict, wanted: dict, fields: Iterable[str]) -> None:
    """Raises UserError where the run `made` in a file differs in `fields` from the one that is wanted now."""
    if named := differences(made, wanted, fields):
        raise UserError(f"{path}: is of another run ({named}): repeat its options, or give --output-dir or --overwrite")


def digest_local(model: str, sae_release: str, sae_id: str) -> dict[str, str]:
    """The fields of a run that say what lies in the local folders of a model and an SAE; none for names on the Hub."""
    folders = {"model_digest": Path(model), "sae_digest": Path(sae_release) / sae_id}
    return {field: digest_folder(folder) for field, folder in folders.items() if folder.is_dir()}


def digest_folder(folder: Path) -> str:
    """A hash of the names and the content of the files of a model or an SAE, in the order of their names."""
    files = {path for pattern in WEIGHTS + CONFIGS for path in folder.glob(pattern) if path.is_file()}
    sha = hashlib.sha256()
    for path in sorted(files):
        with os_errors(f"{path}: cannot be read"), open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256")  # read in parts: weights need not fit in memory
        sha.update(f"{path.name} {content.hexdigest()}\n".encode())
    return sha.hexdigest()


def digest_samples(samples: dict[str, dict], which: str, ids: Iterable[str]) -> str:
    """A hash of all that a round which masks `which` (topk, bottomk) uses of a file of activations.

    samples: by question id.  ids: of the questions that are masked, in the data set's order; what the file lacks of
    them is none.
    """
    unmasked = ("em", "f1", "accuracy", "named", "log_probs", *UNMASKED)
    fields = (*unmasked, "active", which, f"removed_{which}", f"target_{which}")
    sha = hashlib.sha256()
    for question_id in ids:
        if question_id in samples:
            values = [samples[question_id].get(field) for field in fields]
            sha.update(json.dumps([question_id, *values]).encode())
    return sha.hexdigest()


def same_answer(one: dict, two: dict) -> bool:
    """Whether two records or samples of a question are of the same unmasked answer."""
    return all(one.get(field) == two.get(field) for field in UNMASKED)


def digest_numbers(numbers: list[float]) -> str:
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()
