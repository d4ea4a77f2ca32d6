"""How the C library keeps the memory of a training."""

from __future__ import annotations

import ctypes
import sys

# Names of settings, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Lets this process keep what its tensors free, for those that follow; tells whether the C library was asked.

    glibc gives a freed block of more than some megabytes back to the system, and the next tensor of that size is
    fetched again, page by page. A step of a wide network has hundreds of them. The price is that memory which a process
    used once stays with it, so this is for a process that trains, and not for a library to decide.
    """
    if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "mallopt"):
        return False
    return bool(library.mallopt(_MMAP_MAX, 0) and library.mallopt(_TRIM_THRESHOLD, _NEVER))
