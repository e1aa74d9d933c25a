from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
from torch.utils.data import DataLoader

from snake_lora_pl.training.callbacks import token_throughput
from snake_lora_pl.training.callbacks.token_throughput import TokenThroughput
from tests.training.conftest import collate, make_loader, make_rows, make_trainer

WAIT_S = 0.25


class FakeClock:
    """A clock that only tests advance."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr(token_throughput, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


class SlowLoader(DataLoader):
    """A dataloader that takes ``WAIT_S`` per batch and measures it, as the one of the data module does."""

    def __init__(self, clock: FakeClock, **settings: Any) -> None:
        super().__init__(collate_fn=collate, **settings)
        self._clock = clock
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            self._clock.now += WAIT_S
            self.wait_seconds += WAIT_S
            yield batch


class SlowSteps(pl.Callback):
    def __init__(self, clock: FakeClock, step_s: float) -> None:
        self._clock = clock
        self._step_s = step_s

    def on_train_batch_start(self, *args: Any) -> None:
        self._clock.now += self._step_s


def metrics_of(make_module, tmp_path: Path, loader: DataLoader, *callbacks: pl.Callback) -> dict[str, float]:
    trainer = make_trainer(tmp_path, max_epochs=2, callbacks=[TokenThroughput(), *callbacks])
    trainer.fit(make_module(), loader)
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("perf/")}


# Lightning fetches the first batch of an epoch, and one in advance, before the clock starts.
@pytest.mark.parametrize("step_s", [WAIT_S, 3 * WAIT_S])
def test_data_wait_share_is_the_fraction_of_time_spent_waiting(
    make_module, tmp_path: Path, clock: FakeClock, step_s: float
) -> None:
    loader = SlowLoader(clock, dataset=make_rows(8), batch_size=4)
    metrics = metrics_of(make_module, tmp_path, loader, SlowSteps(clock, step_s))
    assert metrics["perf/data_wait_share"] == pytest.approx(WAIT_S / (WAIT_S + step_s))


def test_tokens_per_second_counts_tokens_without_padding(make_module, tmp_path: Path, clock: FakeClock) -> None:
    rows = make_rows(8)
    metrics = metrics_of(make_module, tmp_path, make_loader(rows, 4), SlowSteps(clock, 0.5))
    num_tokens = sum(len(ids) for ids, _ in rows)
    num_targets = sum(len(ids) - num_prompt_tokens for ids, num_prompt_tokens in rows)
    assert metrics["perf/tokens_per_second"] == pytest.approx(num_tokens / (2 * 0.5))
    assert metrics["perf/target_tokens_per_second"] == pytest.approx(num_targets / (2 * 0.5))


def test_loader_without_wait_seconds_logs_no_wait_share(make_module, tmp_path: Path) -> None:
    metrics = metrics_of(make_module, tmp_path, make_loader(make_rows(8), 4))
    assert metrics.keys() == {
        "perf/tokens_per_second",
        "perf/target_tokens_per_second",
        "perf/peak_memory_gib",
    }
