from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from snake_lora_pl.training.callbacks.throughput import ThroughputMonitor, count_tokens
from tests.training.conftest import collate, make_loader, make_rows, make_trainer


class SlowLoader(DataLoader):
    """Counts what its reader waits, as the data room's loader does."""

    wait_seconds = 0.0

    def __iter__(self):
        for batch in super().__iter__():
            time.sleep(0.2)
            self.wait_seconds += 0.2
            yield batch


class SlowSteps(pl.Callback):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, *args: Any) -> None:
        time.sleep(self.seconds)


def figures_of(make_module, tmp_path: Path, loader: DataLoader, *callbacks: pl.Callback) -> dict[str, float]:
    trainer = make_trainer(tmp_path, max_epochs=2, callbacks=[ThroughputMonitor(), *callbacks])
    trainer.fit(make_module(), loader)
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("perf/")}


@pytest.mark.parametrize(("step_s", "share"), [(0.0, 0.9), (0.3, 0.35)])
def test_waiting_for_data_is_told_from_working(make_module, tmp_path: Path, step_s: float, share: float) -> None:
    loader = SlowLoader(make_rows(8), batch_size=4, collate_fn=collate)
    figures = figures_of(make_module, tmp_path, loader, SlowSteps(step_s))
    assert figures["perf/data_wait_share"] == pytest.approx(share, abs=0.12)


def test_a_loader_that_counts_nothing_has_no_share(make_module, tmp_path: Path) -> None:
    figures = figures_of(make_module, tmp_path, make_loader(make_rows(8), 4))
    assert figures.keys() == {
        "perf/tokens_per_second",
        "perf/target_tokens_per_second",
        "perf/peak_memory_gib",
    }


def test_padding_counts_for_nothing() -> None:
    labels = torch.tensor([[-100, 5, 6, -100], [-100, -100, -100, 7], [-100, -100, -100, -100]])
    assert count_tokens(labels) == (3 + 4, 3)
