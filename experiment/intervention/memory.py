"""Out of memory: what was asked for is split in halves until it fits."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

from accelerate.utils.memory import release_memory, should_reduce_batch_size

from experiment import UserError, own_mistakes, say

Item = TypeVar("Item")


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device's memory has run out."""
    return should_reduce_batch_size(error) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)  # accelerate lacks this one


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Tells in one line what helps where the device runs out of memory and there is nothing to split any more."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        with own_mistakes():  # a process of several: the others may have memory enough
            raise UserError(
                "out of memory, with no batch left to split, so that a smaller --batch-tokens cannot help: several "
                "GPUs (--device-map auto), a smaller --sae-dtype or --dtype, a shorter --max-new-tokens or fewer "
                "rankings can; what was finished is kept"
            ) from error


def halve_on_oom(
    run: Callable[[list[Item]], None],
    items: list[Item],
    make_room: Callable[[], bool] = lambda: False,
    name: str = "questions in a batch",
) -> None:
    """run(items); where memory runs out, again once make_room() has freed some, and then for each half of the items.

    name: what the items are, for the person who waits.
    What `run` has noted before it failed stays noted: called again, it does what is left.
    Raises what `run` raised where even one item is too much: what it is a part of may still be split.
    """
    try:
        run(items)
        return
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failure = error.with_traceback(None)  # the traceback holds on to every tensor on its way
    release_memory()
    if make_room():
        halve_on_oom(run, items, make_room, name)
        return
    if len(items) == 1:
        raise failure
    say_split(len(items), name)
    half = len(items) // 2
    halve_on_oom(run, items[:half], make_room, name)
    halve_on_oom(run, items[half:], make_room, name)


def say_split(count: int, name: str) -> None:
    """Tells that so many items were too much. name: of what, in the plural."""
    say(f"Out of memory with {count} {name}: they are split in two; nothing is lost.")
