"""Freed memory that the allocator keeps, given back to the system.

glibc keeps blocks of up to 32 MiB for later ones. What a proof has freed lies between what stays,
and is larger than what a warm call needs: the process would stay that large.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable


def give_back() -> None:
    """Hand the pages of freed memory back; with allocators other than glibc's, nothing."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL(None).malloc_trim
    except AttributeError:  # musl
        return None
