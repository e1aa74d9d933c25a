from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_kept_memory_is_reused_without_page_faults() -> None:
    script = """
        import resource, torch
        from snake_lora_pl.training.allocator import keep_freed_memory

        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            # 40 MiB each: above 32 MiB glibc never keeps a block by default.
            activations = [torch.empty(10 * 2**20).fill_(1.0) for _ in range(6)]
            del activations
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        plain = min(faults() for _ in range(4))
        assert keep_freed_memory()
        print(plain, min(faults() for _ in range(4)))
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    plain, kept = map(int, result.stdout.split())
    assert kept < plain / 10


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_memory_that_is_given_back_does_not_fragment() -> None:
    script = """
        import psutil, torch
        from snake_lora_pl.training.allocator import give_back_freed_memory, keep_freed_memory

        def held(num_mib):
            # Every other block is freed; the next allocation fits into none of the gaps.
            blocks = [torch.ones(num_mib * 2**18) for _ in range(40)]
            del blocks[::2]
            larger = torch.ones(num_mib * 20 * 2**18)
            return psutil.Process().memory_info().rss / 2**20

        before = psutil.Process().memory_info().rss / 2**20
        assert give_back_freed_memory()
        given_back = held(4) - before
        assert keep_freed_memory()
        print(given_back, held(4) - before)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    given_back, kept = map(float, result.stdout.split())
    assert given_back == pytest.approx(160, abs=40)
    assert kept > given_back + 60
