"""Benchmarks reach into the package: their own step still is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.train_step import make_step, seconds_of
from snake_lora_pl.training.memory.estimate import blank_batch

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_step_that_is_timed_runs(tiny_llama_dir: Path) -> None:
    step = make_step(str(tiny_llama_dir), rank=4, dtype="float32")
    assert seconds_of(step, blank_batch(2, 32, 8), repeats=1) > 0
