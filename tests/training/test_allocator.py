from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the settings are glibc's")

MEMORY = """
    import ctypes, os, resource
    from snake_lora_pl.training.allocator import give_back_freed_memory, keep_freed_memory

    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

    def allocate(num_mib):
        block = libc.malloc(num_mib * 2**20)
        libc.memset(block, 1, num_mib * 2**20)
        return block
"""


def run(script: str) -> list[float]:
    """Return the numbers that a script prints in a new process: the settings apply to the whole process."""
    source = textwrap.dedent(MEMORY) + textwrap.dedent(script)
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    return [float(number) for number in result.stdout.split()]


def test_kept_memory_is_reused_without_page_faults() -> None:
    default, kept = run("""
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for block in [allocate(40) for _ in range(4)]:  # above 32 MiB glibc never keeps a block by default
                libc.free(block)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        default = min(faults() for _ in range(3))
        assert keep_freed_memory()
        print(default, min(faults() for _ in range(3)))
    """)
    assert kept < default / 10


def test_memory_that_is_given_back_does_not_fragment() -> None:
    given_back, kept = run("""
        def resident_mib():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

        def held():
            # Every other block is freed; the next allocation fits into none of the gaps.
            before = resident_mib()
            blocks = [allocate(4) for _ in range(40)]
            for block in blocks[::2]:
                libc.free(block)
            blocks = [*blocks[1::2], allocate(80)]
            mib = resident_mib() - before
            for block in blocks:
                libc.free(block)
            return mib

        assert give_back_freed_memory()
        given_back = held()
        assert keep_freed_memory()
        print(given_back, held())
    """)
    assert given_back == pytest.approx(160, abs=20)
    assert kept > given_back + 60
