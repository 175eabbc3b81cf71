import http.server
import json
import os
import pathlib
import sys
import tempfile
import threading

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Answers as the Hugging Face Hub does to those who ask for what they may not have. Serves nothing."""

    tokens = []

    def do_GET(self):
        self.tokens.append(self.headers.get("Authorization"))
        if "gemma" in self.path:
            self.refuse(403, "GatedRepo", "Access to this model is restricted.")
        elif "bad-token" in self.path:
            self.refuse(401, None, "Invalid credentials in Authorization header")
        elif "no-entry" in self.path:
            self.refuse(404, "EntryNotFound", "Entry not found")
        elif "unreachable" in self.path:
            self.close_connection = True
        else:
            self.refuse(404, "RepoNotFound", "Repository not found")

    do_HEAD = do_GET

    def refuse(self, status, code, message):
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


# Before anything imports huggingface_hub, which reads its address and its folders once.
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hub-")
os.environ.pop("HF_HUB_OFFLINE", None)
os.environ.pop("HF_TOKEN", None)
if "PYTEST_XDIST_WORKER" in os.environ:  # a thread each: two workers with two threads each take twice as long
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import common  # noqa: E402
from experiment import guard, questions  # noqa: E402
from experiment import options as command_line  # noqa: E402
from experiment.demo import bundled  # noqa: E402
from experiment.hub import prepare_libraries  # noqa: E402
from experiment.intervention import generate, steps  # noqa: E402
from experiment.intervention.ablations import Ablation  # noqa: E402
from experiment.intervention.generate import Group  # noqa: E402
from experiment.intervention.pool import Limits  # noqa: E402

LONGEST = ("rounds", "faults", "oracle", "families", "loading", "benchmarks", "readme")


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that two workers with a file each at a time end together."""
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture
def hub():
    return FakeHub


def options(*arguments, masks=None):
    """The options of a demo round, as the command line would give them."""
    return command_line.parse(["--demo", *map(str, arguments)], "", masks)


def load(*arguments):
    """(SplicedModel, tokenizer) as a round with these options loads them."""
    chosen = options(*arguments)
    prepare_libraries(chosen)
    tokenizer = common.load_tokenizer(chosen)
    return common.load(chosen, tokenizer), tokenizer


def run_script(name, arguments, monkeypatch, capsys):
    """Runs a script's main in this process, which has the libraries loaded. Returns exit code, stdout, stderr."""
    script = __import__(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    capsys.readouterr()
    code = guard(script.main)
    return code, *capsys.readouterr()


def read_journal(path):
    """A journal's run, and its records by id."""
    head, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return head["run"], {line["id"]: line for line in lines}


def read_activations(path):
    """The run and the samples of a file of activations, as they stand there."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["run"], content["samples"]


def write_activations(path, run, samples):
    path.write_text(json.dumps({"run": run, "samples": samples}), encoding="utf-8")


@pytest.fixture(scope="session")
def demo():
    """The bundled model and SAE in float32, as the scripts load them: (SplicedModel, tokenizer).

    `.model` is the TransformerBridge and `.splice.sae` the SAE, which the oracle works with.
    """
    return load()


@pytest.fixture(scope="session")
def demo_questions():
    found, *_ = questions.load(bundled("demo/questions.jsonl"), "")
    return found


def answer(model, prompts, contexts, longest, opening=(), pool_tokens=10**9):
    """Unmasked answers to the prompts of one batch, and what the SAE read: as generate.answer gives them."""
    group = Group(prompts, list(contexts), [list(range(len(prompts)))])
    return generate.answer(model, group, Limits(longest, pool_tokens), opening)


def answer_masked(model, prompts, contexts, drafts, masks, longest, means=None, pool_tokens=10**9):
    """[mask][Answer] of one batch. masks: of each a list of latents per question, or an Ablation."""
    masks = [mask if isinstance(mask, Ablation) else Ablation(mask) for mask in masks]
    group = Group(prompts, list(contexts), [list(range(len(prompts)))], drafts, masks)
    return generate.answer_masked(model, group, Limits(longest, pool_tokens), means)


@pytest.fixture(params=[False, True], ids=["run", "replayed"])
def replayed(request, monkeypatch):
    """Whether steps are what a CUDA device records and replays; here each is computed anew."""
    if not request.param:
        return False
    start = steps.Steps.__init__

    def start_recordable(self, model, *arguments):
        monkeypatch.setattr(model, "can_record", True)
        start(self, model, *arguments)

    monkeypatch.setattr(steps.Steps, "__init__", start_recordable)
    monkeypatch.setattr(steps, "record", lambda step: step)
    return True
