"""Exchange of Python objects between ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar, cast

import torch

if TYPE_CHECKING:
    import lightning.pytorch as pl

T = TypeVar("T")


def gather_objects(trainer: pl.Trainer, value: T) -> list[T]:
    """Return the value of every rank, in the order of ranks, on all ranks; all ranks must call it.

    Args:
        trainer: The trainer of the run.
        value: This rank's value; it must be picklable.
    """
    if trainer.world_size == 1:
        return [value]
    gathered: list[T | None] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, value)
    return cast("list[T]", gathered)
