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
    num_targets: Tensor
    """Number of target tokens; an int64 scalar."""
    sources: list[str]
    """``path:line`` of each row."""


class StepLoss:
    """Losses of the micro-batches of the current optimizer step."""

    def __init__(self) -> None:
        self.micro_batches: list[MicroBatch] = []

    def add(self, loss_sum: Tensor, num_targets: Tensor, sources: list[str]) -> None:
        """Add a micro-batch; see ``MicroBatch``."""
        self.micro_batches.append(MicroBatch(loss_sum.detach(), num_targets, sources))

    def clear(self) -> None:
        """Remove all micro-batches."""
        self.micro_batches.clear()

    def reduce(self, trainer: pl.Trainer) -> tuple[Tensor, Tensor]:
        """Sum the step over its micro-batches and all ranks; all ranks must call it.

        Returns:
            The mean loss per target token and the number of target tokens, float32 scalars.
        """
        loss_sums = torch.stack([batch.loss_sum for batch in self.micro_batches])
        num_targets = torch.stack([batch.num_targets for batch in self.micro_batches])
        sums = torch.stack([loss_sums.sum().double(), num_targets.sum().double()])
        loss_sum, total_targets = trainer.strategy.reduce(sums, reduce_op="sum")
        return (loss_sum / total_targets).float(), total_targets.float()


def normalize_gradients(gradients: Sequence[Tensor], num_targets: Tensor, trainer: pl.Trainer) -> None:
    """Divide summed gradients by the number of target tokens of the step, in place.

    Lightning has divided each loss by the number of accumulated micro-batches, and the strategy has averaged the
    gradients over the ranks. Both divisions are undone here.

    Args:
        gradients: Gradients of the summed loss, whole or sharded.
        num_targets: Target tokens of the step over all ranks, from ``StepLoss.reduce``.
        trainer: The trainer of the run.
    """
    scale = trainer.accumulate_grad_batches * trainer.world_size / num_targets
    for gradient in local_parts(gradients):
        gradient.mul_(scale)
