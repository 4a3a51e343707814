"""How the C library treats the memory of freed tensors."""

from __future__ import annotations

import ctypes
import os

M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD = -4, -1, -2  # malloc.h of glibc


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next tensors; returns whether it does.

    By default every large tensor is mapped afresh and handed back to the kernel when it is freed, so each step of
    training pays for its pages again. Kept, they make a step on a CPU up to 1.4 times as fast, and the process holds
    its peak to the end. Left alone are an environment that sets MALLOC_* or GLIBC_TUNABLES itself, and other C
    libraries.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # musl, macOS; Windows, which has no CDLL(None)
        return False
    options = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 512 * 2**20))
    return all(mallopt(option, value) for option, value in options)
