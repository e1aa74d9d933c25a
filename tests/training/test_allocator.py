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
            activations = [torch.empty(2**20).fill_(1.0) for _ in range(20)]  # 4 MiB each
            del activations
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        plain = min(faults() for _ in range(4))
        assert keep_freed_memory()
        print(plain, min(faults() for _ in range(4)))
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    plain, kept = map(int, result.stdout.split())
    assert kept < plain / 10
