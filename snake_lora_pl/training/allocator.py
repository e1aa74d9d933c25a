"""What becomes of freed memory on a CPU: kept in the process between steps, or given back.

glibc gives large blocks back to the system as soon as they are freed. A training step on a CPU frees and takes back
gigabytes of activations: on two cores that was about 180,000 page faults a step, and a fifth of it where it is kept.
Kept memory has holes, which is no way to save any.
"""

from __future__ import annotations

import ctypes
import sys

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
_NEVER = 2**31 - 1
_MANY = 2**20
_LARGE_BYTES = 2**18


def keep_freed_memory() -> bool:
    """Tell glibc to serve every block from the heap and never to shrink it; elsewhere nothing is done.

    The setting is the process's and cannot be taken back; memory stays at its peak until the process ends.

    Returns:
        Whether the allocator took the settings.
    """
    return _set({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _NEVER})


def give_back_freed_memory() -> bool:
    """Tell glibc to serve every large block from the system and to give it back at once; elsewhere nothing is done.

    Left to itself glibc does so only up to the size of the first block that is freed.

    Returns:
        Whether the allocator took the settings.
    """
    return _set({_M_MMAP_MAX: _MANY, _M_MMAP_THRESHOLD: _LARGE_BYTES, _M_TRIM_THRESHOLD: _LARGE_BYTES})


def _set(settings: dict[int, int]) -> bool:
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has no such knob
        return False
    return all(mallopt(name, value) for name, value in settings.items())
