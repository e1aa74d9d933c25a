"""AdapterCheckpoint: keeps the best adapter where others load it, and what a run needs to go on."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ModelCheckpoint

from snake_lora_pl.adapters import store
from snake_lora_pl.durable import remove_leftovers
from snake_lora_pl.errors import UserError
from snake_lora_pl.training.checkpoint_io import DurableCheckpointIO
from snake_lora_pl.training.sharding import gather_trained, is_sharded

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from snake_lora_pl.training.module import LoRALightningModule

logger = logging.getLogger(__name__)


class AdapterCheckpoint(ModelCheckpoint):
    """Writes the best adapter to ``adapter_dir`` and resumable state, without base weights, to ``dirpath``.

    The bookkeeping of best-k and last is Lightning's; this class decides when, and writes the adapter directory.
    ``last.ckpt`` is written every ``save_every_n_steps`` optimiser steps and after each validation, the best-k after
    each validation. Both are whole or absent, also after a kill.

    A metric that is logged at some validations only, such as ``play/apples_mean``, is compared among these. The
    callback that logs it says so by a method ``waits_for(metric)``.

    Args:
        dirpath: Directory of the ``.ckpt`` files; None takes ``checkpoints/`` in the trainer's log directory.
        adapter_dir: Directory of the adapter; None takes ``lora_adapters/model_artifacts/`` beside ``checkpoints/``.
        monitor: Metric that decides which adapter is best; None keeps the newest.
        mode: ``min`` or ``max``: which way the metric is better.
        save_top_k: How many of the best checkpoints to keep.
        save_every_n_steps: Optimiser steps between two writings of ``last.ckpt``; 0 writes it at validation only.

    Raises:
        UserError: If ``monitor`` is not among the metrics that a validation logged.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> Trainer(callbacks=[AdapterCheckpoint(monitor="val/move_accuracy", mode="max")])  # doctest: +SKIP
    """

    def __init__(
        self,
        dirpath: str | None = None,
        adapter_dir: str | None = None,
        monitor: str | None = "val/loss",
        mode: str = "min",
        save_top_k: int = 2,
        save_every_n_steps: int = 50,
    ) -> None:
        if mode not in ("min", "max"):
            raise UserError(f"checkpoint.mode must be min or max, not '{mode}'.")
        if save_every_n_steps < 0 or save_top_k < 1:
            raise UserError("checkpoint.save_every_n_steps must be at least 0 and checkpoint.save_top_k at least 1.")
        super().__init__(
            dirpath=dirpath,
            filename="{epoch}-{step}",
            monitor=monitor,
            mode=mode,
            # Without a metric there is no order: the newest is all that can be kept.
            save_top_k=save_top_k if monitor is not None else 1,
            save_last=True,
            enable_version_counter=False,
        )
        self.adapter_dir = Path(adapter_dir) if adapter_dir is not None else None
        self.save_every_n_steps = save_every_n_steps
        self._last_step = 0

    @property
    def state_key(self) -> str:
        """One name for all settings: a resumed run may change how often it saves."""
        return "AdapterCheckpoint"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Settle where the files go and remove what a killed writer left."""
        log_dir = trainer.log_dir  # asks the first process, so all processes must
        if self.dirpath is None and log_dir is not None:
            self.dirpath = os.path.join(log_dir, "checkpoints")
        super().setup(trainer, pl_module, stage)
        assert self.dirpath is not None
        if self.adapter_dir is None:
            self.adapter_dir = Path(self.dirpath).parent / "lora_adapters" / "model_artifacts"
        # Processes that a launcher started apart from each other may name another directory; the first one's counts.
        self.adapter_dir = trainer.strategy.broadcast(self.adapter_dir)
        trainer.strategy.checkpoint_io = DurableCheckpointIO()
        if stage == "fit" and trainer.is_global_zero:
            remove_leftovers(self.adapter_dir.parent, self.adapter_dir.name)
            remove_leftovers(self.dirpath, "*.ckpt")

    # ModelCheckpoint ties `last` to the monitored metric; the hooks below untie them.

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write ``last.ckpt`` every ``save_every_n_steps`` optimiser steps."""
        step = trainer.global_step
        if step == self._last_step:  # still accumulating
            return
        self._last_step = step
        if self.save_every_n_steps and step % self.save_every_n_steps == 0:
            self._save_last(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Without validation an epoch's end is the time to save."""
        if not self._validates(trainer):
            self._save_last(trainer)
            self._export(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the state if it is among the best, write the adapter if it is the best, and write ``last.ckpt``."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or _is_rehearsal(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        if self.monitor is not None and self.monitor not in candidates:
            if _comes_later(trainer, self.monitor):
                self._save_last(trainer)
                return
            there = ", ".join(sorted(set(trainer.callback_metrics)))
            raise UserError(f"checkpoint.monitor: no metric '{self.monitor}' was logged. There are: {there}.")
        self._save_topk_checkpoint(trainer, candidates)
        newest_is_best = self._last_checkpoint_saved == self.best_model_path
        if newest_is_best and self._last_global_step_saved == trainer.global_step:
            self._export(trainer, pl_module)
        self._save_last(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave a checkpoint and an adapter behind, however the run was cut."""
        if _is_rehearsal(trainer):
            return
        if self._last_global_step_saved != trainer.global_step:
            self._save_last(trainer)
        assert self.adapter_dir is not None
        # One process looks: another might see what the first has meanwhile written, and then not wait for it.
        if not trainer.strategy.broadcast((self.adapter_dir / store.METADATA_FILE).is_file()):
            self._export(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save nothing: in the middle of a step the state is of two steps; the last whole one is on disk."""

    def _validates(self, trainer: pl.Trainer) -> bool:
        return trainer.enable_validation and sum(trainer.num_val_batches) > 0

    def _save_last(self, trainer: pl.Trainer) -> None:
        if not _is_rehearsal(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _export(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the adapter directory from the weights in memory."""
        from snake_lora_pl.training.module import LoRALightningModule

        if _is_rehearsal(trainer) or not isinstance(pl_module, LoRALightningModule):
            return
        assert self.adapter_dir is not None
        weights = gather_trained(pl_module.peft_model) if is_sharded(pl_module.peft_model) else None
        if trainer.is_global_zero:
            metadata = _describe(trainer, pl_module)
            try:
                store.save(pl_module.peft_model, self.adapter_dir, metadata, pl_module.tokenizer, weights)
            except OSError as error:
                raise UserError(
                    f"{self.adapter_dir}: the adapter could not be written ({error}). Free space or make the "
                    "directory writable; the last good adapter is untouched."
                ) from error
            logger.info("Adapter of step %d written to %s", trainer.global_step, self.adapter_dir)
        trainer.strategy.barrier("AdapterCheckpoint")


def _is_rehearsal(trainer: pl.Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _comes_later(trainer: pl.Trainer, metric: str) -> bool:
    """Whether a callback logs a metric, but not at every validation."""
    waits = [getattr(callback, "waits_for", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    return any(waits_for is not None and waits_for(metric) for waits_for in waits)


def _describe(trainer: pl.Trainer, pl_module: LoRALightningModule) -> store.AdapterMetadata:
    # A data module may say what its rows are; any other data works, it is just not described.
    summarise_data = getattr(getattr(trainer, "datamodule", None), "summary", None)
    data: dict[str, Any] = summarise_data() if summarise_data is not None else {}
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return dataclasses.replace(
        pl_module.adapter_metadata(),
        grid_size=data.pop("grid_size", None),
        data=data,
        step=trainer.global_step,
        epoch=trainer.current_epoch,
        # JSON has no NaN.
        metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
    )
