"""Check for callbacks of Lightning that would silently change what a run trains, exports or resumes."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)

from snake_lora_pl.errors import UserError

_AVERAGING = (
    "is not supported: checkpoints and the exported adapter hold the trained weights, not their average. Remove it."
)

_UNSUPPORTED: dict[type[Callback], str] = {
    WeightAveraging: _AVERAGING,
    StochasticWeightAveraging: _AVERAGING,
    GradientAccumulationScheduler: (
        "is not supported: the schedule of the learning rate and resuming need the same number in every epoch. Remove "
        "it and set trainer.accumulate_grad_batches."
    ),
    BatchSizeFinder: "is not supported. Remove it and set data.batch_size=auto.",
    LearningRateFinder: (
        "is not supported: a resumed run would search again, from other weights. Remove it and set model.learning_rate."
    ),
    BaseFinetuning: "is not supported: the base model stays frozen, and only the adapter is trained. Remove it.",
    ModelPruning: "is not supported: it replaces the parameters of the adapter. Remove it, or lower model.lora.rank.",
}


def check_supported(callbacks: Iterable[Callback]) -> None:
    """Refuse callbacks, and subclasses of callbacks, that do not work with adapters or with exact resume.

    Raises:
        UserError: If there is one; the message names it.
    """
    for callback in callbacks:
        for unsupported, reason in _UNSUPPORTED.items():
            if isinstance(callback, unsupported):
                raise UserError(f"trainer.callbacks: {type(callback).__name__} {reason}")
