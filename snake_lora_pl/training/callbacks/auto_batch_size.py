"""Callback that finds the largest micro-batch that fits into memory, for ``data.batch_size: auto``."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from snake_lora_pl.errors import UserError
from snake_lora_pl.training.allocator import keep_freed_memory
from snake_lora_pl.training.memory.available import available_bytes, used_bytes
from snake_lora_pl.training.memory.out_of_memory import is_out_of_memory
from snake_lora_pl.training.resume.checkpoint_state import explain_damaged_checkpoint
from snake_lora_pl.training.sharding import FullyShardedStrategy

logger = logging.getLogger(__name__)

AUTO = "auto"

# Share of memory left free for validation, games and other programs.
_RESERVED_SHARE = 0.1
# Tokens of the smaller probe: enough that the memory per row is measurable.
_SMALL_PROBE_TOKENS = 1024
_PROBE_RATIO = 3
# Allocated after the probes: two optimizer moments and, with several ranks, the buckets of the gradient all-reduce.
_FUTURE_ADAPTER_COPIES = 3


class AutoBatchSize(Callback):
    """Replaces ``batch_size="auto"`` of the data module by the largest number of rows that fits into memory.

    Two training steps on the longest rows, one with three times as many rows as the other, measure the memory per row.
    The number of rows follows from the remaining memory. On a GPU it is tried and reduced until it fits. All ranks use
    the minimum over ranks. A resumed run uses the number of its checkpoint.

    The number is the micro-batch size; ``trainer.accumulate_grad_batches`` does not change.

    Args:
        ckpt_path: Checkpoint that ``trainer.fit`` resumes from. Lightning does not pass it to ``setup``.
    """

    def __init__(self, ckpt_path: str | Path | None = None) -> None:
        self.ckpt_path = ckpt_path

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set the batch size of the data module.

        Raises:
            UserError: If one row does not fit, or if the strategy shards the model.
        """
        data: Any = getattr(trainer, "datamodule", None)
        if stage != "fit" or getattr(data, "batch_size", None) != AUTO:
            return
        resumed = self._read_checkpoint(trainer)
        data.batch_size = self._find(trainer, pl_module) if resumed is None else resumed
        accumulated = trainer.accumulate_grad_batches
        logger.info(
            "data.batch_size=auto: %d rows%s; %d rows per optimizer step (accumulated %d times, on %d ranks)",
            data.batch_size,
            " from the checkpoint" if resumed is not None else "",
            data.batch_size * accumulated * trainer.world_size,
            accumulated,
            trainer.world_size,
        )

    def _read_checkpoint(self, trainer: pl.Trainer) -> int | None:
        """Return the batch size in the checkpoint; None if there is none."""
        if self.ckpt_path is None:
            return None
        checkpoint = trainer.strategy.checkpoint_io.load_checkpoint(self.ckpt_path)
        with explain_damaged_checkpoint(self.ckpt_path):
            state = checkpoint.get(type(trainer.datamodule).__qualname__, {})  # type: ignore[attr-defined]
            batch_size: int | None = state.get("batch_size")
            return batch_size

    def _find(self, trainer: pl.Trainer, module: Any) -> int:
        if isinstance(trainer.strategy, FullyShardedStrategy):
            raise UserError("data.batch_size=auto: not available for a sharded model. Set a number.")
        device = trainer.strategy.root_device
        module.configure_model()
        module.to(device)
        if device.type == "cpu":
            # Peaks stay visible in the resident set, as they will during training.
            keep_freed_memory()
        with _side_effects_undone(module, device):
            num_rows = _find_largest(trainer, module, device)
        num_rows = int(trainer.strategy.reduce(torch.tensor(num_rows, device=device), reduce_op="min"))
        if num_rows < 1:
            raise UserError(
                f"data.batch_size=auto: one of the longest rows does not fit into {available_bytes(device) / 2**30:.1f}"
                " GiB. Set model.gradient_checkpointing=true, reduce data.max_length, or choose a smaller "
                "model.base_model."
            )
        return num_rows


def _find_largest(trainer: pl.Trainer, module: Any, device: torch.device) -> int:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    max_rows = -(-data.num_train_rows // trainer.world_size)
    max_tokens = data.longest_batch(1)["input_ids"].shape[1]
    few = max(1, -(-_SMALL_PROBE_TOKENS // max_tokens))
    many = few * _PROBE_RATIO
    if many >= max_rows:
        few, many = 1, max(2, max_rows)
    adapter_bytes = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    # Ranks on one machine share its main memory; each GPU has its own.
    num_sharing = 1 if device.type == "cuda" else trainer.num_devices
    total = used_bytes(device) + available_bytes(device) / num_sharing
    budget = total * (1 - _RESERVED_SHARE) - _FUTURE_ADAPTER_COPIES * adapter_bytes
    try:
        low = _measure_peak_bytes(trainer, module, device, few)
        high = _measure_peak_bytes(trainer, module, device, many)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return _reduce_until_it_fits(trainer, module, device, many - 1)
    row_bytes = max(1.0, (high - low) / (many - few))
    num_rows = min(max_rows, int(few + (budget - low) / row_bytes))
    return _reduce_until_it_fits(trainer, module, device, num_rows) if device.type == "cuda" else max(0, num_rows)


def _reduce_until_it_fits(trainer: pl.Trainer, module: Any, device: torch.device, num_rows: int) -> int:
    """Return the largest number of rows tried, ``num_rows`` or less, for which a step succeeds; 0 if there is none."""
    while num_rows > 0:
        try:
            _measure_peak_bytes(trainer, module, device, num_rows)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        else:
            break
        num_rows = num_rows * 9 // 10
    return num_rows


def _measure_peak_bytes(trainer: pl.Trainer, module: Any, device: torch.device, num_rows: int) -> int:
    """Return the memory of this process after a step on the longest rows, including gradients."""
    if device.type == "cuda":
        # Free the cached memory of an earlier, larger probe.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    batch = trainer.strategy.batch_to_device(trainer.datamodule.longest_batch(num_rows))  # type: ignore[attr-defined]
    with trainer.precision_plugin.train_step_context():
        module.backward(module.training_step(batch, 0))
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else used_bytes(device)


@contextlib.contextmanager
def _side_effects_undone(module: Any, device: torch.device) -> Iterator[None]:
    """Restore the random number generators, and drop gradients and losses."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            module.zero_grad(set_to_none=True)
            module.step_loss.clear()
