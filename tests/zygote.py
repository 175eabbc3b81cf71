"""Runs the scripts as processes of their own without paying for the imports each time: imports once, forks for each.

Reads one JSON object a line: {"script", "arguments", "stdout", "stderr", "limit", "processes"}; prints the process ids,
and when all have ended their exit codes (negative: the signal that killed one). Several processes get the environment
that a launcher gives them. No tensor is touched before the fork.
"""

import importlib
import json
import os
import pathlib
import resource
import signal
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import sae_lens  # noqa: E402, F401
import transformer_lens.model_bridge  # noqa: E402, F401

import common  # noqa: E402
from experiment import rounds  # noqa: E402, F401


def run(job, number):
    """A process's whole life."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    for descriptor, path in ((1, job["stdout"]), (2, job["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    if job["limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
    if job["processes"] > 1:
        place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": job["processes"], "MASTER_PORT": job["port"]}
        os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    sys.argv = [job["script"] + ".py", *job["arguments"]]
    code = common.guard(importlib.import_module(job["script"]).main)
    sys.stdout.flush()
    os._exit(code)


def main():
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        for path in (job["stdout"], job["stderr"]):
            open(path, "w").close()
        children = []
        for number in range(job["processes"]):
            children.append(os.fork())
            if children[-1] == 0:
                run(job, number)
        print(*children, flush=True)
        print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)


if __name__ == "__main__":
    main()
