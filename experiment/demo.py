"""The bundled demo: what --demo changes, and where it lies."""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEMO: dict[str, Any] = {  # the options that --demo changes
    "model": "demo/model",
    "sae_release": "demo/sae",
    "sae_id": "",
    "dataset": "demo/questions.jsonl",
    "split": "",
    "device": "cpu",
    "dtype": "float32",
    "batch_tokens": 16384,
    "pool_tokens": 32768,
}


def bundled(name: str) -> str:
    """A path of the bundled demo as it is on this machine; any other name as it is."""
    if name in (DEMO["model"], DEMO["sae_release"], DEMO["dataset"]):
        return str(ROOT / name)
    return name
