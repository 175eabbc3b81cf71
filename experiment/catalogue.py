"""The names of models and SAEs: TransformerLens' list and SAELens' table.

Both are read from the libraries' private files: importing the libraries takes seconds, which a typing mistake should
not cost.
"""

import difflib
import functools
import importlib.util
import re
import runpy
from pathlib import Path

from experiment import UserError

INSTRUCTION_TUNED = re.compile(r"(?:^|[-_/.])(?:it|instruct|chat)(?:$|[-_/.])", re.IGNORECASE)  # in a model's name


def _locate(package, name):
    return Path(importlib.util.find_spec(package).submodule_search_locations[0]) / name


def nearest(word, names):
    """A hint for an error message: the names most like `word`, or nothing where none is."""
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    return f" (nearest: {', '.join(close)})" if close else ""


# ---------------------------------------------------------------------------------------------------------------------
# Models


@functools.cache
def aliases():
    """The full Hub name of every name that TransformerLens knows a model by."""
    models = runpy.run_path(str(_locate("transformer_lens", "supported_models.py")))
    short = {alias: name for name, others in models["MODEL_ALIASES"].items() for alias in others}
    return short | {name: name for name in models["OFFICIAL_MODEL_NAMES"]}


def official_name(model):
    """A model's full Hub name, for the short ones that TransformerLens knows; a folder or another name as it is."""
    if Path(model).is_dir():
        return model
    if model not in aliases() and "/" not in model:
        raise UserError(f"--model {model}: not a model TransformerLens knows, nor a folder{nearest(model, aliases())}")
    return aliases().get(model, model)


def same_model(name, other):
    """Whether two names mean the same model. True of a local folder: what it holds shows once it is loaded."""
    if Path(name).is_dir():
        return True
    last, other_last = (full.split("/")[-1].lower() for full in (name, other))
    return last == other_last or official_name(name) == official_name(other)


# ---------------------------------------------------------------------------------------------------------------------
# SAEs


@functools.cache
def sae_table():
    """SAELens' table: for each release its model, its SAEs, and more."""
    import yaml

    with open(_locate("sae_lens", "pretrained_saes.yaml"), encoding="utf-8") as file:
        table = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    table["gemma-scope-9b-it-res"]["model"] = "gemma-2-9b-it"  # it says gemma-2-9b there; SAELens' own loader does not
    return table


def is_transcoder(release):
    return "transcoder" in release or "transcoder" in (sae_table()[release].get("conversion_func") or "")


def find_sae(release, sae_id, model, default_id):
    """The model and the id of an SAE in the table. Raises UserError where they are not there or not of each other.

    sae_id, model: None or empty where the release is to say them.  default_id: for a release of several SAEs, or None.
    """
    if release not in sae_table():
        raise UserError(f"--sae-release {release}: not in SAELens' table, nor a folder{nearest(release, sae_table())}")
    if is_transcoder(release):
        raise UserError(f"--sae-release {release}: holds transcoders, not SAEs: they read one place and write another")
    ids, its_model = [sae["id"] for sae in sae_table()[release]["saes"]], sae_table()[release]["model"]
    sae_id = sae_id or default_id or (ids[0] if len(ids) == 1 else None)
    if sae_id is None:
        raise UserError(f"--sae-release {release}: holds {len(ids)} SAEs: give --sae-id (--list-saes {release})")
    if sae_id not in ids:
        raise UserError(f"--sae-id {sae_id}: not in release {release}{nearest(sae_id, ids)}")
    if model and not same_model(model, its_model):
        raise UserError(f"--sae-release {release}: belongs to {its_model}, not to {model}")
    return model or its_model, sae_id


def list_saes(word):
    """The instruction-tuned releases with `word` in their name or their model's, or all ids of the one of that name."""
    releases = [
        release
        for release, entry in sae_table().items()
        if INSTRUCTION_TUNED.search(entry["model"]) and not is_transcoder(release)
    ]
    if word in releases:
        return "\n".join(sae["id"] for sae in sae_table()[word]["saes"])
    lines = [["release", "model", "SAEs", "layers", "widths"]]
    for release in releases:
        if word.lower() in f"{release} {sae_table()[release]['model']}".lower():
            lines.append(_describe(release))
    if len(lines) == 1:
        return f"No instruction-tuned release in SAELens' table has {word!r} in its name."
    widths = [max(map(len, column)) for column in zip(*lines)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    return "\n".join([*rows, "", "--list-saes RELEASE prints a release's ids."])


def _describe(release):
    """A release's line in the list, as its ids name layers and widths."""
    model, ids = sae_table()[release]["model"], [sae["id"] for sae in sae_table()[release]["saes"]]
    layers = sorted({int(n) for name in ids for n in re.findall(r"(?:layer_|blocks\.)([0-9]+)", name)})
    widths = {width for name in ids for width in re.findall(r"width_([0-9]+[km])", name)}
    widths = sorted(widths, key=lambda width: int(width[:-1]) * {"k": 1_000, "m": 1_000_000}[width[-1]])
    span = ", ".join(map(str, layers)) if len(layers) < 8 else f"{layers[0]} to {layers[-1]} ({len(layers)})"
    return [release, model, str(len(ids)), span, ", ".join(widths) or "one"]


def neuronpedia_page(release, sae_id, latent):
    """The address of a latent's page on Neuronpedia, where SAELens' table knows one for the SAE; or None."""
    if Path(release).is_dir():
        return None
    pages = [sae.get("neuronpedia") for sae in sae_table().get(release, {"saes": []})["saes"] if sae["id"] == sae_id]
    return f"https://www.neuronpedia.org/{pages[0]}/{latent}" if pages and pages[0] else None
