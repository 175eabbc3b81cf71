"""Activations and results on disk, with the run that made them: written whole, read strictly. Knows nothing of models.

A run is a dict that says what made a file. A file that is damaged, or of another run, is a UserError that names it.
"""

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path

import filelock

from experiment import UserError

# What changes a result by design. Versions, device and batch size are in a run too, for readers, and not compared.
COMPARED = (
    *("model", "sae_release", "sae_id", "hook_name", "d_sae", "ranking", "dtype", "sae_dtype", "error_term", "dataset"),
    *("split", "exclude_special_tokens", "questions", "prompt_template", "max_new_tokens"),
)
# What else makes a journal another one; of activations, rounds 2 and 3 may mask a part of what round 1 ranked.
SELECTED = ("limit", "sample", "seed", "ranking_seed", "masked", "k", "activations")
WHERE_BOTH = ("hook_name", "d_sae", "ranking_seed")  # compared where both runs have them; two come with the SAE
DEFAULTS = {"error_term": "drop"}  # of files older than the field


def differences(found, wanted, fields):
    """Names each of `fields` in which two runs differ, with both values; an empty text where they agree."""
    named = []
    for field in fields:
        old, new = (run.get(field, DEFAULTS.get(field)) for run in (found, wanted))
        if old != new and not (field in WHERE_BOTH and None in (old, new)):
            old, new = (text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}" for text in map(json.dumps, (old, new)))
            named.append(f"{field} {old}, now {new}")
    return "; ".join(named)


def refuse_other_run(path, found, wanted, fields):
    """Raises UserError where the run `found` in a file differs in `fields` from the one that is wanted now."""
    if named := differences(found, wanted, fields):
        raise UserError(f"{path}: is of another run ({named}): repeat its options, or give --output-dir or --overwrite")


# ---------------------------------------------------------------------------------------------------------------------
# What the files hold: {field: (a test of its value, what the test is for)}. A field with a ? may be missing.


def find_problem(entry, form):
    """Says what in `entry` is not of its form, one of those below; None if all is. Other fields may stand beside."""
    if not isinstance(entry, dict):
        return "it is not an object"
    for field, (is_right, kind) in form.items():
        name = field.rstrip("?")
        if (name in entry or name == field) and not is_right(entry.get(name)):
            return f"{name} is not {kind}"
    return None


def _are_ids(values):
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _are_lists(rankings):
    return isinstance(rankings, dict) and not any(find_problem(lists, LISTS) for lists in rankings.values())


def _are_means(part):
    """Whether n and the metrics are numbers, and whatever has an interval; None where no question counts."""
    intervals = part.get("intervals") if isinstance(part, dict) else None
    if not isinstance(intervals, dict) or not {"em", "f1", "accuracy"} <= intervals.keys() <= part.keys():
        return False
    metrics = [[part[name], *(intervals[name] or ())] for name in intervals]
    return all(
        type(part[name]) in (int, float) and len(interval) == 2 if part[name] is not None
        for name in ("n", *intervals))


TEXT = (lambda value: isinstance(value, str) and not re.search("[\ud800-\udfff]", value)), "a text"  # no half characters
SCORE = (lambda value: type(value) is float and 0 <= value <= 1), "a number from 0.0 to 1.0"
NUMBERS = (lambda values: isinstance(values, list) and all(type(value) is float for value in values)), "a list of numbers"
LATENTS, TOKENS = (_are_ids, "a list of latents"), (_are_ids, "a list of tokens")
