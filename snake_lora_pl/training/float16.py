"""Gradient scaling for float16, on hardware without bfloat16.

float16 represents gradients between 6e-8 and 65504. The scale adapts during training: it is halved when a gradient
overflows, and that step is skipped; it is doubled after 2000 steps without overflow
(https://docs.pytorch.org/docs/stable/amp.html#gradient-scaling).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from typing_extensions import override

from snake_lora_pl.errors import UserError
from snake_lora_pl.training.lightning_internals import unscale_before_step
from snake_lora_pl.training.sharding import FullyShardedStrategy

if TYPE_CHECKING:
    import lightning.pytorch as pl

# The usual 2**16 is meant for a mean; the loss here is a sum over about 2**10 target tokens.
_INITIAL_SCALE = 2.0**6


class ScaledFloat16(MixedPrecision):
    """Lightning's gradient scaling without its autocast: the module chooses what computes in float16.

    Args:
        device_type: Device type of the gradients, such as ``cuda``.
    """

    def __init__(self, device_type: str) -> None:
        scaler = torch.amp.GradScaler(device_type, init_scale=_INITIAL_SCALE)
        super().__init__("16-mixed", device_type, scaler)

    @override
    def connect(self, model: Any, optimizers: list[Any], lr_schedulers: list[Any]) -> tuple[Any, list[Any], list[Any]]:
        unscale_before_step(optimizers)
        return super().connect(model, optimizers, lr_schedulers)

    @override
    @contextlib.contextmanager
    def forward_context(self) -> Iterator[None]:
        """Enter no autocast; ``LoRALightningModule.compute_context`` does."""
        yield


def scale_gradients(trainer: pl.Trainer) -> None:
    """Make a trainer scale the gradients of a model that computes in float16.

    Raises:
        UserError: If the model is sharded: the ranks would have to agree on the scale.
    """
    if isinstance(trainer.strategy, FullyShardedStrategy):
        raise UserError(
            "model.dtype=float16 needs gradient scaling, which a sharded model (--config fsdp.yaml) does not support. "
            "Set model.dtype=bfloat16, or float32 if the hardware lacks bfloat16, or use --config ddp.yaml."
        )
    trainer.strategy.precision_plugin = ScaledFloat16(trainer.strategy.root_device.type)


def is_scaled(trainer: pl.Trainer) -> bool:
    """Return whether gradients are scaled in the backward pass."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None
