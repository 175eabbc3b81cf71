"""Rankings of one's own: a function in a file, given as FILE.py:FUNCTION. Knows nothing of models.

A file is read once per process: what ranks is what the run's `ranking_digest` says. It is executed only to rank.
"""

import ast
import functools
import hashlib
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiment import UserError, nearest, os_errors

FORM = re.compile(r"(?P<file>.+\.py):(?P<function>\w+)")
# Words of the names of files: predictions_RANKING_false.jsonl, activations_RANKING_mean.json.
RESERVED = {"false", "true", "mean", "keep", "direction"}


def is_own(ranking: str) -> bool:
    """Whether a ranking is given as FILE.py:FUNCTION, not by a name that this project gives it."""
    return FORM.fullmatch(ranking) is not None


def name_of(ranking: str) -> str:
    """What a ranking is called in runs, tables and the names of files: one's own is named after its function."""
    return _split(ranking)[1] if is_own(ranking) else ranking


def digest(ranking: str) -> str:
    """The SHA-256 of the file of a ranking of one's own."""
    file, _ = _split(ranking)
    return hashlib.sha256(_read(file)).hexdigest()


def check(ranking: str) -> None:
    """Raises UserError where FILE.py:FUNCTION leads to no function, or to one that no file can be named after."""
    file, function = _split(ranking)
    words = set(function.lower().split("_"))
    if words & RESERVED:
        reserved = ", ".join(sorted(RESERVED))
        raise UserError(f"--ranking {ranking}: files are named after the function: name it without {reserved}")
    try:
        tree = ast.parse(_read(file))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"--ranking {file}: is not Python ({error})") from None
    functions = []
    for part in tree.body:
        if isinstance(part, ast.FunctionDef):
            functions.append(part.name)
    if function not in functions:
        hint = nearest(function, functions)
        raise UserError(f"--ranking {file}: has no function {function}{hint}")


@functools.cache
def load(ranking: str) -> Callable[..., Any]:
    """The function of a ranking of one's own. Executes its file; what goes wrong there traces back."""
    file, function = _split(ranking)
    module = types.ModuleType(f"own_ranking_{digest(ranking)}")
    module.__file__ = file
    sys.modules[module.__name__] = module  # a dataclass looks its own module up there
    exec(compile(_read(file), file, "exec"), vars(module))
    return getattr(module, function)


def _split(ranking: str) -> tuple[str, str]:
    """File and function."""
    match = FORM.fullmatch(ranking)
    if match is None:
        raise ValueError(f"{ranking!r} is not FILE.py:FUNCTION")
    return match["file"], match["function"]


@functools.cache
def _read(file: str) -> bytes:
    with os_errors(f"--ranking {file}: cannot be read"):
        return Path(file).read_bytes()
