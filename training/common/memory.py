"""Memory: keep what a step frees for the next one, and say what to lower where a device has too little."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator

import torch


def keep_freed_memory() -> None:
    """
    Keep the memory of freed tensors in this process, for the tensors of the next step. On other devices than CPUs
    PyTorch does so by itself.

    The system zeroes every page that it hands out. A step that allocates gradients as large as the dictionary spent a
    seventh of its time on that.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # not all C libraries have it
        libc.mallopt(-4, 0)  # M_MMAP_MAX: everything from the heap,
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which stays


@contextlib.contextmanager
def enough_memory(doing: str, remedy: Callable[[], str]) -> Iterator[None]:
    """Raise `MemoryError` with a remedy where a device runs out of memory inside the `with` block."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise MemoryError(f"The device ran out of memory while {doing}. {remedy()}") from None
