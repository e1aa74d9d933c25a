"""Callback that writes resumable checkpoints and keeps the best adapter in a directory that other tools load."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import SafetensorError
from typing_extensions import override

from snake_lora_pl.adapters import store
from snake_lora_pl.adapters.metadata import AdapterMetadata
from snake_lora_pl.durable import explain_failed_writes, remove_leftovers
from snake_lora_pl.errors import UserError
from snake_lora_pl.paths import display_path
from snake_lora_pl.training.callbacks.supported import check_supported
from snake_lora_pl.training.lightning_internals import (
    ModelCheckpointInternals,
    is_accumulating,
    set_logged_steps,
    validates_by_time,
)
from snake_lora_pl.training.metrics_csv import MetricsCSVLogger
from snake_lora_pl.training.resume.checkpoint_io import DurableCheckpointIO
from snake_lora_pl.training.resume.checkpoint_state import (
    adjust_loop_counters,
    collect_run_state,
    explain_damaged_checkpoint,
    guard_checkpoint_restore,
    is_between_steps,
    restore_run_state,
)
from snake_lora_pl.training.sharding import gather_trained, is_sharded

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from snake_lora_pl.training.module import LoRALightningModule

logger = logging.getLogger(__name__)

_STATE_KEY = "snake_lora_pl.run_state"


class AdapterCheckpoint(ModelCheckpointInternals):
    """Writes resumable checkpoints without base weights to ``dirpath``, and the best adapter to ``adapter_dir``.

    Lightning's ``ModelCheckpoint`` manages the best-k and last files; this class decides when to write, and writes the
    adapter directory. ``last.ckpt`` is written every ``save_every_s`` seconds or ``save_every_n_steps`` optimizer
    steps, and before and after each validation; the best-k files after each validation. Every file is written
    atomically and between two optimizer steps, so that a run resumed from any of them processes the same batches, with
    the same random numbers, weights and metrics, as an uninterrupted run.

    A metric that only some validations log, such as ``play/apples_mean``, is compared among those. The callback that
    logs it must have a method ``waits_for(metric) -> bool``.

    Args:
        dirpath: Directory of the ``.ckpt`` files; None uses ``checkpoints/`` in the trainer's log directory.
        adapter_dir: Directory of the adapter; None uses ``lora_adapters/model_artifacts/`` next to ``checkpoints/``.
        monitor: Metric that selects the best adapter; None keeps the newest.
        mode: ``min`` or ``max``: the direction in which the metric improves.
        save_top_k: Number of best checkpoints to keep.
        save_every_n_steps: Optimizer steps between two writes of ``last.ckpt``; 0 does not count steps.
        save_every_s: Seconds after which a step writes ``last.ckpt``; 0 does not count seconds. With both 0 it is
            written at validations only.

    Raises:
        UserError: If no validation logged ``monitor``.

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
        save_every_n_steps: int = 0,
        save_every_s: float = 60.0,
    ) -> None:
        if mode not in ("min", "max"):
            raise UserError(f"checkpoint.mode={mode}: must be min or max.")
        if save_every_n_steps < 0:
            raise UserError(f"checkpoint.save_every_n_steps={save_every_n_steps}: must be at least 0.")
        if not 0 <= save_every_s < math.inf:
            raise UserError(f"checkpoint.save_every_s={save_every_s}: must be a number of seconds, at least 0.")
        if save_top_k < 1:
            raise UserError(f"checkpoint.save_top_k={save_top_k}: must be at least 1.")
        super().__init__(
            dirpath=dirpath,
            filename="{epoch}-{step}",
            monitor=monitor,
            mode=mode,
            # Without a metric, checkpoints have no order except by age.
            save_top_k=save_top_k if monitor is not None else 1,
            save_last=True,
            enable_version_counter=False,
        )
        self.adapter_dir = Path(adapter_dir) if adapter_dir is not None else None
        self.save_every_n_steps = save_every_n_steps
        self.save_every_s = save_every_s
        self._last_write_s: float | None = None
        self._is_dry_run = False
        self._has_exported = False
        self._is_between_steps = False
        self._validation_is_due = False
        self._restored_state: dict[str, Any] | None = None

    @property
    @override
    def state_key(self) -> str:
        # Independent of the settings, so that a resumed run may change them.
        return "AdapterCheckpoint"

    @property
    def _output_dir(self) -> Path:
        if self.adapter_dir is None:
            raise RuntimeError("AdapterCheckpoint.adapter_dir is unknown before setup().")
        return self.adapter_dir

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._is_dry_run = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        log_dir = trainer.log_dir  # a collective: every rank must read it
        if self.dirpath is None and log_dir is not None:
            self.dirpath = os.path.realpath(os.path.join(log_dir, "checkpoints"))
        super().setup(trainer, pl_module, stage)
        checkpoints_dir = Path(str(self.dirpath))
        if stage == "fit":
            check_supported(trainer.callbacks)  # type: ignore[attr-defined]
            _separate_checkpoints(trainer, checkpoints_dir)
        adapter_dir = self.adapter_dir or checkpoints_dir.parent / "lora_adapters" / "model_artifacts"
        # Ranks started separately by a launcher may have different directories: rank 0 decides.
        self.adapter_dir = adapter_dir = trainer.strategy.broadcast(adapter_dir)
        trainer.strategy.checkpoint_io = DurableCheckpointIO()
        guard_checkpoint_restore(trainer)
        if stage == "fit":
            _check_is_replaceable(adapter_dir)
            if trainer.is_global_zero:
                remove_leftovers(adapter_dir.parent, adapter_dir.name)
                remove_leftovers(checkpoints_dir, "*.ckpt")

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._restored_state is not None:
            with explain_damaged_checkpoint(trainer.ckpt_path):
                restore_run_state(trainer, self._restored_state)
            self._restored_state = None
        _validate_between_steps(trainer)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write ``last.ckpt`` if enough steps or seconds have passed since it was written.

        Only at this hook is the previous step completely logged and validated. A resumed run loads ``batch`` again.
        """
        step = trainer.global_step
        # A validation may have stored the count of the step before in the checkpoint that this run resumed from.
        set_logged_steps(trainer, step)
        is_due = self.save_every_n_steps and step and step % self.save_every_n_steps == 0
        if (is_due or self._time_is_due(trainer)) and not self.has_saved(trainer) and is_between_steps(trainer):
            self.write_last(trainer)

    def _time_is_due(self, trainer: pl.Trainer) -> bool:
        """Return whether ``save_every_s`` seconds have passed, on the clock of rank 0."""
        clock_s = _shared_clock_s(trainer)
        if clock_s is None or not self.save_every_s:
            return False
        if self._last_write_s is None:  # the first step of this process
            self._last_write_s = clock_s
        return clock_s - self._last_write_s >= self.save_every_s

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prevent ``trainer.max_time`` from ending the run during accumulation. The timer stops it after the step."""
        if trainer.should_stop and is_accumulating(trainer):
            trainer.should_stop = False

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write ``last.ckpt`` before a validation, which can take minutes.

        If the run is about to stop, the checkpoint is skipped: it cannot store that the validation is the last one.
        """
        is_skipped = trainer.sanity_checking or trainer.state.fn != "fit" or trainer.should_stop
        if is_skipped or validates_by_time(trainer):
            return
        self._validation_is_due = True
        try:
            self.write_last(trainer)
        finally:
            self._validation_is_due = False

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write checkpoint and adapter at the end of an epoch in runs without validation."""
        if not (trainer.enable_validation and sum(trainer.num_val_batches) > 0):
            self.write_last(trainer)
            self._export(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the checkpoint if it is among the best, the adapter if it is the best, and ``last.ckpt``."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or self._is_dry_run:
            return
        candidates = self.metric_candidates(trainer)
        if self.monitor is not None and self.monitor not in candidates:
            if _is_logged_later(trainer, self.monitor):
                self.write_last(trainer)
                return
            available = ", ".join(sorted(set(trainer.callback_metrics)))
            raise UserError(
                f"checkpoint.monitor={self.monitor}: no such metric was logged. Choose one of: {available}."
            )
        self.save_if_best(trainer, candidates)
        if self.last_saved_path == self.best_model_path and self.last_saved_step == trainer.global_step:
            self._export(trainer, pl_module)
        self.write_last(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write a checkpoint and an adapter if there are none of the last step, whatever ended the run."""
        if self._is_dry_run:
            return
        if not self.has_saved(trainer):
            self.write_last(trainer)
        # Rank 0 decides: on another rank, the file that rank 0 is about to write may already exist.
        if not trainer.strategy.broadcast((self._output_dir / store.METADATA_FILE).is_file()):
            self._export(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log if there was nothing to train. ``on_train_start`` then did not run."""
        if self._restored_state is not None:
            self._restored_state = None
            logger.info(
                "Nothing to train: the checkpoint of step %d is at or after the end of this run. To train further, "
                "raise trainer.max_steps, trainer.max_epochs or trainer.max_time.",
                trainer.global_step,
            )

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write nothing: within a step the state is inconsistent, and the last consistent one is on disk."""

    @override
    def write_checkpoint(self, trainer: pl.Trainer, path: str) -> None:
        for run_logger in trainer.loggers:
            if isinstance(run_logger, MetricsCSVLogger):
                run_logger.flush()
        with self.between_steps():
            super().write_checkpoint(trainer, path)

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Mark checkpoints written in this context as written between two optimizer steps."""
        before, self._is_between_steps = self._is_between_steps, True
        try:
            yield
        finally:
            self._is_between_steps = before

    def has_saved(self, trainer: pl.Trainer) -> bool:
        """Return whether there is a checkpoint of the last step."""
        return self.last_saved_step == trainer.global_step

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the state that Lightning does not save."""
        checkpoint[_STATE_KEY] = collect_run_state(trainer)
        if self._is_between_steps:  # false for checkpoints that Lightning writes itself
            fit_loop = checkpoint["loops"]["fit_loop"]
            adjust_loop_counters(fit_loop, trainer.num_training_batches, validation_is_due=self._validation_is_due)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the state that Lightning does not restore until training starts."""
        self._restored_state = checkpoint.get(_STATE_KEY)
        self.last_saved_step = checkpoint["global_step"]
        callback_state = checkpoint["callbacks"].get(self.state_key)
        if callback_state is not None:
            self.current_score = callback_state["current_score"]
            if Path(str(trainer.ckpt_path)).resolve().parent == Path(str(self.dirpath)).resolve():
                _relocate(callback_state, str(self.dirpath))

    def write_last(self, trainer: pl.Trainer) -> None:
        """Write ``last.ckpt``. Every rank must call it, between two optimizer steps."""
        if not self._is_dry_run:
            self.save_last_checkpoint(trainer)
            self._last_write_s = _shared_clock_s(trainer)

    def _export(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the adapter directory from the weights in memory. Every rank must call it."""
        from snake_lora_pl.training.module import LoRALightningModule

        if self._is_dry_run or not isinstance(pl_module, LoRALightningModule):
            return
        weights = gather_trained(pl_module.peft_model) if is_sharded(pl_module.peft_model) else None
        if trainer.is_global_zero:
            metadata = _metadata(trainer, pl_module)
            with explain_failed_writes(self._output_dir, "the adapter", SafetensorError):
                store.save(pl_module.peft_model, self._output_dir, metadata, pl_module.tokenizer, weights)
            # The path is long: log it only once.
            destination = "" if self._has_exported else f" to {display_path(self._output_dir)}"
            logger.info("step %d: adapter written%s", trainer.global_step, destination)
            self._has_exported = True
        trainer.strategy.barrier("AdapterCheckpoint")


def find_adapter_checkpoint(trainer: pl.Trainer) -> AdapterCheckpoint | None:
    """Return the ``AdapterCheckpoint`` of a trainer, which may have other checkpoint callbacks before it; or None."""
    callbacks = trainer.checkpoint_callbacks
    return next((callback for callback in callbacks if isinstance(callback, AdapterCheckpoint)), None)


def _shared_clock_s(trainer: pl.Trainer) -> float | None:
    """Return the clock of rank 0 at the last optimizer step; None before the first, and for foreign modules."""
    clock_s: float | None = getattr(getattr(trainer.lightning_module, "step_exchange", None), "clock_s", None)
    return clock_s


def _separate_checkpoints(trainer: pl.Trainer, checkpoints_dir: Path) -> None:
    """Keep every ``ModelCheckpoint`` of the user out of the directory of this package's checkpoints.

    Both would write ``last.ckpt`` and delete each other's files. Without a ``dirpath``, Lightning would choose that
    directory for both; such a callback gets the directory ``model_checkpoints/`` next to it.

    Raises:
        UserError: If a callback was given the directory.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, AdapterCheckpoint) or not isinstance(callback, ModelCheckpoint):
            continue
        if callback.dirpath is None:
            callback.dirpath = str(checkpoints_dir.parent / "model_checkpoints")
        elif os.path.realpath(callback.dirpath) == os.path.realpath(checkpoints_dir):
            raise UserError(
                f"trainer.callbacks: {type(callback).__name__} writes to the directory of the run's own checkpoints "
                f"({display_path(checkpoints_dir)}). Set its dirpath to another one."
            )


def _check_is_replaceable(adapter_dir: Path) -> None:
    """Check that a directory is missing, empty, or an adapter: writing the adapter replaces the whole directory.

    Raises:
        UserError: If it holds other files.
    """
    if adapter_dir.is_dir():
        has_other_files = any(adapter_dir.iterdir()) and not (adapter_dir / store.METADATA_FILE).exists()
    else:
        has_other_files = adapter_dir.exists()
    if has_other_files:
        raise UserError(
            f"checkpoint.adapter_dir={adapter_dir}: not an adapter of this package; its content would be replaced. "
            "Choose a new or an empty directory."
        )


def _validate_between_steps(trainer: pl.Trainer) -> None:
    """Move each validation to the end of an optimizer step: a checkpoint cannot hold accumulated gradients.

    Raises:
        UserError: If validations are scheduled by time or across epochs, so that they cannot be moved in advance.
    """
    accumulate, every = trainer.accumulate_grad_batches, trainer.val_check_batch
    if accumulate == 1 or not trainer.enable_validation:
        return
    num_batches = trainer.num_training_batches
    across_epochs = trainer.check_val_every_n_epoch is None and num_batches % accumulate != 0
    if across_epochs or validates_by_time(trainer):
        raise UserError(
            f"trainer.accumulate_grad_batches={accumulate}: these settings validate within an optimizer step. Set "
            "trainer.check_val_every_n_epoch=1, and trainer.val_check_interval to a fraction of an epoch or a number "
            "of batches."
        )
    if every is not None and every != float("inf"):
        every = math.ceil(every / accumulate) * accumulate
        trainer.val_check_batch = every if trainer.check_val_every_n_epoch is None else min(every, int(num_batches))


def _relocate(state: dict[str, Any], dirpath: str) -> None:
    """Update the paths in a callback state to the current directory, in case the run directory was moved."""

    def relocate(path: str) -> str:
        return os.path.join(dirpath, os.path.basename(path)) if path else path

    for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
        state[name] = relocate(state[name])
    state["best_k_models"] = {relocate(path): score for path, score in state["best_k_models"].items()}
    state["dirpath"] = dirpath


def _is_logged_later(trainer: pl.Trainer, metric: str) -> bool:
    """Return whether some callback logs a metric at a later validation."""
    methods = [getattr(callback, "waits_for", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    return any(waits_for is not None and waits_for(metric) for waits_for in methods)


def _metadata(trainer: pl.Trainer, pl_module: LoRALightningModule) -> AdapterMetadata:
    # Only this package's data module has a summary of its data.
    summarize_data = getattr(getattr(trainer, "datamodule", None), "summary", None)
    data: dict[str, Any] = summarize_data() if summarize_data is not None else {}
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    metadata: AdapterMetadata = pl_module.adapter_metadata()
    return dataclasses.replace(
        metadata,
        grid_size=data.pop("grid_size", None),
        data=data,
        step=trainer.global_step,
        epoch=trainer.current_epoch,
        # JSON has no NaN and no infinity.
        metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
    )
