"""Keeps memory that a decode on a CPU frees in the process, for the next decode.

A decode's tensors are megabytes in size. The C library would return such memory to the system at
once, which then has to provide every page anew for the next decode: a tenth to a fifth of a
full-size click's time.
"""

import ctypes

LARGEST_TENSOR = 32 * 2**20
"""Bytes; anything larger is still returned at once. No launch has such tensors, and glibc before
2.35 accepts no more."""

FREE_BYTES = 512 * 2**20
"""Free bytes that may stay at the end of the heap, and as many within it from evicted images."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""Option numbers from glibc's malloc.h."""


def keep_freed_memory() -> None:
    """Set malloc's options for this process; no effect if the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGEST_TENSOR)
        mallopt(_M_TRIM_THRESHOLD, FREE_BYTES)
        # Arenas of threads that run launches side by side would be returned whole once empty.
        mallopt(_M_ARENA_MAX, 1)


def give_back_freed_memory() -> None:
    """Return all free memory to the system, gaps included, which the C library never does unasked.

    Half a gigabyte takes a tenth of a second, during which a decode may have to wait.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
