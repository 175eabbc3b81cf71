"""What the three rounds share. `rounds` knows the order of things; the other modules do not know each other."""

import os
import sys


class UserError(Exception):
    """Something the person at the keyboard can mend: shown as one line on standard error, exit code 2."""


def is_first_process():
    """Of those that a launcher (torchrun, accelerate launch) started: the one that speaks and writes the results."""
    return os.environ.get("RANK", "0") == "0"


def say(text):
    """News for the person who waits; results go to standard output, news to standard error."""
    if is_first_process():
        print(text, file=sys.stderr, flush=True)
