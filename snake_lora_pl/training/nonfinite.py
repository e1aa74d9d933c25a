"""Handling of steps and validations whose loss or gradient is not finite (``model.on_nonfinite``).

A loss that rises but stays finite is not handled here. To stop a run on loss spikes, add
``lightning.pytorch.callbacks.SpikeDetection`` to ``trainer.callbacks``; with Lightning 2.6 a run that uses it cannot be
resumed with it, because its ``load_state_dict`` fails.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from snake_lora_pl.collectives import gather_objects
from snake_lora_pl.errors import UserError
from snake_lora_pl.training.loss_normalization import MicroBatch

if TYPE_CHECKING:
    import lightning.pytorch as pl

logger = logging.getLogger(__name__)

OnNonfinite = Literal["error", "skip"]

MAX_SKIPPED_IN_A_ROW = 10


class NonfiniteGuard:
    """Decides which optimizer steps to take and names the rows of those that it refuses.

    All ranks make the same decision, because they compare values that are reduced over all ranks. They exchange rows
    only for a refused step, so that rank 0 can name them.

    Args:
        on_nonfinite: ``error`` raises if a loss or gradient is not finite. ``skip`` skips the step, at most
            ``MAX_SKIPPED_IN_A_ROW`` times in a row.

    Attributes:
        num_skipped: Steps skipped in the run.
        num_skipped_in_a_row: Steps skipped since the last step that was taken.

    Raises:
        UserError: If ``on_nonfinite`` has another value.
    """

    def __init__(self, on_nonfinite: OnNonfinite = "error") -> None:
        if on_nonfinite not in get_args(OnNonfinite):
            choices = ", ".join(get_args(OnNonfinite))
            raise UserError(f"model.on_nonfinite must be one of {choices}, not '{on_nonfinite}'.")
        self.on_nonfinite = on_nonfinite
        self.num_skipped = 0
        self.num_skipped_in_a_row = 0

    def accepts_step(
        self,
        trainer: pl.Trainer,
        micro_batches: Sequence[MicroBatch],
        loss: float,
        gradient_norm: float,
        *,
        is_scaled: bool,
    ) -> bool:
        """Return whether to take the optimizer step; all ranks must call it.

        Args:
            trainer: The trainer of the run.
            micro_batches: Micro-batches of the step on this rank.
            loss: Mean loss of the step over all ranks.
            gradient_norm: Norm of the gradient of that mean.
            is_scaled: Whether gradients are scaled for float16. A gradient that is not finite then means that the scale
                was too large, so the step is skipped and no row is blamed.

        Raises:
            UserError: If a value is not finite and the step must not be skipped; the message names the rows.
        """
        if math.isfinite(loss) and math.isfinite(gradient_norm):
            self.num_skipped_in_a_row = 0
            return True
        quantity = "gradient" if math.isfinite(loss) else "loss"
        is_overflow = is_scaled and quantity == "gradient"
        rows = ", ".join(_find_rows(trainer, micro_batches))
        found = f"step {trainer.global_step}: the {quantity} is not finite in a batch of rows {rows}"
        if self.on_nonfinite == "error" and not is_overflow:
            raise UserError(
                f"{found}. Check these rows, lower model.learning_rate, set trainer.gradient_clip_val, or skip such "
                "steps with model.on_nonfinite=skip."
            )
        self.num_skipped += 1
        self.num_skipped_in_a_row += 1
        if not is_overflow and trainer.is_global_zero:
            logger.warning("%s; the step is skipped", found)
        if self.num_skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"{found}, and {MAX_SKIPPED_IN_A_ROW} steps in a row were skipped for this reason. "
                "Lower model.learning_rate, or set model.dtype=float32."
            )
        return False

    def check_validation(self, trainer: pl.Trainer, sources: list[str]) -> None:
        """Report validation rows whose loss is not finite; all ranks must call it.

        Args:
            trainer: The trainer of the run.
            sources: ``path:line`` of the rows on this rank in batches with a loss that is not finite.

        Raises:
            UserError: If there is such a row on any rank and ``on_nonfinite`` is ``error``.
        """
        rows = [row for rank_rows in gather_objects(trainer, sources) for row in rank_rows]
        if not rows:
            return
        found = f"step {trainer.global_step}: the validation loss is not finite in a batch of rows {', '.join(rows)}"
        if self.on_nonfinite == "error":
            raise UserError(
                f"{found}. If these rows look normal, training diverged before: lower model.learning_rate and resume "
                "from an earlier checkpoint. To skip such losses set model.on_nonfinite=skip."
            )
        if trainer.is_global_zero:
            logger.warning("%s; losses that are not finite are skipped", found)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, so that a resumed run continues them."""
        return {"num_skipped": self.num_skipped, "num_skipped_in_a_row": self.num_skipped_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.num_skipped, self.num_skipped_in_a_row = state["num_skipped"], state["num_skipped_in_a_row"]


def _find_rows(trainer: pl.Trainer, micro_batches: Sequence[MicroBatch]) -> list[str]:
    """Return the rows of micro-batches whose loss is not finite, else all rows of the step, from all ranks."""
    own = [(float(batch.loss_sum), batch.sources) for batch in micro_batches]
    losses = [batch for batches in gather_objects(trainer, own) for batch in batches]
    nonfinite = [row for loss, rows in losses if not math.isfinite(loss) for row in rows]
    return nonfinite or [row for _, rows in losses for row in rows]
