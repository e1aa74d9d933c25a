"""Settings of glibc's allocator for training on a CPU: keep freed memory between steps, or return it at once.

By default glibc returns large blocks to the system as soon as they are freed. A training step on a CPU frees and
allocates gigabytes of activations; on two cores that caused about 180,000 page faults per step, and a fifth of that
with memory kept. Kept memory fragments, so keeping costs memory.

jemalloc and tcmalloc are alternatives: preload one with ``LD_PRELOAD``, and these functions change nothing.
"""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt(3), from malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
_NEVER = 2**31 - 1
_MAX_MAPPED_BLOCKS = 2**20
_LARGE_BYTES = 2**18


def keep_freed_memory() -> bool:
    """Make glibc serve every block from the heap and never shrink it; do nothing with another libc.

    The setting applies to the process and cannot be undone; memory stays at its peak until the process ends.

    Returns:
        Whether the allocator accepted the settings.
    """
    return _set({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _NEVER})


def give_back_freed_memory() -> bool:
    """Make glibc map every large block and unmap it when it is freed; do nothing with another libc.

    By default glibc raises its threshold to the size of each mapped block that is freed, and keeps smaller ones.

    Returns:
        Whether the allocator accepted the settings.
    """
    return _set({_M_MMAP_MAX: _MAX_MAPPED_BLOCKS, _M_MMAP_THRESHOLD: _LARGE_BYTES, _M_TRIM_THRESHOLD: _LARGE_BYTES})


def _set(settings: dict[int, int]) -> bool:
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    return all(mallopt(name, value) for name, value in settings.items())
