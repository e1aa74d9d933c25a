"""State that a checkpoint needs in addition to Lightning's, so that a resumed run equals an uninterrupted run.

Lightning saves weights, optimizer, schedule and loop counters. This module adds the random number generators, the
number of rows in ``metrics.csv``, the metrics that later decisions depend on, and restores that early stopping ended
the run. Lightning's loop counters depend on the hook in which a checkpoint is written, and after some hooks a resumed
run skips a validation or repeats a batch; ``adjust_loop_counters`` sets them to the values between two optimizer steps.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks.early_stopping import EarlyStopping, EarlyStoppingReason

from snake_lora_pl.errors import UserError, one_line
from snake_lora_pl.training.lightning_internals import wrap_restoring
from snake_lora_pl.training.metrics_csv import MetricsCSVLogger
from snake_lora_pl.training.resume.random_state import collect_random_states, restore_random_state

if TYPE_CHECKING:
    import lightning.pytorch as pl

logger = logging.getLogger(__name__)

# Optimizer states of AdamW, in PyTorch and in bitsandbytes, that have the shape of their parameter.
_MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2")


@contextlib.contextmanager
def explain_damaged_checkpoint(ckpt_path: str | os.PathLike[str] | None) -> Iterator[None]:
    """Turn any error caused by the values in a readable checkpoint into a UserError.

    Raises:
        UserError: In place of the original error.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError, torch.distributed.DistError):
        raise
    except Exception as error:
        raise UserError(
            f"--ckpt_path {ckpt_path}: damaged, or written with other settings or another version ({one_line(error)}). "
            "Use the config.yaml of its run, or another file in the run's checkpoints directory."
        ) from error


def guard_checkpoint_restore(trainer: pl.Trainer) -> None:
    """Make Lightning's restore of a checkpoint check the optimizer states and explain damage."""

    def guard(restore: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            with explain_damaged_checkpoint(args[0] if args else trainer.ckpt_path):
                restore(*args, **kwargs)
                _check_moments(trainer)

        return run

    wrap_restoring(trainer, guard)


def _check_moments(trainer: pl.Trainer) -> None:
    """Check that moments have the shape of their parameter. A fused step would read out of bounds.

    Raises:
        ValueError: If a shape differs.
    """
    for optimizer in trainer.optimizers:
        for parameter, state in optimizer.state.items():
            for name in state.keys() & set(_MOMENTS):
                if state[name].shape != parameter.shape:
                    raise ValueError(
                        f"{name} has shape {list(state[name].shape)}, its parameter {list(parameter.shape)}"
                    )


def is_between_steps(trainer: pl.Trainer) -> bool:
    """Return whether there are no accumulated gradients of an unfinished optimizer step."""
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    return progress.completed % trainer.accumulate_grad_batches == 0 or (
        progress.completed == trainer.num_training_batches
    )


def collect_run_state(trainer: pl.Trainer) -> dict[str, Any]:
    """Return the state for ``restore_run_state``. A collective; the loggers must have been flushed."""
    return {
        "random": collect_random_states(trainer),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "metrics_rows": [run_logger.num_rows for run_logger in _metrics_loggers(trainer)],
    }


def restore_run_state(trainer: pl.Trainer, state: dict[str, Any]) -> None:
    """Restore the state of ``collect_run_state`` into a trainer that is about to train."""
    if not restore_random_state(trainer, state["random"]):
        logger.warning(
            "rank %d: the checkpoint was written by %d ranks and has no random state for this one.",
            trainer.global_rank,
            len(state["random"]),
        )
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in state["metrics"].items()})
    for run_logger, num_rows in zip(_metrics_loggers(trainer), state["metrics_rows"], strict=False):
        run_logger.rewind(num_rows)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping) and callback.stopping_reason != EarlyStoppingReason.NOT_STOPPED:
            logger.info(
                "Early stopping ended this run: %s To train further, start from its adapter (--adapter DIR).",
                callback.stopping_reason_message,
            )
            trainer.should_stop = True


def adjust_loop_counters(fit_loop: dict[str, Any], num_batches: float, *, validation_is_due: bool) -> None:
    """Set the loop counters of a checkpoint to their values between two optimizer steps.

    Args:
        fit_loop: ``checkpoint["loops"]["fit_loop"]`` of Lightning; changed in place.
        num_batches: Batches per epoch.
        validation_is_due: Whether the validation after the last step is still to run.
    """
    batches, epochs = fit_loop["epoch_loop.batch_progress"], fit_loop["epoch_progress"]
    val_batches = fit_loop["epoch_loop.val_loop.batch_progress"]
    for counts in (batches["total"], batches["current"]):
        _set_all(counts, counts["completed"])
    is_last_batch = batches["current"]["completed"] >= num_batches
    epoch_is_over = is_last_batch and not validation_is_due
    # From these counters Lightning infers whether the epoch is over.
    for counts in (epochs["total"], epochs["current"]):
        _set_all(counts, counts["ready"])
        if not epoch_is_over:
            counts["processed"] = counts["completed"] = counts["ready"] - 1
    if epoch_is_over:
        _set_all(batches["current"], 0)
    batches["is_last_batch"] = is_last_batch and not epoch_is_over
    # From these counters Lightning infers whether a validation is still to run.
    _set_all(val_batches["current"], 0)
    _set_all(val_batches["total"], 0)
    if validation_is_due:
        val_batches["total"].update(ready=1, started=1)


def _set_all(counts: dict[str, int], value: int) -> None:
    counts.update(dict.fromkeys(counts, value))


def _metrics_loggers(trainer: pl.Trainer) -> list[MetricsCSVLogger]:
    return [run_logger for run_logger in trainer.loggers if isinstance(run_logger, MetricsCSVLogger)]
