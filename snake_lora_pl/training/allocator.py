"""What becomes of freed memory on a CPU: kept in the process between steps, or given back.

glibc gives large blocks back to the system as soon as they are freed. A training step on a CPU frees and takes back
gigabytes of activations: on two cores that was about 180,000 page faults a step, and a fifth of it where it is kept.
Kept memory has holes, which is no way to save any.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Sequence

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
_NEVER = 2**31 - 1
_MANY = 2**20
_LARGE_BYTES = 2**18

_TUNABLES = "GLIBC_TUNABLES"
_JOIN_SMALL_BLOCKS = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"


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


def restart_joining_small_blocks(arguments: Sequence[str]) -> None:
    """Begin the process anew, where it runs on glibc, with small freed blocks joined to their neighbors too.

    glibc cuts small pieces off as it aligns a tensor, and keeps them for its next small blocks instead. They lie
    between tensors, and part the holes that these leave: a step of the fused layers took a tenth more memory for it,
    one of the model's own layers a fifth. glibc is told otherwise by the environment alone, and reads it once. To be
    called before anything is imported or done. A user's own setting of glibc's stands.

    Args:
        arguments: The program's, as it read them. A process that was started with others is left alone: it is not this
            program's.
    """
    own = os.environ.get(_TUNABLES, "")
    started_with_these = sys.orig_argv[len(sys.orig_argv) - len(arguments) :] == list(arguments)
    has_glibc = "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {})
    if not has_glibc or "glibc.malloc.tcache_count" in own or not started_with_these or not sys.executable:
        return
    environment = {**os.environ, _TUNABLES: f"{own}:{_JOIN_SMALL_BLOCKS}".lstrip(":")}
    sys.stdout.flush()
    # Where a process may not begin another program, it goes on and takes that memory.
    with contextlib.suppress(OSError):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _set(settings: dict[int, int]) -> bool:
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has no such knob
        return False
    return all(mallopt(name, value) for name, value in settings.items())
