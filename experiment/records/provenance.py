"""What a file depends on, said in one place: two figures stand side by side only where this says that they may.

A Provenance says what made a file. Journals, activations, means, results and the report all compare them here, and none
of them compares the spelling of a path: what lies in a folder is known by its content, what lies on the Hub by its full
name, a data set by the hash of its questions. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from experiment import UserError, catalogue, os_errors
from experiment.masks import Side
from experiment.records.schema import Provenance, RankedLatents, Stored

# Of the unmasked answers.
SETTINGS = (
    "model", "sae_release", "sae_id", "hook_name", "d_sae", "dtype", "sae_dtype", "error_term",
    "exclude_special_tokens", "questions", "prompt_template", "max_new_tokens",
)  # fmt: skip
RANKED = (*SETTINGS, "ranking", "ranking_seed", "draws", "effects", "measured_for")  # of a ranking's lists
SELECTION = ("limit", "sample", "seed")  # which of the data set's questions are asked
# Of a masked round; activations and means are digests.
MASK = ("masked", "k", "control", "control_seed", "draw", "keep_only", "ablation", "activations", "means")
ALL = (*RANKED, *SELECTION, *MASK)  # of a journal
# Compared where both have them: the SAE says the first two once it is loaded, round 1 the third; the last one counts
# where not all latents are measured.
KNOWN_LATER = ("hook_name", "d_sae", "ranking_seed", "measured_for")
# A local folder's name, or that of a ranking of one's own: the field with its digest.
CONTENT = {"model": "model_digest", "sae_release": "sae_digest", "ranking": "ranking_digest"}
UNMASKED = ("answer", "tokens", "inside")  # of a record or a ranked question: its unmasked answer
# The files of a model or an SAE that a round reads; not what somebody has it write beside them.
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.npz", "*.index.json")
CONFIGS = (
    "*config.json", "cfg.json", "*tokenizer*", "*.model", "vocab*", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template*",
)  # fmt: skip


def depends_on(provenance: Provenance) -> dict[str, object]:
    """{field of ALL: its value}: what decides what a file of this provenance holds.

    Versions, device and batch size are in a provenance too, for readers, and make no other one.
    """
    values = {field: getattr(provenance, field) for field in ALL}
    if provenance.model is not None:
        full_names = catalogue.aliases()
        values["model"] = full_names.get(provenance.model, provenance.model)
    for name, digest_field in CONTENT.items():
        digest = getattr(provenance, digest_field)
        if digest is not None:
            values[name] = digest
    if provenance.ranking_digest is not None:
        values["ranking"] = f"{provenance.ranking} {provenance.ranking_digest}"  # a file may hold several functions
    if provenance.effects is not None and provenance.d_sae is not None and provenance.effects >= provenance.d_sae:
        values["measured_for"] = None  # all of them are measured
    if provenance.sae_digest is not None:
        values["sae_id"] = ""  # a part of the folder's path, and of the digest
    return values


def differences(stored: Provenance, provenance: Provenance, fields: Iterable[str]) -> str:
    """Names each of `fields` in which what a file says differs from what is now, with both values; an empty text where
    they agree."""
    old = depends_on(stored)
    new = depends_on(provenance)
    named = []
    for field in fields:
        if old[field] == new[field]:
            continue
        if field in KNOWN_LATER and None in (old[field], new[field]):
            continue
        before = _show(stored, field, old)
        now = _show(provenance, field, new)
        named.append(f"{field} {before}, now {now}")
    return "; ".join(named)


def _show(provenance: Provenance, field: str, values: dict[str, object]) -> str:
    """A field's value for a reader: a folder by its name and a few digits of its digest, no text over 60 characters."""
    digest = getattr(provenance, CONTENT[field]) if field in CONTENT else None
    if digest is None:
        return _shorten_value(values[field])
    name = getattr(provenance, field)
    return f"{_shorten_value(name)} (content {_shorten_value(digest)})"


def _shorten_value(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return value[:8]
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}"


def refuse_other_run(path: Path, stored: Provenance, provenance: Provenance, fields: Iterable[str]) -> None:
    """Raises UserError where what a file says of itself differs in `fields` from what is now."""
    if named := differences(stored, provenance, fields):
        raise UserError(f"{path}: is of another run ({named}): repeat its options, or give --output-dir or --overwrite")


def digest_local(model: str, sae_release: str, sae_id: str) -> dict[str, str]:
    """The fields of a Provenance with the digests of a local model and a local SAE; none of what is on the Hub."""
    folders = {"model_digest": Path(model), "sae_digest": Path(sae_release) / sae_id}
    digests = {}
    for field, folder in folders.items():
        if folder.is_dir():
            digests[field] = digest_folder(folder)
    return digests


def digest_folder(folder: Path) -> str:
    """A hash of the names and the content of the files of a model or an SAE, in the order of their names."""
    paths: set[Path] = set()
    for pattern in (*WEIGHTS, *CONFIGS):
        paths.update(folder.glob(pattern))
    sha = hashlib.sha256()
    for path in sorted(paths):
        if not path.is_file():
            continue
        with os_errors(f"{path}: cannot be read"), open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256")  # read in parts: weights need not fit in memory
        sha.update(f"{path.name} {content.hexdigest()}\n".encode())
    return sha.hexdigest()


def digest_ranked(ranked: Mapping[str, RankedLatents], side: Side, ids: Iterable[str]) -> str:
    """A hash of all that a round which masks one side uses of a file of activations.

    ranked: by question id.  ids: of the questions that are masked, in the data set's order; what the file lacks of
    them is none.
    """
    # A metric that is added later follows from the answer: here it would make every older file another run's.
    unmasked = ("em", "f1", "accuracy", "named", "log_probs", *UNMASKED)
    fields = (*unmasked, "active", side, f"removed_{side}", f"target_{side}")
    sha = hashlib.sha256()
    for question_id in ids:
        question = ranked.get(question_id)
        if question is None:
            continue
        values: list[object] = [question_id]
        for field in fields:
            values.append(getattr(question, field, None))
        sha.update(json.dumps(values).encode())
    return sha.hexdigest()


def same_answer(one: Stored | None, two: Stored | None) -> bool:
    """Whether two records or ranked questions are of the same unmasked answer (None: there is none)."""
    for field in UNMASKED:
        if getattr(one, field, None) != getattr(two, field, None):
            return False
    return True


def digest_numbers(numbers: list[float]) -> str:
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()
