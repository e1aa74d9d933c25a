"""What memory this machine has left, its container's limit included."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def available_bytes(device: torch.device) -> int:
    """Bytes that this process can still take: of a GPU's memory, else of the machine's, its container's or its limit's.

    Memory that torch's allocator holds on a GPU without using it counts as available.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min([psutil.virtual_memory().available, *_left_in_cgroups(), *_left_of_limits()])


def used_bytes(device: torch.device) -> int:
    """Bytes that this process holds: of tensors on a GPU, else its resident set."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


@contextlib.contextmanager
def refused_beyond(limit_bytes: int) -> Iterator[None]:
    """Let the system refuse memory beyond a limit, so that too much of it ends in an error and not in a kill.

    Linux grants memory that it does not have, and kills the process that comes to use it. Elsewhere nothing is done.

    Args:
        limit_bytes: What this process may take beyond what it holds.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    ceilings = [_status_bytes("VmData") + limit_bytes, *(limit for limit in before if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(ceilings), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _left_of_limits() -> Iterator[int]:
    """Bytes left below what ``ulimit -d`` and ``ulimit -v``, or a batch system by their means, grant this process."""
    if sys.platform != "linux":
        return
    import resource

    # The former counts private memory that can be written to, the latter all addresses, both touched or not.
    for limit, used in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        granted, _ = resource.getrlimit(limit)
        if granted != resource.RLIM_INFINITY:
            yield max(0, granted - _status_bytes(used))


def _status_bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    (kib,) = (line.split()[1] for line in status.splitlines() if line.startswith(f"{name}:"))
    return int(kib) * 1024


def _left_in_cgroups() -> Iterator[int]:
    """Bytes left below each limit that a container, a batch system or systemd puts on this process."""
    try:
        memberships = _MEMBERSHIP.read_text(encoding="utf-8").splitlines()
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
        # Inside a container its own group is mounted as the root, and the name is the one outside.
        for directory in [group, *group.parents] if group.is_dir() else [root]:
            left = _left_in(directory, *names)
            if left is not None:
                yield left
            if directory == root:
                break


def _left_in(directory: Path, limit_name: str, usage_name: str, cache_key: str) -> int | None:
    try:
        limit = int((directory / limit_name).read_text())  # "max" is no number
        usage = int((directory / usage_name).read_text())
        stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    # Files that were read count as used until the memory is wanted.
    return limit - usage + int(stat.get(cache_key, 0))
