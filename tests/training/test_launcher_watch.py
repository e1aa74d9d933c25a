from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from snake_lora_pl.training.launcher_watch import LauncherWatch

RANK = """
import os, subprocess, sys, time
from snake_lora_pl.training.launcher_watch import LauncherWatch
if "LOCAL_RANK" in os.environ:
    print(os.getpid(), LauncherWatch(0.05).start(), flush=True)
else:
    subprocess.Popen([sys.executable, *sys.argv], env=os.environ | {"LOCAL_RANK": "1"})
time.sleep(600)
"""


def test_rank_ends_when_the_rank_that_launched_it_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    first = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert first.stdout is not None
    assert first.stdout.readline().split()[1] == b"True"
    first.kill()
    # The pipe is closed when the second rank, which inherited it, has ended too.
    assert first.stdout.read() == b""
    first.wait()


def test_process_that_no_rank_launched_is_not_watched() -> None:
    assert not LauncherWatch().start()
