"""Tokens per second and peak memory, as the user's clock sees them: waiting for data counts, validation does not."""

from __future__ import annotations

import math
import resource
import sys
import time
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from snake_lora_pl.constants import IGNORE_INDEX

_WINDOW_STEPS = 20


class _Step(NamedTuple):
    tokens: int
    targets: int
    seconds: float
    waited: float


class ThroughputMonitor(Callback):
    """Logs how fast training goes, what memory it took and whether it waited for data.

    ``perf/tokens_per_second`` and ``perf/target_tokens_per_second`` are of all processes together, over the last 20
    optimizer steps; padding counts for nothing. ``perf/peak_memory_gib`` is the device's peak of allocated tensors on a
    GPU, else the process's peak resident set. ``perf/data_wait_share`` is the share of the same steps' time that this
    process waited for its next batch; it is there where the loader counts its ``wait_seconds``.
    """

    def __init__(self) -> None:
        self._tokens = 0
        self._targets = 0
        self._seconds = 0.0
        self._clock = 0.0
        self._waited = 0.0
        self._window: list[_Step] = []
        self._last_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._clock = time.perf_counter()
        self._last_step = trainer.global_step
        self._waited = _waited(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the validation's time out."""
        self._clock = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Count a micro-batch; log at the end of an optimizer step."""
        now = time.perf_counter()
        self._seconds += now - self._clock
        self._clock = now
        tokens, targets = count_tokens(batch["labels"])
        self._tokens += tokens
        self._targets += targets
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        waited = _waited(trainer)
        step = _Step(self._tokens, self._targets, self._seconds, waited - self._waited)
        self._window = [*self._window[-_WINDOW_STEPS + 1 :], step]
        self._tokens, self._targets, self._seconds, self._waited = 0, 0, 0.0, waited
        total = _Step(*map(sum, zip(*self._window, strict=True)))
        figures = {
            "perf/tokens_per_second": total.tokens * trainer.world_size / total.seconds,
            "perf/target_tokens_per_second": total.targets * trainer.world_size / total.seconds,
            "perf/peak_memory_gib": peak_memory_gib(pl_module.device),
        }
        if not math.isnan(waited):
            figures["perf/data_wait_share"] = total.waited / total.seconds
        pl_module.log_dict(figures, batch_size=1)


def _waited(trainer: pl.Trainer) -> float:
    """Seconds spent waiting for batches so far; NaN where the loader does not count them."""
    return getattr(trainer.train_dataloader, "wait_seconds", math.nan)


def count_tokens(labels: Tensor) -> tuple[int, int]:
    """Real tokens and target tokens of a right-padded batch.

    Args:
        labels: int64 of shape (batch, length); the last label of a row is its last token, padding comes after it.

    Returns:
        Number of tokens without padding, and of tokens that carry loss.
    """
    is_target = labels != IGNORE_INDEX
    ends = torch.arange(1, labels.shape[1] + 1, device=labels.device) * is_target
    return int(ends.amax(dim=1).sum()), int(is_target.sum())


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: allocated on a GPU, resident set of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB on Linux
