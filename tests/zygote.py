"""Runs the scripts as processes of their own without paying for the imports each time: imports once, forks for each.

Reads one JSON object a line: {"script", "arguments", "stdout", "stderr", "trace", "port", "processes", "limits",
"stops"}; prints the process ids, and when all have ended their exit codes (negative: the signal that killed one).
Several processes get the environment that a launcher gives them. No tensor is touched before the fork.

limits: {process: bytes}: no file may grow beyond that.  trace: a file for what the processes do, an event a line
{"process", "kind", "name", "size"}: "pass", a forward pass, whose size is its batch's, [row, pos]; "sync" and "move", a
file in the output folder was synced, or moved into place.  stops: {process: {"kind", "number", "when", "cut",
"signal"}}: just before or after its event `number` (from 0) of a kind, a process sends itself this signal. cut: before
that the file to be synced loses its last bytes, so many, as if only a part of it had come to disk.
"""

import gc
import importlib
import json
import os
import pathlib
import resource
import signal
import sys
import traceback

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import matplotlib.backends.backend_agg  # noqa: E402, F401
import matplotlib.figure  # noqa: E402, F401
import pandas.io.formats.style  # noqa: E402, F401
import sae_lens  # noqa: E402, F401
import transformer_lens.model_bridge  # noqa: E402, F401

import common  # noqa: E402, F401
from experiment import guard  # noqa: E402
from experiment.intervention.forward import SplicedModel  # noqa: E402


class Watch:
    """Writes a process's events to its trace, and stops the process at one of them."""

    def __init__(self, job, process):
        self.folder = pathlib.Path(job["arguments"][job["arguments"].index("--output-dir") + 1]).resolve()
        self.trace, self.process, self.stop = job["trace"], process, job["stops"].get(str(process))
        self.counts = {"pass": 0, "sync": 0, "move": 0}
        self.watch("pass", SplicedModel, "_run", lambda *_: None)
        self.watch("sync", os, "fsync", lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}"))
        self.watch("move", os, "replace", lambda beside, path: os.path.realpath(path))

    def watch(self, kind, owner, name, find_path):
        original = getattr(owner, name)

        def watched(*arguments, **named):
            path = find_path(*arguments)
            if path is not None and os.path.dirname(path) != str(self.folder):
                return original(*arguments, **named)
            here = self.stop and (self.stop["kind"], self.stop["number"]) == (kind, self.counts[kind])
            self.counts[kind] += 1
            if here and self.stop["when"] == "before":
                if self.stop["cut"]:
                    os.truncate(path, os.path.getsize(path) - self.stop["cut"])
                os.kill(os.getpid(), self.stop["signal"])
            try:  # a pass of the layers below the SAE ends with an exception
                return original(*arguments, **named)
            finally:
                if kind == "pass":
                    _, ids, *_ = arguments
                    self.write(kind, {"size": list(ids.shape)})
                else:
                    self.write(kind, {"name": os.path.basename(path), "size": os.path.getsize(path)})
                if here and self.stop["when"] == "after":
                    os.kill(os.getpid(), self.stop["signal"])

        setattr(owner, name, watched)

    def write(self, kind, about):
        with open(self.trace, "a") as file:
            file.write(json.dumps({"process": self.process, "kind": kind} | about) + "\n")


def run(job, process):
    """A process's whole life; returns its exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    for descriptor, path in ((1, job["stdout"]), (2, job["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    if limit := job["limits"].get(str(process)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if job["processes"] > 1:
        place = {"RANK": process, "LOCAL_RANK": process, "WORLD_SIZE": job["processes"], "MASTER_PORT": job["port"]}
        os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    Watch(job, process)
    sys.argv = [job["script"] + ".py", *job["arguments"]]
    return guard(importlib.import_module(job["script"]).main)


def fork(job, process):
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = run(job, process)
    except BaseException:
        traceback.print_exc()
    finally:  # never back into the loop below
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main():
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        for name in ("stdout", "stderr", "trace"):
            open(job[name], "w").close()
        children = [fork(job, process) for process in range(job["processes"])]
        print(*children, flush=True)
        print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)


if __name__ == "__main__":
    main()
