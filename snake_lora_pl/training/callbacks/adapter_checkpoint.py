"""AdapterCheckpoint: keeps the best adapter where others load it, and what a run needs to go on."""

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

from snake_lora_pl.adapters import store
from snake_lora_pl.durable import explain_failed_writes, remove_leftovers
from snake_lora_pl.errors import UserError
from snake_lora_pl.paths import display_path
from snake_lora_pl.training.metrics_csv import MetricsCSVLogger
from snake_lora_pl.training.resume.checkpoint_io import DurableCheckpointIO
from snake_lora_pl.training.resume.checkpoint_state import (
    explain_damage,
    guard_restoring,
    is_between_steps,
    restore_run_state,
    run_state,
    settle_counters,
)
from snake_lora_pl.training.sharding import gather_trained, is_sharded

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from snake_lora_pl.training.module import LoRALightningModule

logger = logging.getLogger(__name__)

_STATE_KEY = "snake_lora_pl.run_state"


class AdapterCheckpoint(ModelCheckpoint):
    """Writes the best adapter to ``adapter_dir`` and resumable state, without base weights, to ``dirpath``.

    The bookkeeping of best-k and last is Lightning's; this class decides when, and writes the adapter directory.
    ``last.ckpt`` is written every ``save_every_n_steps`` optimizer steps, before and after each validation, the best-k
    after each validation. All are whole or absent, also after a kill, and are written between two optimizer steps, so
    that a run that goes on from any of them is the run that was never stopped: the same batches, random numbers,
    weights and metrics.

    A metric that is logged at some validations only, such as ``play/apples_mean``, is compared among these. The
    callback that logs it says so by a method ``waits_for(metric)``.

    Args:
        dirpath: Directory of the ``.ckpt`` files; None takes ``checkpoints/`` in the trainer's log directory.
        adapter_dir: Directory of the adapter; None takes ``lora_adapters/model_artifacts/`` beside ``checkpoints/``.
        monitor: Metric that decides which adapter is best; None keeps the newest.
        mode: ``min`` or ``max``: which way the metric is better.
        save_top_k: How many of the best checkpoints to keep.
        save_every_n_steps: Optimizer steps between two writings of ``last.ckpt``; 0 writes it at validation only.

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
        self._has_exported = False
        self.save_every_n_steps = save_every_n_steps
        self._is_between_steps = False
        self._validation_is_due = False
        self._restored: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """One name for all settings: a resumed run may change how often it saves."""
        return "AdapterCheckpoint"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Settle where the files go and remove what a killed writer left."""
        log_dir = trainer.log_dir  # asks the first process, so all processes must
        if self.dirpath is None and log_dir is not None:
            self.dirpath = os.path.realpath(os.path.join(log_dir, "checkpoints"))
        super().setup(trainer, pl_module, stage)
        assert self.dirpath is not None
        if self.adapter_dir is None:
            self.adapter_dir = Path(self.dirpath).parent / "lora_adapters" / "model_artifacts"
        # Processes that a launcher started apart from each other may name another directory; the first one's counts.
        self.adapter_dir = trainer.strategy.broadcast(self.adapter_dir)
        if stage == "fit":
            _check_is_no_one_elses(self.adapter_dir)
        trainer.strategy.checkpoint_io = DurableCheckpointIO()
        guard_restoring(trainer)
        if stage == "fit" and trainer.is_global_zero:
            remove_leftovers(self.adapter_dir.parent, self.adapter_dir.name)
            remove_leftovers(self.dirpath, "*.ckpt")

    # ModelCheckpoint ties `last` to the monitored metric; the hooks below untie them.

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on where the checkpoint was written, if there was one."""
        super().on_train_start(trainer, pl_module)
        if self._restored is not None:
            with explain_damage(trainer.ckpt_path):
                restore_run_state(trainer, self._restored)
            self._restored = None
        _validate_between_steps(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write ``last.ckpt`` every ``save_every_n_steps`` optimizer steps.

        This is the one hook at which nothing of the step before is left to do: it is logged and validated. The batch
        that is at hand comes again when the run goes on.
        """
        step = trainer.global_step
        # Lightning counts a step for the loggers after the validation in which it may have written a checkpoint.
        trainer.fit_loop.epoch_loop._batches_that_stepped = step
        is_due = self.save_every_n_steps and step and step % self.save_every_n_steps == 0
        if is_due and not self.has_saved(trainer) and is_between_steps(trainer):
            self.write_last(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let no time limit end the run in the middle of a step; the timer asks again after the next micro-batch."""
        if trainer.should_stop and trainer.fit_loop._should_accumulate():
            trainer.should_stop = False

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save before what may take minutes, unless the run is about to end, of which no checkpoint can tell."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or trainer.should_stop or _validates_by_clock(trainer):
            return
        self._validation_is_due = True
        try:
            self.write_last(trainer)
        finally:
            self._validation_is_due = False

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Without validation an epoch's end is the time to save."""
        if not self._validates(trainer):
            self.write_last(trainer)
            self._export(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the state if it is among the best, write the adapter if it is the best, and write ``last.ckpt``."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or _is_rehearsal(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        if self.monitor is not None and self.monitor not in candidates:
            if _comes_later(trainer, self.monitor):
                self.write_last(trainer)
                return
            there = ", ".join(sorted(set(trainer.callback_metrics)))
            raise UserError(f"checkpoint.monitor: no metric '{self.monitor}' was logged. There are: {there}.")
        self._save_topk_checkpoint(trainer, candidates)
        newest_is_best = self._last_checkpoint_saved == self.best_model_path
        if newest_is_best and self._last_global_step_saved == trainer.global_step:
            self._export(trainer, pl_module)
        self.write_last(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave a checkpoint and an adapter behind, however the run was cut."""
        if _is_rehearsal(trainer):
            return
        if not self.has_saved(trainer):
            self.write_last(trainer)
        assert self.adapter_dir is not None
        # One process looks: another might see what the first has meanwhile written, and then not wait for it.
        if not trainer.strategy.broadcast((self.adapter_dir / store.METADATA_FILE).is_file()):
            self._export(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so where the checkpoint was of a run's end."""
        if self._restored is not None:  # training, which takes it up, never began
            self._restored = None
            logger.info(
                "Nothing was left to train: the checkpoint, of step %d, is at or beyond the end of this run. To train "
                "on, raise trainer.max_steps, trainer.max_epochs or trainer.max_time, whichever ended it.",
                trainer.global_step,
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save nothing: in the middle of a step the state is of two steps; the last whole one is on disk."""

    # What is in a checkpoint

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        for run_logger in trainer.loggers:
            if isinstance(run_logger, MetricsCSVLogger):
                run_logger.flush()
        with self.between_steps():
            super()._save_checkpoint(trainer, filepath)

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Say of checkpoints that are written in this context that they are written between two optimizer steps."""
        before, self._is_between_steps = self._is_between_steps, True
        try:
            yield
        finally:
            self._is_between_steps = before

    def has_saved(self, trainer: pl.Trainer) -> bool:
        """Whether the state after the last step is on the disk."""
        return self._last_global_step_saved == trainer.global_step

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what Lightning leaves out."""
        checkpoint[_STATE_KEY] = run_state(trainer)
        if self._is_between_steps:  # not where Lightning itself saves, at a moment of its own
            fit_loop = checkpoint["loops"]["fit_loop"]
            settle_counters(fit_loop, trainer.num_training_batches, validation_is_due=self._validation_is_due)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take what Lightning leaves out; most of it has to wait until training starts."""
        self._restored = checkpoint.get(_STATE_KEY)
        self._last_global_step_saved = checkpoint["global_step"]
        own = checkpoint["callbacks"].get(self.state_key)
        if own is not None:
            self.current_score = own["current_score"]
            if Path(str(trainer.ckpt_path)).resolve().parent == Path(str(self.dirpath)).resolve():
                _follow_move(own, str(self.dirpath))

    def _validates(self, trainer: pl.Trainer) -> bool:
        return trainer.enable_validation and sum(trainer.num_val_batches) > 0

    def write_last(self, trainer: pl.Trainer) -> None:
        """Write ``last.ckpt`` now; all processes must call it, between two optimizer steps."""
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
            with explain_failed_writes(self.adapter_dir, "the adapter", SafetensorError):
                store.save(pl_module.peft_model, self.adapter_dir, metadata, pl_module.tokenizer, weights)
            # The path fills two lines of a terminal: once is enough.
            place = "" if self._has_exported else f" to {display_path(self.adapter_dir)}"
            logger.info("step %d: adapter written%s", trainer.global_step, place)
            self._has_exported = True
        trainer.strategy.barrier("AdapterCheckpoint")


def _check_is_no_one_elses(adapter_dir: Path) -> None:
    """Refuse a directory of other files: it is replaced as a whole whenever the adapter is written.

    Raises:
        UserError: If it holds anything but an adapter.
    """
    if adapter_dir.is_dir():
        is_other = any(adapter_dir.iterdir()) and not (adapter_dir / store.METADATA_FILE).exists()
    else:
        is_other = adapter_dir.exists()
    if is_other:
        raise UserError(
            f"checkpoint.adapter_dir {adapter_dir}: holds something that is no adapter of this package, and would be "
            "replaced. Name a directory that is empty or not there."
        )


def _is_rehearsal(trainer: pl.Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _validates_by_clock(trainer: pl.Trainer) -> bool:
    return getattr(trainer, "_val_check_time_interval", None) is not None


def _validate_between_steps(trainer: pl.Trainer) -> None:
    """Put a validation off to the end of the optimizer step that it would fall into: half a step cannot be saved.

    Raises:
        UserError: If validations come by the clock or across epochs, and steps end at batches that cannot be foreseen.
    """
    accumulate, every = trainer.accumulate_grad_batches, trainer.val_check_batch
    if accumulate == 1 or not trainer.enable_validation:
        return
    num_batches = trainer.num_training_batches
    across_epochs = trainer.check_val_every_n_epoch is None and num_batches % accumulate != 0
    if across_epochs or _validates_by_clock(trainer):
        raise UserError(
            f"with trainer.accumulate_grad_batches={accumulate} these settings validate in the middle of an optimizer "
            "step. Set trainer.check_val_every_n_epoch=1, and trainer.val_check_interval to a share of an epoch or a "
            "number of batches."
        )
    if every is not None and every != float("inf"):
        every = math.ceil(every / accumulate) * accumulate
        trainer.val_check_batch = every if trainer.check_val_every_n_epoch is None else min(every, int(num_batches))


def _follow_move(state: dict[str, Any], dirpath: str) -> None:
    """Let Lightning find the checkpoints it knows of in a run's directory that has been moved since."""

    def moved(path: str) -> str:
        return os.path.join(dirpath, os.path.basename(path)) if path else path

    for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
        state[name] = moved(state[name])
    state["best_k_models"] = {moved(path): score for path, score in state["best_k_models"].items()}
    state["dirpath"] = dirpath


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
