"""Exchange of values between the ranks once per optimizer step, in a single all-reduce."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from snake_lora_pl.training.optimizer import elapsed_fraction, find_timer

if TYPE_CHECKING:
    import lightning.pytorch as pl


class StepExchange:
    """Values of an optimizer step that all ranks must share: sums of the loss, a signal, and the elapsed time.

    Each rank contributes a vector of values; where only one rank decides, the others add zeros. The sum stays on the
    device, so that the host waits for it only when it reads the whole step.

    Attributes:
        own_signum: Signal that this rank received, or 0.
        signum: Largest signal of any rank at the last exchange, or 0.
        elapsed_fraction: Fraction of ``trainer.max_time`` that has elapsed on the clock of rank 0 at the last exchange;
            None before the first.
        clock_s: Clock of rank 0 at the last exchange, in seconds of ``time.monotonic``; None before the first.
    """

    def __init__(self) -> None:
        self.own_signum = 0
        self.signum = 0
        self.elapsed_fraction: float | None = None
        self.clock_s: float | None = None

    def sum_over_ranks(self, trainer: pl.Trainer, loss_sum: Tensor, num_targets: int) -> Tensor:
        """Add up the values of all ranks, which must all call it.

        Args:
            trainer: The trainer of the run.
            loss_sum: Loss of this rank, summed over its target tokens; a float64 scalar on the rank's device.
            num_targets: Target tokens of this rank.

        Returns:
            float64 vector on the device: loss sum, number of target tokens, and what ``read`` takes.
        """
        rank, num_ranks = trainer.global_rank, trainer.world_size
        signals = [self.own_signum if index == rank else 0 for index in range(num_ranks)]
        clocks = [elapsed_fraction(find_timer(trainer)), time.monotonic()] if rank == 0 else [0.0, 0.0]
        own = torch.tensor([num_targets, *clocks, *signals], dtype=torch.float64)
        totals = torch.cat([loss_sum.reshape(1), own.to(loss_sum.device, non_blocking=True)])
        if num_ranks > 1:
            # Not Lightning's reduce, which runs a barrier first.
            torch.distributed.all_reduce(totals)
        return totals

    def read(self, values: Sequence[float]) -> None:
        """Store the values after the first two of ``sum_over_ranks``."""
        self.elapsed_fraction, self.clock_s, *signals = values
        self.signum = int(max(signals))
