"""Runs the scripts as processes of their own without paying for the imports each time: imports once, forks for each.

Reads one JSON object a line: {"script", "arguments", "stdout", "stderr", "limit"}; prints the process id, and when the
process has ended its exit code (negative: the signal that killed it). No tensor is touched before the fork.
"""

import importlib
import json
import os
import pathlib
import resource
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import sae_lens  # noqa: E402, F401
import transformer_lens.model_bridge  # noqa: E402, F401

import common  # noqa: E402
from experiment import rounds  # noqa: E402, F401


def main():
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            for number, path in ((1, job["stdout"]), (2, job["stderr"])):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            if job["limit"]:
                resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
            sys.argv = [job["script"] + ".py", *job["arguments"]]
            code = common.guard(importlib.import_module(job["script"]).main)
            sys.stdout.flush()
            os._exit(code)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
