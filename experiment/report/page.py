"""The page: results.html, one file without network, to look at single questions. Knows nothing of models.

page.html, page.css and page.js are its parts; the searchable table is DataTables, which itables brings along.
"""

import base64
from pathlib import Path

import jinja2

from experiment import catalogue
from experiment.options import bundled
from experiment.report import estimates, tables
from experiment.report.folders import masked_latents

RIGHT_F1 = 0.9  # from which on an answer counts as parsed right, as in round 1
LONGEST = 100  # latents of a list that are shown
# Neuronpedia's issue 123. Not known of other models.
CAVEATS = {"gemma-2-9b-it": "Neuronpedia's pages on gemma-2-9b-it were made with a wrongly placed BOS token."}
FACTS = {
    "model": "model",
    "SAE": "sae_release",
    "SAE id": "sae_id",
    "place": "hook_name",
    "latents": "d_sae",
    "error term": "error_term",
    "data set": "dataset",
    "split": "split",
    "configuration": "dataset_config",
    "precision": "dtype",
    "SAE's precision": "sae_dtype",
    "device": "device",
    "longest answer, tokens": "max_new_tokens",
}


def write(file, folders, entries, svg):
    """Writes the page of these Folders to a text file.

    entries: of all of them, for the table.  svg: the figure; empty where nothing was masked.
    """
    from itables.utils import find_package_file  # brings in pandas, which only the end of a round needs

    cells, notes = tables.write_cells(tables.frame(entries))
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    bundle = find_package_file("html", "dt_bundle.js")
    template = environment.get_template("page.html")
    stream = template.stream(
        facts=[name_folder(folder, folders) | describe(folder) for folder in folders],
        heads=list(cells),
        rows=cells.values.tolist(),
        texts=cells.columns.get_loc("n"),  # columns of texts, before those of numbers
        notes=notes,
        svg=svg[svg.index("<svg") :] if svg else None,
        data=collect(folders),
        caveats=sorted({CAVEATS[name] for name in map(_model, folders) if name in CAVEATS}),
        style=bundle.with_suffix(".css").read_text(encoding="utf-8"),
        library=base64.b64encode(bundle.read_bytes()).decode(),
    )
    stream.dump(file)


def describe(folder):
    """{what: text} of what was run in a folder."""
    run = folder.entries[0]["run"]
    facts = {name: str(run[field]) for name, field in FACTS.items() if run.get(field) not in (None, "")}
    round_1 = next((entry for entry in folder.entries if "asked" in entry), None)
    kept = f"{round_1['kept']} of {round_1['asked']} asked" if round_1 else f"{len(folder.kept)}"
    versions = ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items())
    return {"questions kept": kept} | name_left_out(folder.entries) | facts | {"versions": versions}


def name_left_out(entries: list[dict]) -> dict[str, str]:
    """{what: text} of the questions that do not fit the model's context; none where all do."""
    left_out = dict.fromkeys(name for entry in entries for name in entry.get("left_out", ()))
    if not left_out:
        return {}
    return {"left out, too long for the model's context": f"{len(left_out)}: {', '.join(left_out)}"}


def name_folder(folder, folders):
    """Only where there are several: a round's files do not depend on where they lie."""
    return {"folder": str(folder.path)} if len(folders) > 1 else {}


def _model(folder):
    return folder.entries[0]["run"].get("model", "").split("/")[-1]


def collect(folders):
    """What page.js shows, as compact as it can be read: each context once, what is as unmasked not again.

    contexts: texts.  folders: {name, page}, page the beginning of its latents' addresses on Neuronpedia.
    masks: {folder, ranking, masked, k, list} of the masked rounds, folder and list numbers.
    lists: {folder, name} of the lists of latents that these masks are beginnings of.
    questions: {id, context (number or null), question, truths, unmasked, masked, counts, latents}; unmasked an answer
    or null for each folder, masked an answer, 0 (as unmasked) or null (not asked) and counts the number of latents
    masked for each mask, latents the ids for each list. An answer is [answer, text, em, f1, named].
    """
    columns, lists = [], []  # of a mask: its folder's number, its entry, its records, its list's number
    for number, folder in enumerate(folders):
        for entry, records in folder.masked:
            name = number, entry["run"]["ranking"], entry["masked"], entry.get("latents")
            lists += [] if name in lists else [name]
            columns.append((number, entry, records, lists.index(name)))
    contexts, by_key = {}, {}
    for folder in folders:
        for name in folder.kept:
            key = folder.entries[0]["run"].get("questions"), name
            if key not in by_key:
                by_key[key] = _question(folders, columns, len(lists), key, contexts)
    return {
        "right": RIGHT_F1,
        "contexts": list(contexts),
        "folders": [{"name": name_folder(f, folders).get("folder", ""), "page": _neuronpedia(f)} for f in folders],
        "masks": [
            {
                "folder": number,
                "ranking": e["run"]["ranking"],
                "masked": tables.name_mask(e),
                "k": e["k"],
                "list": place,
            }
            for number, e, _, place in columns
        ],
        "lists": [{"folder": f, "name": f"{ranking} {estimates.MASKS[which]}"} for f, ranking, which, _ in lists],
        "questions": list(by_key.values()),
    }


def _question(folders, columns, lists, key, contexts):
    """One of `collect`'s questions. key: the data set's hash, the id.  contexts: {text: number}, to be added to."""
    here = [folder.entries[0]["run"].get("questions") == key[0] for folder in folders]
    question = next(
        (f.questions[key[1]] for f, is_here in zip(folders, here) if is_here and key[1] in f.questions), None
    )
    unmasked = [f.answers.get(key[1]) if is_here else None for f, is_here in zip(folders, here)]
    masked, counts, latents = [], [], [[] for _ in range(lists)]
    for number, entry, records, place in columns:
        record, before = records.get(key[1]) if here[number] else None, unmasked[number]
        same = record and before and _answer(record) == _answer(before)
        masked.append(0 if same else record and _answer(record))
        ids = masked_latents(folders[number], entry, key[1]) if record else []
        counts.append(len(ids))
        latents[place] = max(latents[place], ids[:LONGEST], key=len)
    return {
        "id": key[1],
        "context": contexts.setdefault(question.context, len(contexts)) if question else None,
        "question": question.question if question else key[1],
        "truths": list(dict.fromkeys(question.truths)) if question else [],
        "unmasked": [before and _answer(before) for before in unmasked],
        "masked": masked,
        "counts": counts,
        "latents": latents,
    }


def _answer(record):
    """[answer, text, em, f1, named] of a record; of a file of activations, which has no text, the answer twice."""
    scores = int(record["em"]), round(record["f1"], 3), int(record.get("named", record["em"]))
    return [record["answer"], record.get("text", record["answer"]), *scores]


def _neuronpedia(folder):
    run = folder.entries[0]["run"]
    return catalogue.neuronpedia_page(bundled(run.get("sae_release", "")), run.get("sae_id"), "")
