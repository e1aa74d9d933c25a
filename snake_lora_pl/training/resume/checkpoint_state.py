"""What Lightning leaves out of a checkpoint, so that a run that goes on is the run that was never stopped.

Lightning keeps weights, optimizer, schedule and counters. Missing are the random numbers, how much of ``metrics.csv``
was written, the metrics that later decisions look at, and that early stopping had ended the run. Its counters are
those of the hook that a checkpoint is written in, and from some hooks a resumed run skips a validation or trains a
batch too many; ``settle_counters`` makes them say what is true between two optimizer steps.
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
from snake_lora_pl.training.metrics_csv import MetricsCSVLogger
from snake_lora_pl.training.resume.random_state import random_states, restore_random_state

if TYPE_CHECKING:
    import lightning.pytorch as pl

logger = logging.getLogger(__name__)

# What AdamW, PyTorch's and bitsandbytes', keeps of a parameter in the parameter's own shape.
_MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2")


@contextlib.contextmanager
def explain_damage(ckpt_path: str | os.PathLike[str] | None) -> Iterator[None]:
    """Say in one line that a checkpoint whose file could be read holds something that cannot be gone on from.

    Raises:
        UserError: In place of whatever the values of the checkpoint made a library raise.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError, torch.distributed.DistError):
        raise
    except Exception as error:
        raise UserError(
            f"--ckpt_path {ckpt_path}: damaged, or written with other settings or by another version "
            f"({one_line(error)}). Use the config.yaml of its run, or another file of the run's checkpoints directory."
        ) from error


def guard_restoring(trainer: pl.Trainer) -> None:
    """Let ``explain_damage`` stand around all that Lightning restores, and look at what it does not."""
    connector = trainer._checkpoint_connector

    def guarded(restore: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            with explain_damage(args[0] if args else trainer.ckpt_path):
                restore(*args, **kwargs)
                _check_moments(trainer)

        return run

    for name in ("_restore_modules_and_callbacks", "restore_training_state"):
        setattr(connector, name, guarded(getattr(connector, name)))


def _check_moments(trainer: pl.Trainer) -> None:
    """Refuse moments of another shape than their parameter's: a fused step would read past their end."""
    for optimizer in trainer.optimizers:
        for parameter, state in optimizer.state.items():
            for name in state.keys() & set(_MOMENTS):
                if state[name].shape != parameter.shape:
                    raise ValueError(f"{name} of shape {list(state[name].shape)} for one of {list(parameter.shape)}")


def is_between_steps(trainer: pl.Trainer) -> bool:
    """Whether no micro-batch of an unfinished optimizer step has been seen."""
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    return progress.completed % trainer.accumulate_grad_batches == 0 or (
        progress.completed == trainer.num_training_batches
    )


def run_state(trainer: pl.Trainer) -> dict[str, Any]:
    """What ``restore_run_state`` needs; every process has to ask, and the loggers must have written all they have."""
    return {
        "random": random_states(trainer),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "metrics_rows": [run_logger.num_rows for run_logger in _metrics_loggers(trainer)],
    }


def restore_run_state(trainer: pl.Trainer, state: dict[str, Any]) -> None:
    """Put a trainer that is about to train where the one stood that wrote the checkpoint."""
    if not restore_random_state(trainer, state["random"]):
        logger.warning(
            "rank %d: the checkpoint was written by %d processes and holds no random numbers for this one.",
            trainer.global_rank,
            len(state["random"]),
        )
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in state["metrics"].items()})
    for run_logger, num_rows in zip(_metrics_loggers(trainer), state["metrics_rows"], strict=False):
        run_logger.rewind(num_rows)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping) and callback.stopping_reason != EarlyStoppingReason.NOT_STOPPED:
            logger.info(
                "The run had ended: %s Start from its adapter (--adapter DIR) to train on.",
                callback.stopping_reason_message,
            )
            trainer.should_stop = True


def settle_counters(fit_loop: dict[str, Any], num_batches: float, *, validation_is_due: bool) -> None:
    """Make the counters in a checkpoint say what is true between two optimizer steps, whatever hook it is written in.

    Args:
        fit_loop: Lightning's ``checkpoint["loops"]["fit_loop"]``; changed in place.
        num_batches: Batches of an epoch.
        validation_is_due: Whether the validation after the last step has still to run.
    """
    batches, epochs = fit_loop["epoch_loop.batch_progress"], fit_loop["epoch_progress"]
    val_batches = fit_loop["epoch_loop.val_loop.batch_progress"]
    for counts in (batches["total"], batches["current"]):
        _set(counts, counts["completed"])
    is_last_batch = batches["current"]["completed"] >= num_batches
    is_over = is_last_batch and not validation_is_due
    # From these Lightning tells an epoch that is over from one in whose middle it goes on, ...
    for counts in (epochs["total"], epochs["current"]):
        _set(counts, counts["ready"])
        if not is_over:
            counts["processed"] = counts["completed"] = counts["ready"] - 1
    if is_over:
        _set(batches["current"], 0)
    batches["is_last_batch"] = is_last_batch and not is_over
    # ... and from these whether a validation has still to run.
    _set(val_batches["current"], 0)
    _set(val_batches["total"], 0)
    if validation_is_due:
        val_batches["total"].update(ready=1, started=1)


def _set(counts: dict[str, int], value: int) -> None:
    counts.update(dict.fromkeys(counts, value))


def _metrics_loggers(trainer: pl.Trainer) -> list[MetricsCSVLogger]:
    return [run_logger for run_logger in trainer.loggers if isinstance(run_logger, MetricsCSVLogger)]
