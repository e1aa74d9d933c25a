"""AdamW for an adapter, its learning rate schedule, and hyperparameters that change when a run resumes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import Timer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from snake_lora_pl.adapters.adapter_type import AdapterType
from snake_lora_pl.errors import UserError, one_line

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from peft import PeftModel

logger = logging.getLogger(__name__)

# A dry run takes a few steps of a run that could have any length; adapter types plan for this many.
_DRY_RUN_STEPS = 10_000


def build_optimizer(
    model: PeftModel,
    adapter_type: AdapterType,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    loraplus_lr_ratio: float,
) -> Optimizer:
    """Build AdamW over the trained parameters of a model.

    Args:
        model: The PEFT model.
        adapter_type: Chooses the implementation of AdamW.
        learning_rate: Peak learning rate.
        betas: Decay rates of the two moments.
        weight_decay: Decoupled weight decay (https://arxiv.org/abs/1711.05101).
        loraplus_lr_ratio: Learning rate of B divided by that of A (LoRA+, https://arxiv.org/abs/2402.12354).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer_class, options = adapter_type.optimizer_class(parameters)
    options = {"lr": learning_rate, "betas": betas, **options}
    optimizer: Optimizer
    if loraplus_lr_ratio == 1:
        optimizer = optimizer_class(parameters, weight_decay=weight_decay, **options)
        return optimizer
    from peft.optimizers import create_loraplus_optimizer

    optimizer = create_loraplus_optimizer(
        model, optimizer_class, loraplus_lr_ratio=loraplus_lr_ratio, loraplus_weight_decay=weight_decay, **options
    )
    return optimizer


def plan_steps(trainer: pl.Trainer) -> int | None:
    """Return the number of optimizer steps of a run, or None if it is not known in advance.

    Raises:
        UserError: If the trainer's settings contradict each other.
    """
    num_steps = _estimate_steps(trainer)
    # A time limit next to max_steps is a safeguard; without max_steps it is what ends the run.
    if not math.isfinite(num_steps) or (find_timer(trainer) is not None and trainer.max_steps == -1):
        return None
    return _DRY_RUN_STEPS if trainer.fast_dev_run else int(num_steps)  # type: ignore[attr-defined]


def build_schedule(
    optimizer: Optimizer,
    trainer: pl.Trainer,
    *,
    warmup_steps: int,
    final_fraction: float,
    shared_elapsed_fraction: Callable[[], float | None] = lambda: None,
) -> LambdaLR:
    """Build the schedule of ``learning_rate_factor`` over the steps and the time limit of a run.

    Args:
        optimizer: Optimizer whose learning rate is set.
        trainer: The trainer of the run.
        warmup_steps: Steps of the warmup.
        final_fraction: Fraction of the peak at the end of the run.
        shared_elapsed_fraction: Returns the elapsed fraction of the time limit that all ranks agree on, or None if they
            have not exchanged it yet.
    """
    num_steps = _estimate_steps(trainer)
    timer = find_timer(trainer)

    def factor(step: int) -> float:
        elapsed = elapsed_fraction(timer)
        if timer is not None and trainer.world_size > 1:
            # Clocks differ between ranks; different learning rates would let their adapters diverge.
            shared = shared_elapsed_fraction()
            elapsed = trainer.strategy.broadcast(elapsed) if shared is None else shared
        return learning_rate_factor(
            step,
            num_steps=num_steps,
            elapsed_fraction=elapsed,
            warmup_steps=warmup_steps,
            final_fraction=final_fraction,
        )

    return LambdaLR(optimizer, factor)


def learning_rate_factor(
    step: int, *, num_steps: float, elapsed_fraction: float, warmup_steps: int, final_fraction: float
) -> float:
    """Return the learning rate at an optimizer step as a fraction of its peak: linear warmup, then a cosine.

    Args:
        step: Optimizer steps done.
        num_steps: Optimizer steps of the run, or infinity.
        elapsed_fraction: Fraction of the time limit that has elapsed; 0 without a limit.
        warmup_steps: Steps of the warmup; at most a tenth of the run is used.
        final_fraction: Fraction of the peak at the end of the run.
    """
    num_warmup = min(warmup_steps, math.ceil(0.1 * num_steps)) if math.isfinite(num_steps) else warmup_steps
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    progress = min(1.0, max((step - num_warmup) / max(1, num_steps - num_warmup), elapsed_fraction))
    return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


def elapsed_fraction(timer: Timer | None) -> float:
    """Return the fraction of ``trainer.max_time`` that training has used, in [0, 1]; 0 without a limit."""
    remaining_s = timer.time_remaining() if timer is not None else None
    if timer is None or remaining_s is None:
        return 0.0
    elapsed_s = timer.time_elapsed()
    return elapsed_s / (elapsed_s + remaining_s) if remaining_s > 0 else 1.0


def apply_changed_hyperparameters(schedule: LambdaLR, configured: Optimizer) -> None:
    """Apply optimizer hyperparameters that changed since the checkpoint.

    A checkpoint restores the hyperparameters it was written with; without this a resumed run would ignore changed keys.

    Args:
        schedule: Schedule of the restored optimizer.
        configured: A new optimizer with the hyperparameters of the config.
    """
    changed = {}
    for index, group in enumerate(schedule.optimizer.param_groups):
        new = configured.param_groups[index]
        if (old_rate := schedule.base_lrs[index]) != new["lr"]:
            changed["learning_rate"] = (old_rate, new["lr"])
            group["lr"] *= new["lr"] / old_rate
            group["initial_lr"] = schedule.base_lrs[index] = new["lr"]
        for name in ("betas", "weight_decay"):
            if (old := group[name]) != new[name]:
                changed[name] = (old, new[name])
                group[name] = new[name]
    for name, (old, current) in changed.items():
        logger.warning("model.%s was %s in the checkpoint and is %s from this step on.", name, old, current)


def _estimate_steps(trainer: pl.Trainer) -> float:
    try:
        return trainer.estimated_stepping_batches
    except ValueError as error:  # Lightning checks its validation settings here
        raise UserError(f"trainer: {one_line(error)}.") from error


def find_timer(trainer: pl.Trainer) -> Timer | None:
    """Return the callback of ``trainer.max_time``, or None without a limit."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, Timer)), None)
