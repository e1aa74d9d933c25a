"""``data.batch_size: auto``: the largest micro-batch that fits, found before the run begins."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from snake_lora_pl.errors import UserError
from snake_lora_pl.training.allocator import keep_freed_memory
from snake_lora_pl.training.memory.available import available_bytes, used_bytes
from snake_lora_pl.training.memory.out_of_memory import is_out_of_memory
from snake_lora_pl.training.resume.checkpoint_state import explain_damage
from snake_lora_pl.training.sharding import FullyShardedStrategy

logger = logging.getLogger(__name__)

AUTO = "auto"

# Left free: for validation, for games, for what other programs come to need.
_RESERVED_SHARE = 0.1
# Enough for what a row takes to stand out from what a step takes whatever its rows.
_SMALL_PROBE_TOKENS = 1024
_PROBE_RATIO = 3
# The optimiser's two moments and, with several processes, the buckets that gradients are exchanged in.
_ADAPTER_COPIES_TO_COME = 3


class BatchSizeFinder(Callback):
    """Replaces ``batch_size="auto"`` of the data module by the largest number of rows that fits.

    Two real steps on the longest training rows, one on a few and one on three times as many, tell what a row takes;
    the rest of the memory is divided by that. On a GPU the result is tried, and lowered while it does not fit. All
    processes take the least of their numbers. A resumed run takes the number it began with.

    The number is that of a micro-batch: ``trainer.accumulate_grad_batches`` stays as it is.

    Args:
        ckpt_path: The checkpoint that ``trainer.fit`` is to go on from, which no callback is told in time.
    """

    def __init__(self, ckpt_path: str | Path | None = None) -> None:
        self.ckpt_path = ckpt_path

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the number, once the rows are there and before anything is built on it.

        Raises:
            UserError: If not even one row fits, or the strategy cuts the model into slices.
        """
        data: Any = getattr(trainer, "datamodule", None)
        if stage != "fit" or getattr(data, "batch_size", None) != AUTO:
            return
        resumed = self._of_checkpoint(trainer)
        data.batch_size = self._find(trainer, pl_module) if resumed is None else resumed
        accumulated = trainer.accumulate_grad_batches
        logger.info(
            "data.batch_size=auto: %d rows%s; an optimizer step takes %d (times %d accumulated, times %d processes)",
            data.batch_size,
            " as in the run that goes on" if resumed is not None else "",
            data.batch_size * accumulated * trainer.world_size,
            accumulated,
            trainer.world_size,
        )

    def _of_checkpoint(self, trainer: pl.Trainer) -> int | None:
        """The number that the run to go on with was begun with."""
        if self.ckpt_path is None:
            return None
        checkpoint = trainer.strategy.checkpoint_io.load_checkpoint(self.ckpt_path)
        with explain_damage(self.ckpt_path):
            state = checkpoint.get(type(trainer.datamodule).__qualname__, {})  # type: ignore[attr-defined]
            return state.get("batch_size")

    def _find(self, trainer: pl.Trainer, module: Any) -> int:
        if isinstance(trainer.strategy, FullyShardedStrategy):
            raise UserError("data.batch_size=auto does not go with a model that is cut into slices. Give a number.")
        device = trainer.strategy.root_device
        module.configure_model()
        module.to(device)
        if device.type == "cpu":
            # As the run will: what a step has taken then shows in the resident set.
            keep_freed_memory()
        with _as_if_nothing_had_run(module, device):
            fits = _largest_that_fits(trainer, module, device)
        fits = int(trainer.strategy.reduce(torch.tensor(fits, device=device), reduce_op="min"))
        if fits < 1:
            raise UserError(
                "data.batch_size=auto: not even one of the longest rows fits into "
                f"{available_bytes(device) / 2**30:.1f} GiB. Set model.gradient_checkpointing=true, lower "
                "data.max_length, or choose a smaller model.base_model."
            )
        return fits


def _largest_that_fits(trainer: pl.Trainer, module: Any, device: torch.device) -> int:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    most = -(-data.num_train_rows // trainer.world_size)
    longest = data.longest_batch(1)["input_ids"].shape[1]
    few = max(1, -(-_SMALL_PROBE_TOKENS // longest))
    many = few * _PROBE_RATIO
    if many >= most:
        few, many = 1, max(2, most)
    adapter_bytes = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    # Processes on one machine share its memory; each GPU has its own.
    sharers = 1 if device.type == "cuda" else trainer.num_devices
    total = used_bytes(device) + available_bytes(device) / sharers
    budget = total * (1 - _RESERVED_SHARE) - _ADAPTER_COPIES_TO_COME * adapter_bytes
    try:
        low = _peak_bytes(trainer, module, device, few)
        high = _peak_bytes(trainer, module, device, many)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return _largest_tried(trainer, module, device, many - 1)
    row_bytes = max(1.0, (high - low) / (many - few))
    fits = min(most, int(few + (budget - low) / row_bytes))
    return _largest_tried(trainer, module, device, fits) if device.type == "cuda" else max(0, fits)


def _largest_tried(trainer: pl.Trainer, module: Any, device: torch.device, num_rows: int) -> int:
    """The largest batch, of this size and smaller ones, that a step runs on; 0 for none."""
    while num_rows > 0:
        try:
            _peak_bytes(trainer, module, device, num_rows)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        else:
            break
        num_rows = num_rows * 9 // 10
    return num_rows


def _peak_bytes(trainer: pl.Trainer, module: Any, device: torch.device, num_rows: int) -> int:
    """What this process holds at the peak of a step on the longest rows, gradients included."""
    if device.type == "cuda":
        # What an earlier, larger attempt left is room for this one.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    batch = trainer.strategy.batch_to_device(trainer.datamodule.longest_batch(num_rows))  # type: ignore[attr-defined]
    with trainer.precision_plugin.train_step_context():
        module.backward(module.training_step(batch, 0))
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else used_bytes(device)


@contextlib.contextmanager
def _as_if_nothing_had_run(module: Any, device: torch.device) -> Iterator[None]:
    """Leave neither gradients nor losses behind, nor another state of the random numbers."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            module.zero_grad(set_to_none=True)
            module.step_loss.clear()
