"""Entries of results.json, made up: for tests of tables and figures."""

import json

from experiment.records import entries as records
from experiment.report import tables

PERCENT = ("em", "f1", "accuracy", "named")
LOGS = ("answer_log_prob", "format_log_prob")
TEMPLATE = json.loads(tables.PAPER.read_text())["published"]["gemma-2-9b-it"]["setting"]["prompt_template"]
# The paper's own setting, but for the ranking.
PAPERS = {
    "model": "gemma-2-9b-it",
    "sae_release": "gemma-scope-9b-it-res-canonical",
    "sae_id": "layer_9/width_131k/canonical",
    "dataset": "rajpurkar/squad",
    "split": "validation",
    "limit": None,
    "sample": None,
    "prompt_template": TEMPLATE,
    "dtype": "float16",
    "sae_dtype": "float32",
    "exclude_special_tokens": False,
    "max_new_tokens": 50,
}


def estimate(value, n, names=PERCENT, width=1.25):
    """n, a mean and an interval for each name, as `estimates.summarize` gives them."""
    return (
        {"n": n} | dict.fromkeys(names, value) | {"intervals": {name: [value - width, value + width] for name in names}}
    )


def masked(ranking, masked, k, value, n=595, clean=99.5, mean_k=None, population="f00d" * 16, run=None, **fields):
    """A masked round's entry. value: EM, F1, accuracy and named in percent."""
    logs = estimate(0.1234, n, LOGS, width=0.02)
    drop = estimate(clean - value, n)
    drop = drop | logs | {"intervals": drop["intervals"] | logs["intervals"]}
    return {
        "round": {"topk": "false", "bottomk": "true"}[masked],
        "masked": masked,
        "k": k,
        "mean_k": mean_k if mean_k is not None else 6.5 if k.endswith("%") else float(k),
        "fewer_than_k": 0,
        "run": PAPERS | {"model": "demo", "ranking": ranking} | (run or {}),
        "population": population,
        **estimate(value, n),
        "clean": estimate(clean, n),
        "drop": drop,
        **fields,
    }


def unmasked(n=595, value=99.5, population="f00d" * 16, run=None):
    """Round 1's entry: 56 questions more were asked than kept."""
    return {
        "round": "baseline",
        "k": None,
        "run": PAPERS | {"model": "demo", "ranking": "baseline"} | (run or {}),
        "all": estimate(91.25, n + 56),
        "asked": n + 56,
        "kept": n,
        "wrong": 50,
        "unranked": 6,
        "population": population,
        "population_all": f"all of {population}",
        **estimate(value, n),
    }


def parse(entries):
    return [records.parse_entry(entry) for entry in entries]


LAYERS = [{"sae_id": f"layer_{n}/width_131k/canonical", "hook_name": f"blocks.{n}.hook_resid_post"} for n in (9, 20)]


def several():
    """The entries of two folders: layers 9 and 20, each with questions of its own."""
    entries = []
    for run, population, clean in zip(LAYERS, ("f00d" * 16, "beef" * 16), (99.5, 98.0)):
        of_folder = {"population": population, "run": run}
        entries.append(unmasked(value=clean, **of_folder))
        entries.append(masked("baseline", "topk", "1", 90.0, clean=clean, **of_folder))
        entries.append(masked("baseline", "bottomk", "1", 97.0, clean=clean, **of_folder))
    return entries


RANKINGS = ["baseline", "gradsae", "gradsae-answer", "attribution", "effect", "matched", "random"]


def comparison(n=595, rankings=7, ks=("0", "1", "3", "10", "50%"), settings=({},), **fields):
    """Rankings, both masks, K: drops are 0, 1, 2, ... points."""
    entries = [unmasked(n, run=run) for run in settings]
    number = 0
    for ranking in RANKINGS[:rankings]:
        for side in ("topk", "bottomk"):
            for k in ks:
                for run in settings:
                    entry = masked(ranking, side, k, 99.5 - number % 90, n, run=run, **{"removed": 20.8, **fields})
                    entry["journal"] = f"predictions_{ranking}_{side}_{k}.jsonl"
                    entries.append(entry)
                    number += 1
    return entries


def with_controls(entries, name="direction"):
    """The same, each mask with its control, which costs 1 point, and the excess over it."""
    controlled = []
    for entry in entries:
        controlled.append(entry)
        if "masked" in entry and entry["k"] != "0":
            excess = {"n": entry["n"]} | {metric: entry["drop"][metric] - 1 for metric in ("em", "f1", "named")}
            excess["intervals"] = {metric: [excess[metric] - 2, excess[metric] + 2] for metric in ("em", "f1", "named")}
            entry["excess"] = {name: excess}
            controlled.append({**entry, "control": name, "drop": estimate(1.0, entry["n"]), "excess": None})
    return controlled
