from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_a_step_that_takes_its_memory_again_faults_no_pages_in() -> None:
    script = """
        import resource, torch
        from snake_lora_pl.training.allocator import keep_freed_memory

        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            # 40 MiB each: past 32 MiB glibc never keeps a block of its own accord.
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
