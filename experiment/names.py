"""The names of models and SAEs: SAELens' table and TransformerLens' list.

Both are read from the libraries' files: to import the libraries takes longer than a typing mistake should cost.
"""

import difflib
import functools
import importlib.util
import re
import runpy
from pathlib import Path

from experiment import UserError

INSTRUCTION_TUNED = re.compile(r"(?:^|[-_/.])(?:it|instruct|chat)(?:$|[-_/.])", re.IGNORECASE)  # in a model's name


def _file(package, name):
    return Path(importlib.util.find_spec(package).submodule_search_locations[0]) / name


def nearest(word, candidates):
    close = difflib.get_close_matches(word, candidates, n=3, cutoff=0.5)
    return f" (nearest: {', '.join(close)})" if close else ""


# ---------------------------------------------------------------------------------------------------------------------
# Models


@functools.cache
def aliases():
    """The full Hub name of every name that TransformerLens knows a model by."""
    found = runpy.run_path(str(_file("transformer_lens", "supported_models.py")))
    short = {alias: name for name, others in found["MODEL_ALIASES"].items() for alias in others}
    return short | {name: name for name in found["OFFICIAL_MODEL_NAMES"]}


def official_name(model):
    """A model's full Hub name, for the short ones that TransformerLens knows; a folder or another name as it is."""
    if Path(model).is_dir():
        return model
    if model not in aliases() and "/" not in model:
        raise UserError(f"--model {model}: not a model TransformerLens knows, nor a folder{nearest(model, aliases())}")
    return aliases().get(model, model)


def same_model(name, other):
    """Whether two names mean the same model. Of a local folder nobody knows: SAE and model are compared once loaded."""
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

    with open(_file("sae_lens", "pretrained_saes.yaml"), encoding="utf-8") as file:
        table = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    table["gemma-scope-9b-it-res"]["model"] = "gemma-2-9b-it"  # it says gemma-2-9b there; SAELens' own loader does not
    return table


def is_transcoder(release):
    return "transcoder" in release or "transcoder" in (sae_table()[release].get("conversion_func") or "")


def find_sae(release, sae_id, model, default_id):
    """Checks a release of the table, and fills in what it says by itself: returns model and SAE id.

    sae_id, model: None where not given.  default_id: for a release of several SAEs, or None.
    """
    if release not in sae_table():
        raise UserError(f"--sae-release {release}: not in SAELens' table, nor a folder{nearest(release, sae_table())}")
    entry = sae_table()[release]
    if is_transcoder(release):
        raise UserError(f"--sae-release {release}: holds transcoders, not SAEs: they read one place and write another")
    ids = [sae["id"] for sae in entry["saes"]]
    sae_id = sae_id or default_id or (ids[0] if len(ids) == 1 else None)
    if sae_id is None:
        raise UserError(f"--sae-release {release}: holds {len(ids)} SAEs: give --sae-id (--list-saes {release})")
    if sae_id not in ids:
        raise UserError(f"--sae-id {sae_id}: not in release {release}{nearest(sae_id, ids)}")
    if model and not same_model(model, entry["model"]):
        raise UserError(f"--sae-release {release}: belongs to {entry['model']}, not to {model}")
    return model or entry["model"], sae_id


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
        model, ids = sae_table()[release]["model"], [sae["id"] for sae in sae_table()[release]["saes"]]
        if word.lower() in f"{release} {model}".lower():
            layers = sorted({int(n) for name in ids for n in re.findall(r"(?:layer_|blocks\.)([0-9]+)", name)})
            widths = sorted({w for name in ids for w in re.findall(r"width_([0-9]+[km])", name)}, key=_width)
            text = ", ".join(map(str, layers)) if len(layers) < 8 else f"{layers[0]} to {layers[-1]} ({len(layers)})"
            lines.append([release, model, str(len(ids)), text, ", ".join(widths) or "one"])
    if len(lines) == 1:
        return f"No instruction-tuned release in SAELens' table has {word!r} in its name."
    columns = [max(map(len, column)) for column in zip(*lines)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, columns)).rstrip() for line in lines]
    return "\n".join([*rows, "", "--list-saes RELEASE prints a release's ids."])


def _width(text):
    return int(text[:-1]) * (1_000_000 if text.endswith("m") else 1_000)


def neuronpedia_page(release, sae_id, latent):
    """The address of a latent's page on Neuronpedia, where SAELens' table knows one for the SAE; or None."""
    if Path(release).is_dir():
        return None
    found = [sae for sae in sae_table().get(release, {"saes": []})["saes"] if sae["id"] == sae_id]
    page = found and found[0].get("neuronpedia")
    return f"https://www.neuronpedia.org/{page}/{latent}" if page else None
