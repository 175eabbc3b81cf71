"""What the scripts and common.py stand on. Nothing in here imports them."""

import contextlib
import difflib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Something the person at the keyboard can mend: shown as one line on standard error, exit code 2."""


def is_first_process() -> bool:
    """Of those that a launcher (torchrun, accelerate launch) started: the one that speaks and writes the results."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """News for the person who waits; results go to standard output, news to standard error."""
    if is_first_process():
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def os_errors(what: str) -> Iterator[None]:
    """Tells in one line why a file cannot be read or written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} ({error.strerror})") from None


def parse_json(text: str | bytes, where: str | Path) -> Any:
    """The value in a JSON text, or in its bytes. where: what names it if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON ({error})") from None


def nearest(word: str, names: Iterable[str]) -> str:
    """A hint for an error message: the names most like `word`, or nothing where none is."""
    close = difflib.get_close_matches(word, list(names), n=3, cutoff=0.5)
    return f" (nearest: {', '.join(close)})" if close else ""


def name_some(names: list[str]) -> str:
    """The first five of some names, for a line that says how many they are."""
    more = ", ..." if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


@contextlib.contextmanager
def own_mistakes() -> Iterator[None]:
    """For work that processes share: a mistake shows in one of them alone, and that one has to tell it."""
    try:
        yield
    except UserError as error:
        if not is_first_process():
            print(f"process {int(os.environ['RANK']) + 1}: {error}", file=sys.stderr, flush=True)
        raise


def guard(main: Callable[[], object]) -> int:
    """Runs a script's main. A person's mistake is one line and exit code 2, Ctrl-C 130; only our bugs trace back."""
    # Memory that grows in place, for every batch has another width. PyTorch reads this as it is imported.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # A path may hold characters that the terminal's encoding lacks: no reason to lose a table over them.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
        return 0
    except UserError as error:
        script = Path(sys.argv[0])
        name = script.parent.name if script.name == "__main__.py" else script.name  # of `python -m experiment.report`
        one_line = " ".join(str(error).split())
        say(f"{name}: {one_line}")
        return 2
    except KeyboardInterrupt:
        same = "the same command without --overwrite" if "--overwrite" in sys.argv else "the same command"
        say(f"\nInterrupted: what was finished is kept; {same} goes on from there.")
        return 130
    except BrokenPipeError:
        # Who reads the output has enough of it, as `head` has: what is still to come of it goes nowhere.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        return 1
