"""Memory that the process has freed and the system has not got back."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim; None with other libraries."""
    try:
        found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    except OSError:
        return None
    return found


def give_back() -> None:
    """Return freed memory to the system.

    glibc keeps blocks of up to 32 MB for later, and tensors of many sizes leave more of them than are ever used again:
    at ViT-S as much as everything that is alive.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
