"""Memory that is freed stays with the process for the next tensor."""

import ctypes
import os

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Of `mallopt` in the C library's malloc.h."""
KEPT = 2**29
"""Bytes that stay at most, at the end of the heap."""
OF_A_TENSOR = 2**27
"""Bytes from which on a tensor is still given back, each by itself: those of the weights of a large layer."""


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed, 512 MiB at most, for the rest of the process; whether it does.

    By itself glibc hands tensors of some MB back to the system, which clears every page anew for the next one, and
    interrupts the other threads of the process to do so: about a fifth of the time of a small model on one thread, and
    more on several and where much is cached. With models of gigabytes it gains little, and pieces that are freed
    between others would add up. A process that has set MALLOC_TRIM_THRESHOLD_ itself, and other C libraries, are left
    as they are.
    """
    if "MALLOC_TRIM_THRESHOLD_" in os.environ or os.name != "posix":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(MMAP_THRESHOLD, OF_A_TENSOR)) and bool(mallopt(TRIM_THRESHOLD, KEPT))
