"""What the processes of a run tell each other beside tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import lightning.pytorch as pl


def gather_objects(trainer: pl.Trainer, value: Any) -> list[Any]:
    """What each process gave, in the order of their ranks; every process has to ask, and every one is told."""
    if trainer.world_size == 1:
        return [value]
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, value)
    return gathered
