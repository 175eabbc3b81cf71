"""The names of models and SAEs: TransformerLens' list and SAELens' table.

Both are read from the libraries' private files: importing the libraries takes seconds, which a typing mistake should
not cost.
"""

import functools
import importlib.util
import re
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiment import UserError, nearest
from experiment.demo import DEMO, bundled

INSTRUCTION_TUNED = re.compile(r"(?:^|[-_/.])(?:it|instruct|chat)(?:$|[-_/.])", re.IGNORECASE)  # in a model's name


def _locate(package: str, name: str) -> Path:
    """The path of a file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed", name=package)
    return Path(spec.submodule_search_locations[0]) / name


# ---------------------------------------------------------------------------------------------------------------------
# Models


@functools.cache
def aliases() -> dict[str, str]:
    """The full Hub name of every name that TransformerLens knows a model by."""
    models = runpy.run_path(str(_locate("transformer_lens", "supported_models.py")))
    full_names = {}
    for name, short_names in models["MODEL_ALIASES"].items():
        for short in short_names:
            full_names[short] = name
    for name in models["OFFICIAL_MODEL_NAMES"]:
        full_names[name] = name
    return full_names


def official_name(model: str) -> str:
    """A model's full Hub name, for the short ones that TransformerLens knows; a folder or another name as it is."""
    if Path(model).is_dir():
        return model
    full_names = aliases()
    if model not in full_names and "/" not in model:
        hint = nearest(model, full_names)
        raise UserError(f"--model {model}: not a model TransformerLens knows, nor a folder{hint}")
    return full_names.get(model, model)


def same_model(name: str, other: str) -> bool:
    """Whether two names mean the same model. True of a local folder: what it holds shows once it is loaded."""
    if Path(name).is_dir():
        return True
    if _last_part(name) == _last_part(other):
        return True
    return official_name(name) == official_name(other)


def _last_part(name: str) -> str:
    """A model's name without its owner, in lower case."""
    return name.split("/")[-1].lower()


# ---------------------------------------------------------------------------------------------------------------------
# SAEs


@functools.cache
def sae_table() -> dict[str, dict[str, Any]]:
    """SAELens' table: for each release its model, its SAEs, and more."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the first one is faster, where there is one
    with open(_locate("sae_lens", "pretrained_saes.yaml"), encoding="utf-8") as file:
        table: dict[str, dict[str, Any]] = yaml.load(file, Loader=loader)
    table["gemma-scope-9b-it-res"]["model"] = "gemma-2-9b-it"  # it says gemma-2-9b there; SAELens' own loader does not
    return table


def is_transcoder(release: str) -> bool:
    """Whether a release in the table reads one place and writes another."""
    loader = sae_table()[release].get("conversion_func") or ""
    return "transcoder" in release or "transcoder" in loader


def find_sae(release: str, sae_id: str) -> tuple[str, str]:
    """The model of a release in the table, and the id of its SAE, which may be empty where it has only one."""
    table = sae_table()
    given = f"--sae-release {release}"
    if release not in table:
        hint = nearest(release, table)
        raise UserError(f"{given}: not in SAELens' table, nor a folder{hint}")
    if is_transcoder(release):
        raise UserError(f"{given}: holds transcoders, not SAEs: they read one place and write another")
    ids = _ids_of(release)
    if not sae_id:
        if len(ids) > 1:
            raise UserError(f"{given}: holds {len(ids)} SAEs: give --sae-id (--list-saes {release})")
        sae_id = ids[0]
    if sae_id not in ids:
        hint = nearest(sae_id, ids)
        raise UserError(f"--sae-id {sae_id}: not in release {release}{hint}")
    model = table[release]["model"]
    return model, sae_id


def _ids_of(release: str) -> list[str]:
    return [sae["id"] for sae in sae_table()[release]["saes"]]


def releases_for(model: str) -> list[str]:
    """The releases in the table that are for a model; a local folder is taken for the model that it is named after."""
    if Path(model).is_dir():
        name = Path(model).resolve().name
    else:
        name = aliases().get(model, model)
    releases = []
    for release, entry in sae_table().items():
        its_model = aliases().get(entry["model"], entry["model"])
        if _last_part(its_model) == _last_part(name) and not is_transcoder(release):
            releases.append(release)
    return releases


def releases_of_repository(repository: str) -> list[str]:
    """The releases in the table whose files lie in a repository on the Hub."""
    releases = [release for release, entry in sae_table().items() if entry["repo_id"] == repository]
    of_saes = [release for release in releases if not is_transcoder(release)]
    return of_saes or releases


def names_of_files(folder: Path) -> list[tuple[str, str]]:
    """The (release, id) of what a folder holds, by its place in the repositories of the table: the folder's path ends
    in the path that one of them has there. Of several, those whose repository's name stands in the path too."""
    path = folder.resolve().as_posix()
    names = []
    of_repository = []
    for release, entry in sae_table().items():
        repository = entry["repo_id"].split("/")[-1]
        for sae in entry["saes"]:
            if not path.endswith(f"/{sae['path']}") or is_transcoder(release):
                continue
            names.append((release, sae["id"]))
            if repository in path:
                of_repository.append((release, sae["id"]))
    return of_repository or names


def enumerate_briefly(names: list[str], most: int = 4) -> str:
    """The first names of a list for a message of one line, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def list_saes(word: str) -> str:
    """The instruction-tuned releases with `word` in their name or their model's, or all ids of the one of that name."""
    models = {}
    for release, entry in sae_table().items():
        if INSTRUCTION_TUNED.search(entry["model"]) and not is_transcoder(release):
            models[release] = entry["model"]
    if word in models:
        return "\n".join(_ids_of(word))
    lines = []
    for release, model in models.items():
        names = f"{release} {model}"
        if word.lower() not in names.lower():
            continue
        ids = _ids_of(release)
        count = len(ids)
        line = f"{release:<32} {model:<36} {count:>4}  {ids[0]}"
        lines.append(line)
    if not lines:
        return f"No instruction-tuned release in SAELens' table has {word!r} in its name."
    head = f"{'release':<32} {'model':<36} SAEs  the first one's id"
    return "\n".join([head, *lines, "", "--list-saes RELEASE prints a release's ids."])


def neuronpedia_page(release: str, sae_id: str, latent: int | str) -> str | None:
    """The address of a latent's page on Neuronpedia, where SAELens' table knows one for the SAE; or None.

    latent: "" for the beginning of the addresses of all of them.
    """
    if Path(release).is_dir() or release not in sae_table():
        return None
    for sae in sae_table()[release]["saes"]:
        if sae["id"] == sae_id and sae.get("neuronpedia"):
            return f"https://www.neuronpedia.org/{sae['neuronpedia']}/{latent}"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# On the command line


def settle_names(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, str]:
    """Model and SAE id where the release says them. Refuses names that do not belong together. Downloads nothing."""
    if not given.keys() & {"model", "sae_release", "sae_id"}:
        return {}
    usual_release: str = defaults["sae_release"]
    release: str = given.get("sae_release", usual_release)
    is_in_table = release in sae_table()
    if "sae_release" not in given and "model" in given and is_in_table:
        _ask_for_release(given["model"], release)
    usual_id: str = defaults["sae_id"] if release == usual_release else ""
    sae_id: str = given.get("sae_id", usual_id)
    # A folder or a repository may hold one SAE that has no id, and says itself which model it is for.
    if Path(bundled(release)).is_dir():
        return {"sae_id": sae_id}
    if not is_in_table and re.fullmatch(r"\w[\w.-]*/[\w.-]+", release):
        _refuse_repository_of_table(release)
        return {"sae_id": sae_id}
    its_model, sae_id = find_sae(release, sae_id)
    usual_model: str = DEMO["model"] if "demo" in given else its_model
    model: str = given.get("model", usual_model)
    if model == DEMO["model"] or not same_model(model, its_model):  # a folder is taken for any model
        raise UserError(f"--sae-release {release}: belongs to {its_model}, not to {model}")
    return {"model": model, "sae_id": sae_id}


def _ask_for_release(model: str, release: str) -> None:
    """Raises UserError for a model that is given alone and that the default SAE is not for: downloading that SAE would
    only show that it does not fit."""
    if not model:
        return  # _check says so
    if not Path(bundled(model)).is_dir():
        official_name(model)  # a name that is mistyped is that first
    found = releases_for(bundled(model))
    if release in found:
        return
    advice = f"SAELens' table has {enumerate_briefly(found)}"
    if model == DEMO["model"]:
        advice = f"{DEMO['sae_release']} is for it"
    elif not found:
        advice = "SAELens' table has none for it: give a local SAE folder, or a repository on the Hub"
    its_model = sae_table()[release]["model"]
    raise UserError(f"--model {model}: give --sae-release too, for the default SAE is for {its_model}: {advice}")


def _refuse_repository_of_table(repository: str) -> None:
    """Raises UserError for a repository whose files SAELens reads by the names of releases in its table alone."""
    releases = releases_of_repository(repository)
    if releases:
        raise UserError(
            f"--sae-release {repository}: give the name that SAELens' table has for it: "
            f"{enumerate_briefly(releases)} (--list-saes RELEASE prints the ids)"
        )
