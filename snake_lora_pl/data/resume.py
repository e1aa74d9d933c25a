"""Exact resume: restore the data position of a checkpoint, and warn if the rows come in another order."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, cast

import lightning

from snake_lora_pl.data.samplers import LengthGroupedSampler

logger = logging.getLogger(__name__)


def restore_data_position(sampler: LengthGroupedSampler, trainer: lightning.Trainer) -> None:
    """Move the sampler to the first batch that has not been trained on.

    Lightning's loop counts the batches trained on, and its counters are part of every checkpoint. They do not include
    prefetched batches, they are correct in every hook that may write a checkpoint, and their total is correct even if
    ``max_steps`` ended an epoch early, which Lightning counts as a whole epoch.
    """
    progress = cast(Any, trainer.fit_loop.epoch_loop.batch_progress.total)
    epoch, batch = divmod(progress.processed, int(trainer.num_training_batches))
    sampler.seek(epoch, batch)


def warn_if_order_changed(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Warn if a resumed run trains on other rows, or in another order, than the run that wrote the checkpoint.

    Args:
        saved: State of the data module in the checkpoint.
        current: Its state now.
    """
    changed = [
        f"{name} was {saved.get(name)!r}, is {current.get(name)!r}"
        for name in dict.fromkeys([*saved, *current])
        # The order depends on the global batch, not on the share of one rank.
        if name != "batch_size" and saved.get(name) != current.get(name)
    ]
    if changed:
        logger.warning("the rows or their order differ from those of the uninterrupted run: %s", "; ".join(changed))
