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


def find_sae(release: str, sae_id: str) -> tuple[str, str]:
    """The model of a release in the table, and the id of its SAE, which may be empty where it has only one."""
    if release not in sae_table():
        raise UserError(f"--sae-release {release}: not in SAELens' table, nor a folder{nearest(release, sae_table())}")
    if is_transcoder(release):
        raise UserError(f"--sae-release {release}: holds transcoders, not SAEs: they read one place and write another")
    ids = _ids_of(release)
    if not sae_id and len(ids) > 1:
        raise UserError(f"--sae-release {release}: holds {len(ids)} SAEs: give --sae-id (--list-saes {release})")
    if sae_id and sae_id not in ids:
        raise UserError(f"--sae-id {sae_id}: not in release {release}{nearest(sae_id, ids)}")
    return sae_table()[release]["model"], sae_id or ids[0]


def _ids_of(release):
    return [sae["id"] for sae in sae_table()[release]["saes"]]


def releases_for(model: str) -> list[str]:
    """The releases in the table that are for a model; a local folder is taken for the model that it is named after."""
    name = Path(model).resolve().name if Path(model).is_dir() else aliases().get(model, model)
    wanted = name.split("/")[-1].lower()
    found = []
    for release, entry in sae_table().items():
        its_model = aliases().get(entry["model"], entry["model"])
        if its_model.split("/")[-1].lower() == wanted and not is_transcoder(release):
            found.append(release)
    return found


def releases_of_repository(repository: str) -> list[str]:
    """The releases in the table whose files lie in a repository on the Hub."""
    found = [release for release, entry in sae_table().items() if entry["repo_id"] == repository]
    return [release for release in found if not is_transcoder(release)] or found


def names_of_files(folder: Path) -> list[tuple[str, str]]:
    """The (release, id) of what a folder holds, by its place in the repositories of the table: the folder's path ends
    in the path that one of them has there. Of several, those whose repository's name stands in the path too."""
    path = folder.resolve().as_posix()
    found, of_repository = [], []
    for release, entry in sae_table().items():
        repository = entry["repo_id"].split("/")[-1]
        for sae in entry["saes"]:
            if not path.endswith(f"/{sae['path']}") or is_transcoder(release):
                continue
            found.append((release, sae["id"]))
            if repository in path:
                of_repository.append((release, sae["id"]))
    return of_repository or found


def enumerate_briefly(names: list[str], most: int = 4) -> str:
    """The first names of a list for a message of one line, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def list_saes(word):
    """The instruction-tuned releases with `word` in their name or their model's, or all ids of the one of that name."""
    models = {
        release: entry["model"]
        for release, entry in sae_table().items()
        if INSTRUCTION_TUNED.search(entry["model"]) and not is_transcoder(release)
    }
    if word in models:
        return "\n".join(_ids_of(word))
    lines = [
        f"{release:<32} {model:<36} {len(_ids_of(release)):>4}  {_ids_of(release)[0]}"
        for release, model in models.items()
        if word.lower() in f"{release} {model}".lower()
    ]
    if not lines:
        return f"No instruction-tuned release in SAELens' table has {word!r} in its name."
    head = f"{'release':<32} {'model':<36} SAEs  the first one's id"
    return "\n".join([head, *lines, "", "--list-saes RELEASE prints a release's ids."])


def neuronpedia_page(release, sae_id, latent):
    """The address of a latent's page on Neuronpedia, where SAELens' table knows one for the SAE; or None."""
    if Path(release).is_dir():
        return None
    pages = [sae.get("neuronpedia") for sae in sae_table().get(release, {"saes": []})["saes"] if sae["id"] == sae_id]
    return f"https://www.neuronpedia.org/{pages[0]}/{latent}" if pages and pages[0] else None
