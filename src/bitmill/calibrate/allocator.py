"""What the C library does with freed memory while blocks run.

Every product makes a temporary of some MB. glibc hands large ones back as they are freed, and pages of the
next are zeroed anew: four fifths of the system's time, a fifteenth of the whole of a block. Kept, they are
used again, and the peak is what it was.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_NO_LIMIT = 2**31 - 1
_LARGEST_DYNAMIC = 32 * 2**20  # where glibc's own adjustment of the threshold ends
_ARENAS_BY_CORES = 0


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Freed blocks of any size are used again inside, those of threads that begin there, too. Afterwards what
    is free goes back, and thresholds are the highest that glibc itself would set. Nothing without glibc."""
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_ARENA_MAX, 1)
    library.mallopt(_TRIM_THRESHOLD, _NO_LIMIT)
    if not library.mallopt(_MMAP_THRESHOLD, _NO_LIMIT):
        library.mallopt(_MMAP_THRESHOLD, _LARGEST_DYNAMIC)
    try:
        yield
    finally:
        library.mallopt(_ARENA_MAX, _ARENAS_BY_CORES)
        library.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_DYNAMIC)
        library.mallopt(_MMAP_THRESHOLD, _LARGEST_DYNAMIC)
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL(None)
