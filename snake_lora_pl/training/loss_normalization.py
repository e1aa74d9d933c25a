"""Normalization of the loss and its gradient by the target tokens of an optimizer step, over all ranks.

``training_step`` returns the loss summed over the target tokens of one micro-batch. The divisor is the number of target
tokens in the whole optimizer step: over all accumulated micro-batches and all ranks. It is known only after the last
micro-batch, so the gradients are divided just before the optimizer steps. A mean of per-batch means would give tokens
of short batches more weight (https://github.com/huggingface/trl/issues/2604).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from snake_lora_pl.training.sharding import local_parts

if TYPE_CHECKING:
    import lightning.pytorch as pl


class MicroBatch(NamedTuple):
    """Loss of one micro-batch on this rank."""

    loss_sum: Tensor
    """Loss summed over the target tokens; a scalar without a graph."""
    num_targets: int
    """Number of target tokens."""
    sources: list[str]
    """``path:line`` of each row."""


class StepLoss:
    """Losses of the micro-batches of the current optimizer step, on this rank."""

    def __init__(self) -> None:
        self.micro_batches: list[MicroBatch] = []

    def add(self, loss_sum: Tensor, num_targets: int, sources: list[str]) -> None:
        """Add a micro-batch; see ``MicroBatch``."""
        self.micro_batches.append(MicroBatch(loss_sum.detach(), num_targets, sources))

    def clear(self) -> None:
        """Remove all micro-batches."""
        self.micro_batches.clear()

    @property
    def loss_sum(self) -> Tensor:
        """Loss summed over all micro-batches; a float64 scalar on the device."""
        return torch.stack([batch.loss_sum for batch in self.micro_batches]).sum().double()

    @property
    def num_targets(self) -> int:
        """Target tokens of all micro-batches."""
        return sum(batch.num_targets for batch in self.micro_batches)


def normalize_gradients(gradients: Sequence[Tensor], num_targets: Tensor, trainer: pl.Trainer) -> None:
    """Divide summed gradients by the number of target tokens of the step, in place.

    Lightning has divided each loss by the number of accumulated micro-batches, and the strategy has averaged the
    gradients over the ranks. Both divisions are undone here.

    Args:
        gradients: Gradients of the summed loss, whole or sharded.
        num_targets: Target tokens of the step over all ranks; a float32 scalar on their device.
        trainer: The trainer of the run.
    """
    _multiply(gradients, trainer.accumulate_grad_batches * trainer.world_size / num_targets)


def clip_gradients(gradients: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale gradients down to a norm of ``max_norm`` if theirs is larger, in place.

    Like ``torch.nn.utils.clip_grad_norm_``, but with a norm that is known already.

    Args:
        gradients: Gradients, whole or sharded.
        norm: Their Euclidean norm; a scalar on their device.
        max_norm: Largest norm to keep.
    """
    _multiply(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))


def _multiply(gradients: Sequence[Tensor], factor: Tensor) -> None:
    if parts := local_parts(gradients):
        torch._foreach_mul_(parts, factor)
