from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_a_large_block_taken_again_faults_no_pages_in() -> None:
    script = """
        import resource, torch
        from snake_lora_pl.training.allocator import keep_freed_memory

        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.empty(2**24).fill_(1.0)  # 64 MiB, freed at once
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        faults()
        plain = faults()
        assert keep_freed_memory()
        faults()
        print(plain, faults())
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    plain, kept = map(int, result.stdout.split())
    assert kept < plain / 10
