"""Memory: what a step frees is kept for the next, and what to lower where a device has too little."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator

import torch


def keep_freed_memory() -> None:
    """
    Have this process keep the memory of freed tensors for those of the next step, as it is on devices other than CPUs.

    The system zeroes the pages that it hands out; a step that takes and returns gradients as large as the dictionary
    spent a seventh of its time on that.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # other libraries of C have no such
        libc.mallopt(-4, 0)  # M_MMAP_MAX: everything from the heap,
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which stays


@contextlib.contextmanager
def enough_memory(doing: str, remedy: Callable[[], str]) -> Iterator[None]:
    """Raise `MemoryError` with a remedy where a device runs out of memory inside the `with` block."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise MemoryError(f"The device ran out of memory while {doing}. {remedy()}") from None
