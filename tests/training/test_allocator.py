from __future__ import annotations

import os
import platform
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import snake_lora_pl.__main__ as main_module
from snake_lora_pl.training.allocator import restart_joining_small_blocks


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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_memory_that_is_given_back_leaves_no_holes() -> None:
    script = """
        import psutil, torch
        from snake_lora_pl.training.allocator import give_back_freed_memory, keep_freed_memory

        def held(num_mib):
            # Every other block is freed; what comes then fits into none of the holes.
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


SCRIPT_ON_HOLES = """
    import ctypes, os, sys
    from snake_lora_pl.training.allocator import keep_freed_memory, restart_joining_small_blocks

    if sys.argv[1] == "restart":
        restart_joining_small_blocks(sys.argv[1:])

    import torch
    from torch import nn

    FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    Information = type("mallinfo2", (ctypes.Structure,), {"_fields_": [(f, ctypes.c_size_t) for f in FIELDS.split()]})
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Information
    keep_freed_memory()
    torch.set_num_threads(1)
    layer = lambda: nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 192), nn.SiLU(), nn.Dropout(0.1), nn.Linear(192, 64))
    layers = nn.Sequential(*[layer() for _ in range(24)])
    before = mallinfo2().arena
    for _ in range(3):
        layers(torch.randn(2048, 64)).sum().backward()
    print(os.environ.get("GLIBC_TUNABLES", ""), sys.flags.dev_mode, (mallinfo2().arena - before) / 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_a_restart_keeps_small_blocks_from_parting_the_holes_between_tensors(tmp_path: Path) -> None:
    """The plain run says whether the cure is still needed: glibc's thread cache leaves a step a larger heap."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT_ON_HOLES))
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}

    def run(*arguments: str, **variables: str) -> list[str]:
        command = [sys.executable, "-X", "dev", "-W", "ignore", str(script), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment | variables
        ).stdout.split()

    joined = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
    tunables, dev_mode, mib = run("restart", GLIBC_TUNABLES="glibc.malloc.arena_max=2")
    assert (tunables, dev_mode) == (f"glibc.malloc.arena_max=2:{joined}", "True")
    *tunables, dev_mode, plain_mib = run("leave")
    assert (tunables, dev_mode) == ([], "True")
    assert float(mib) < 0.85 * float(plain_mib)
    own = "glibc.malloc.tcache_count=7"
    assert run("restart", GLIBC_TUNABLES=own)[0] == own


@pytest.mark.parametrize("arguments", [["fit"], ["fit", "--config=x"]])
def test_a_process_of_another_program_is_not_restarted(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("restarted"))
    restart_joining_small_blocks(arguments)


def test_fit_restarts_its_own_process_and_no_caller_s(monkeypatch: pytest.MonkeyPatch) -> None:
    restarted = []
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "snake_lora_pl", "fit", "--nothing"])
    monkeypatch.setattr(sys, "argv", ["__main__.py", "fit", "--nothing"])
    monkeypatch.setattr(main_module, "restart_joining_small_blocks", restarted.append)
    assert main_module.main(["fit", "--nothing"]) == 2
    assert restarted == []
    assert main_module.main() == 2
    assert restarted == [["fit", "--nothing"]]
