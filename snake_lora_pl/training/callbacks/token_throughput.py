"""Callback that logs training throughput in tokens, and peak memory."""

from __future__ import annotations

import math
import resource
import sys
import time
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

_WINDOW_STEPS = 20


class _Step(NamedTuple):
    num_tokens: int
    num_targets: int
    duration_s: float
    wait_s: float


class TokenThroughput(Callback):
    """Logs tokens per second, peak memory, and the time spent waiting for data.

    ``perf/tokens_per_second`` and ``perf/target_tokens_per_second`` count the tokens of all ranks over the last 20
    optimizer steps, without padding. The time includes waiting for data and excludes validation.
    ``perf/peak_memory_gib`` is the peak of allocated memory on a GPU, else the peak resident set of the process.
    ``perf/data_wait_share`` is the fraction of the same steps' time that this rank waited for batches. It is logged if
    the training dataloader has an attribute ``wait_seconds``.
    """

    def __init__(self) -> None:
        self._num_tokens = 0
        self._num_targets = 0
        self._duration_s = 0.0
        self._last_time = 0.0
        self._last_wait_s = 0.0
        self._window: list[_Step] = []
        self._last_step = 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_time = time.perf_counter()
        self._last_step = trainer.global_step
        self._last_wait_s = _wait_seconds(trainer)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Exclude the validation from the measured time."""
        self._last_time = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Count a micro-batch, and log at the end of an optimizer step."""
        now = time.perf_counter()
        self._duration_s += now - self._last_time
        self._last_time = now
        # Counted on the CPU; the labels may be on a GPU by now.
        self._num_tokens += batch["targets"].num_tokens
        self._num_targets += sum(batch["targets"].row_sizes)
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        wait_s = _wait_seconds(trainer)
        step = _Step(self._num_tokens, self._num_targets, self._duration_s, wait_s - self._last_wait_s)
        self._window = [*self._window[-_WINDOW_STEPS + 1 :], step]
        self._num_tokens, self._num_targets, self._duration_s, self._last_wait_s = 0, 0, 0.0, wait_s
        total = _Step(*map(sum, zip(*self._window, strict=True)))
        metrics = {
            "perf/tokens_per_second": total.num_tokens * trainer.world_size / total.duration_s,
            "perf/target_tokens_per_second": total.num_targets * trainer.world_size / total.duration_s,
            "perf/peak_memory_gib": peak_memory_gib(pl_module.device),
        }
        if not math.isnan(wait_s):
            metrics["perf/data_wait_share"] = total.wait_s / total.duration_s
        # As CPU tensors: numbers would be copied to a GPU, and each back again to be logged.
        pl_module.log_dict({name: torch.tensor(value) for name, value in metrics.items()}, batch_size=1)


def _wait_seconds(trainer: pl.Trainer) -> float:
    """Return the total time spent waiting for batches; NaN if the dataloader does not measure it."""
    seconds: float = getattr(trainer.train_dataloader, "wait_seconds", math.nan)
    return seconds


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory so far in GiB: allocated memory on a GPU, else the resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB on Linux
