"""What one optimizer step has seen, and what to do where its numbers go wrong."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from snake_lora_pl.collectives import gather_objects
from snake_lora_pl.errors import UserError

if TYPE_CHECKING:
    import lightning.pytorch as pl

logger = logging.getLogger(__name__)

OnNonfinite = Literal["error", "skip"]

MAX_SKIPPED_IN_A_ROW = 10

# A loss is a spike beyond this many standard deviations above its running mean, and this share of the mean above it:
# late in training the deviation is next to nothing. Both averages run over some 50 steps and count from the 20th on.
SPIKE_DEVIATIONS = 6.0
SPIKE_SHARE = 0.1
_AVERAGING_STEPS = 50
_FIRST_STEPS = 20


class _MicroBatch(NamedTuple):
    loss: Tensor  # sum over its targets
    num_targets: Tensor
    sources: list[str]  # ``path:line`` of each row


class StepWatch:
    """Collects the micro-batches of an optimizer step and judges the step by its loss and gradient.

    All processes judge alike, since they judge by what is reduced over all of them; where something is wrong they
    exchange the rows they hold, so that the first can name them.

    Args:
        on_nonfinite: ``error`` raises where loss or gradient are not finite; ``skip`` has the step left out, though not
            more than ``MAX_SKIPPED_IN_A_ROW`` times in a row.
    """

    def __init__(self, on_nonfinite: OnNonfinite = "error") -> None:
        if on_nonfinite not in get_args(OnNonfinite):
            choices = ", ".join(get_args(OnNonfinite))
            raise UserError(f"model.on_nonfinite must be one of {choices}, not '{on_nonfinite}'.")
        self.on_nonfinite = on_nonfinite
        self.micro_batches: list[_MicroBatch] = []
        self.num_skipped = 0
        self.num_skipped_in_a_row = 0
        self.num_spikes = 0
        self._num_averaged = 0
        self._mean = 0.0
        self._variance = 0.0

    def add(self, loss: Tensor, num_targets: Tensor, sources: list[str]) -> None:
        """Take a micro-batch.

        Args:
            loss: Sum of its losses, a scalar.
            num_targets: What it is a sum over.
            sources: Where its rows stand.
        """
        self.micro_batches.append(_MicroBatch(loss.detach(), num_targets, sources))

    def clear(self) -> None:
        """Forget the step's micro-batches."""
        self.micro_batches.clear()

    def totals(self, trainer: pl.Trainer) -> tuple[Tensor, Tensor]:
        """Sum of the losses and number of targets of the whole step, over all processes; float64 scalars."""
        losses = torch.stack([batch.loss for batch in self.micro_batches])
        num_targets = torch.stack([batch.num_targets for batch in self.micro_batches])
        sums = torch.stack([losses.sum().double(), num_targets.sum().double()])
        loss_sum, total_targets = trainer.strategy.reduce(sums, reduce_op="sum")
        return loss_sum, total_targets

    def judge(self, trainer: pl.Trainer, loss: Tensor, gradient_norm: Tensor, *, is_scaled: bool) -> bool:
        """Whether to take the step.

        Args:
            trainer: The trainer; all processes must ask.
            loss: Mean loss over the step's targets.
            gradient_norm: Norm of the gradient of that mean.
            is_scaled: Whether the loss was scaled for a backward pass in float16: a gradient that overflows then says
                that the scale is too large, which is no fault of the rows.

        Raises:
            UserError: If a number is not finite and no step may be left out; the message names the rows.
        """
        loss_value, norm_value = torch.stack([loss.float(), gradient_norm.float()]).tolist()
        if math.isfinite(loss_value) and math.isfinite(norm_value):
            self.num_skipped_in_a_row = 0
            self._look_for_spike(trainer, loss_value)
            return True
        what = "gradient" if math.isfinite(loss_value) else "loss"
        is_overflow = is_scaled and what == "gradient"
        rows = ", ".join(self._bad_rows(trainer))
        if self.on_nonfinite == "error" and not is_overflow:
            raise UserError(
                f"step {trainer.global_step}: the {what} is not finite in a batch of the rows {rows}. Look at these "
                "rows, lower model.learning_rate, set trainer.gradient_clip_val, or leave such steps out with "
                "model.on_nonfinite=skip."
            )
        self.num_skipped += 1
        self.num_skipped_in_a_row += 1
        if not is_overflow and trainer.is_global_zero:
            logger.warning("step %d: skipped, the %s is not finite; rows %s", trainer.global_step, what, rows)
        if self.num_skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"step {trainer.global_step}: {MAX_SKIPPED_IN_A_ROW} steps in a row were skipped, for their loss or "
                f"gradient was not finite; the last had the rows {rows}. Lower model.learning_rate, or use "
                "model.dtype=float32."
            )
        return False

    def _bad_rows(self, trainer: pl.Trainer) -> list[str]:
        """Rows of the micro-batches whose loss is not finite, else all rows of the step; of all processes."""
        everyone = self._gather(trainer)
        bad = [row for loss, _, rows in everyone if not math.isfinite(loss) for row in rows]
        return bad or [row for _, _, rows in everyone for row in rows]

    def _gather(self, trainer: pl.Trainer) -> list[tuple[float, int, list[str]]]:
        own = [(float(batch.loss), int(batch.num_targets), batch.sources) for batch in self.micro_batches]
        return [batch for batches in gather_objects(trainer, own) for batch in batches]

    def _look_for_spike(self, trainer: pl.Trainer, loss: float) -> None:
        """Say so where the loss leaps, and take it into the averages, no further than where a leap begins."""
        limit = self._mean + max(SPIKE_DEVIATIONS * math.sqrt(self._variance), SPIKE_SHARE * abs(self._mean))
        if self._num_averaged >= _FIRST_STEPS and loss > limit:
            self.num_spikes += 1
            batches = [batch for batch in self._gather(trainer) if batch[1]]
            worst_loss, num_targets, rows = max(batches, key=lambda batch: batch[0] / batch[1])
            if trainer.is_global_zero:
                logger.warning(
                    "step %d: the loss leapt to %.4g from a running mean of %.4g; worst are the rows %s (%.4g)",
                    trainer.global_step,
                    loss,
                    self._mean,
                    ", ".join(rows),
                    worst_loss / num_targets,
                )
            loss = limit
        self._num_averaged += 1
        # The first steps weigh as much as those after them.
        weight = 1 / min(self._num_averaged, _AVERAGING_STEPS)
        difference = loss - self._mean
        self._mean += weight * difference
        self._variance = (1 - weight) * (self._variance + weight * difference**2)

    def state_dict(self) -> dict[str, Any]:
        """The counts and averages, so that a resumed run judges alike."""
        return {
            "num_skipped": self.num_skipped,
            "num_skipped_in_a_row": self.num_skipped_in_a_row,
            "num_spikes": self.num_spikes,
            "num_averaged": self._num_averaged,
            "mean": self._mean,
            "variance": self._variance,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` returned."""
        self.num_skipped, self.num_skipped_in_a_row = state["num_skipped"], state["num_skipped_in_a_row"]
        self.num_spikes, self._num_averaged = state["num_spikes"], state["num_averaged"]
        self._mean, self._variance = state["mean"], state["variance"]
