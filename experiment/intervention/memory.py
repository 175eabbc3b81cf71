"""Out of memory: what was asked for is split in halves until it fits."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate.utils.memory import release_memory, should_reduce_batch_size

from experiment import UserError, say

Item = TypeVar("Item")
ADVICE = (
    "out of memory with a single question, so that a smaller --batch-tokens cannot help: several GPUs (--device-map "
    "auto), a smaller --sae-dtype or --dtype, a shorter --max-new-tokens or fewer rankings can; what was finished is kept"
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device's memory has run out."""
    return should_reduce_batch_size(error) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)  # accelerate lacks this one


def halve_on_oom(
    run: Callable[[Sequence[Item]], None],
    items: Sequence[Item],
    make_room: Callable[[], bool] = lambda: False,
) -> None:
    """run(items); where memory runs out, again once make_room() has freed some, and then for each half of the items.

    What `run` has noted before it failed stays noted: called again, it does what is left.
    Raises UserError where a single item does not fit.
    """
    try:
        run(items)
        return
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # Out of the except block: the error holds on to every tensor on its way.
    release_memory()
    if make_room():
        halve_on_oom(run, items, make_room)
        return
    if len(items) == 1:
        raise UserError(ADVICE)
    say(f"Out of memory with {len(items)} questions at once: they are split in two; nothing is lost.")
    half = len(items) // 2
    halve_on_oom(run, items[:half], make_room)
    halve_on_oom(run, items[half:], make_room)
