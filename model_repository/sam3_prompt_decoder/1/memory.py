"""Memory that a decode on a CPU frees stays with the process, for the next decode.

A decode's tensors have megabytes. The C library would give such memory back to the system at once,
which then makes each of its pages anew for the next decode: a tenth to a fifth of a full-size
click's time.
"""

import ctypes

LARGEST_TENSOR = 32 * 2**20
"""Bytes; what is larger still goes back at once. No launch has such, and glibc before 2.35 accepts
no more."""

FREE_BYTES = 512 * 2**20
"""How much may lie idle at the heap's end, and as much again of images forgotten within it."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""Of glibc's malloc.h."""


def keep_freed_memory() -> None:
    """For this process; without effect where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGEST_TENSOR)
        mallopt(_M_TRIM_THRESHOLD, FREE_BYTES)
        # Arenas of the threads that launch side by side would go back whole once they are empty.
        mallopt(_M_ARENA_MAX, 1)


def give_back_freed_memory() -> None:
    """All that is free, also between what is not, which the C library never gives back by itself.

    Half a gigabyte takes a tenth of a second, in which a decode may have to wait.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
