from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from snake_lora_pl.training.memory import available
from snake_lora_pl.training.memory.available import available_bytes, used_bytes

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write the cgroup membership of the process and the files of its groups."""

    def write(membership: str, files: dict[str, str]) -> None:
        (tmp_path / "cgroup").write_text(membership)
        for name, content in files.items():
            path = tmp_path / "fs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        monkeypatch.setattr(available, "_CGROUP_MEMBERSHIP", tmp_path / "cgroup")
        monkeypatch.setattr(available, "_CGROUP_ROOT", tmp_path / "fs")

    return write


def cgroup_v2_files(directory: str, limit: str, usage: int, cache: int) -> dict[str, str]:
    return {
        f"{directory}memory.max": limit,
        f"{directory}memory.current": str(usage),
        f"{directory}memory.stat": f"anon 1\ninactive_file {cache}\n",
    }


def test_without_limits_the_memory_of_the_machine_counts(cgroup) -> None:
    cgroup("0::/job\n", cgroup_v2_files("job/", "max\n", 10 * MIB, 0))
    assert available_bytes(CPU) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_tightest_group_counts(cgroup) -> None:
    files = cgroup_v2_files("job/", f"{90 * MIB}\n", 40 * MIB, 10 * MIB)
    files |= cgroup_v2_files("job/step/", f"{80 * MIB}\n", 10 * MIB, 0)
    cgroup("0::/job/step\n", files)
    # The outer group uses 40 of 90 MiB, of which 10 MiB are cached files.
    assert available_bytes(CPU) == 60 * MIB


def test_group_of_a_container_is_mounted_as_the_root(cgroup) -> None:
    cgroup("0::/docker/0123abcd\n", cgroup_v2_files("", f"{50 * MIB}\n", 20 * MIB, 0))
    assert available_bytes(CPU) == 30 * MIB


def test_groups_of_version_1_count(cgroup) -> None:
    files = {
        "memory/job/memory.limit_in_bytes": f"{70 * MIB}\n",
        "memory/job/memory.usage_in_bytes": f"{30 * MIB}\n",
        "memory/job/memory.stat": f"total_inactive_file {5 * MIB}\n",
    }
    cgroup("5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n", files)
    assert available_bytes(CPU) == 45 * MIB


def test_used_memory_grows_with_an_allocation() -> None:
    before = used_bytes(CPU)
    # The heap may have free memory from other tests.
    with mmap.mmap(-1, 64 * MIB) as held:
        held.write(b"1" * len(held))
        assert used_bytes(CPU) - before > 32 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
@pytest.mark.e2e
def test_allocation_beyond_the_limit_fails_until_the_limit_is_lifted() -> None:
    # In a new process, because the limit applies to the whole process.
    script = (
        "import torch\n"
        "from snake_lora_pl.training.memory.available import available_bytes, limit_memory\n"
        "from snake_lora_pl.training.memory.out_of_memory import is_out_of_memory\n"
        "with limit_memory(300 * 2**20):\n"
        "    assert 250 * 2**20 < available_bytes(torch.device('cpu')) <= 300 * 2**20\n"
        "    torch.ones(100 * 2**18)\n"
        "    try:\n"
        "        torch.ones(500 * 2**18)\n"
        "    except RuntimeError as error:\n"
        "        assert is_out_of_memory(error), error\n"
        "    else:\n"
        "        raise AssertionError('500 MiB were allocated')\n"
        "torch.ones(500 * 2**18)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
