"""What libraries do of their own accord and a round must not have, put right for as long as a block lasts."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import transformers
from transformers import modeling_utils


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """An attribute of a module or a class with another value."""
    usual = inspect.getattr_static(owner, name)  # a class method as it stands in its class, not bound to it
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, usual)


def no_processor() -> contextlib.AbstractContextManager[None]:
    """No processor for pictures beside a tokenizer.

    For a model that also reads pictures (Gemma 3 from 4b on) TransformerLens asks for its processor, and where that
    needs torchvision it has pip install it in the middle of the round, and another torch with it. Text needs neither.
    """

    def load_none(*_: object, **__: object) -> None:
        return None

    return _replaced(transformers.AutoProcessor, "from_pretrained", load_none)


def weights_read_in_parts() -> contextlib.AbstractContextManager[None]:
    """Files of weights are read, not mapped into memory.

    A mapped file stays in memory while its tensors are converted: twice the model's size, from bfloat16 to float16.
    """
    safe_open = modeling_utils.safe_open

    def open_unmapped(file: Any, **how: Any) -> Any:
        how["backend"] = "pread"
        return safe_open(file, **how)

    return _replaced(modeling_utils, "safe_open", open_unmapped)


def attention_as_it_is() -> contextlib.AbstractContextManager[None]:
    """TransformerLens leaves Gemma's attention as Transformers have it.

    It puts hooks around its queries and keys, for all models of the process and for good, also where nothing is hooked:
    in a step of one answer that is a twentieth of the host's work.
    """
    # Here, for it takes seconds.
    from transformer_lens.model_bridge.generalized_components import position_embeddings_attention

    return _replaced(position_embeddings_attention, "_setup_eager_attention_hook_wrapper", lambda: None)
