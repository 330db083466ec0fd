"""Work that does not fit into memory: recognised, done again in smaller pieces, and an error only where there are none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

from trimtab.errors import ResourceError

T = TypeVar("T")

_SIGNS = ("can't allocate memory", "bad_alloc", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""In messages of plain RuntimeErrors: torch's allocators, the C++ library, cuBLAS."""


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory, the system's or a GPU's, has run out."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def fitted(
    work: Callable[[int], T], size: int, smaller: Callable[[int], int | None], undo: Callable[[], None] = lambda: None
) -> tuple[T, int]:
    """`work(size)`, with smaller and smaller sizes while memory runs out; and how often it did.

    Nothing is remembered: the next work begins with its full size, so that what a run does depends on no earlier shortage.

    smaller: the size to try after one that did not fit; null if there is none.
    undo:    puts right what half-done work has left.
    Raises ResourceError where the smallest size does not fit either.
    """
    times = 0
    while True:
        try:
            return work(size), times
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            last, less = shortage(error), smaller(size)
        undo()  # here, where the error no longer holds on to what its frames hold
        _give_back()
        if less is None:
            raise last
        size, times = less, times + 1


def shortage(error: BaseException) -> ResourceError:
    """What a user is told where memory has run out."""
    said = str(error).strip().partition("\n")[0] or type(error).__name__
    fix = "`trimtab plan` says what a recipe needs; set model.checkpointing=true, have fewer or shorter responses, or take a smaller model"
    return ResourceError(f"memory has run out: {said[:200]}", fix=fix)


def _give_back() -> None:
    """Memory that torch keeps for a GPU and that is free, so that pieces of another size can have it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
