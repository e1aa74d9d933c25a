"""Memory that this process can still use, within the limits of the machine, its container and its user."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_CGROUP_MEMBERSHIP = Path("/proc/self/cgroup")


def available_bytes(device: torch.device) -> int:
    """Return the bytes that this process can still allocate on a GPU, or in main memory within all its limits.

    GPU memory that torch's allocator caches counts as available.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min([int(psutil.virtual_memory().available), *_remaining_of_cgroups(), *_remaining_of_rlimits()])


def used_bytes(device: torch.device) -> int:
    """Return the bytes of all tensors on a GPU, or else the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


@contextlib.contextmanager
def limit_memory(max_bytes: int) -> Iterator[None]:
    """Let allocations fail beyond a limit, on Linux.

    Linux grants more memory than there is, and kills the process that uses it. With a limit, the allocation fails.

    Args:
        max_bytes: Bytes that this process may allocate in addition to its current memory.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [_status_bytes("VmData") + max_bytes, *(limit for limit in before if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _remaining_of_rlimits() -> Iterator[int]:
    """Yield the bytes below the limits of ``ulimit -d`` and ``ulimit -v``, which batch systems set too."""
    if sys.platform != "linux":
        return
    import resource

    # RLIMIT_DATA limits private writable memory, RLIMIT_AS all addresses, whether used or not.
    for limit, used in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        soft_limit, _ = resource.getrlimit(limit)
        if soft_limit != resource.RLIM_INFINITY:
            yield max(0, soft_limit - _status_bytes(used))


def _status_bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    (kib,) = (line.split()[1] for line in status.splitlines() if line.startswith(f"{name}:"))
    return int(kib) * 1024


def _remaining_of_cgroups() -> Iterator[int]:
    """Yield the bytes below each limit that a container, a batch system or systemd sets for this process.

    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html#memory and, for version 1,
    https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
    """
    try:
        memberships = _CGROUP_MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for membership in memberships:
        _, controllers, name = membership.split(":", 2)
        if controllers == "":
            root, names = _CGROUP_ROOT, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = _CGROUP_ROOT / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = root / name.lstrip("/")
        # A container mounts its group as the root, but sees the group's name outside.
        for directory in [group, *group.parents] if group.is_dir() else [root]:
            remaining = _remaining_of_cgroup(directory, *names)
            if remaining is not None:
                yield remaining
            if directory == root:
                break


def _remaining_of_cgroup(directory: Path, limit_name: str, usage_name: str, cache_key: str) -> int | None:
    try:
        limit = int((directory / limit_name).read_text())  # "max" raises a ValueError
        usage = int((directory / usage_name).read_text())
        stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    # The usage includes cached files, which the kernel drops when memory is needed.
    return limit - usage + int(stat.get(cache_key, 0))
