"""float16 on hardware that lacks bfloat16: gradients are scaled so that small ones do not vanish.

float16 ends where a gradient is below 6e-8 or above 65504. The scale is found while training: it falls by half where a
gradient overflows, and that step is left out; it doubles after 2000 steps without one
(https://docs.pytorch.org/docs/stable/amp.html#gradient-scaling).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from snake_lora_pl.errors import UserError
from snake_lora_pl.training.sharding import FullyShardedStrategy

if TYPE_CHECKING:
    import lightning.pytorch as pl

# The usual 2**16 is meant for a mean; the loss here is a sum over some 2**10 target tokens.
_INITIAL_SCALE = 2.0**6


class ScaledFloat16(MixedPrecision):
    """Lightning's gradient scaling without its autocast: the module says itself what computes in float16.

    Args:
        device_type: Where gradients are, e.g. ``cuda``.
    """

    def __init__(self, device_type: str) -> None:
        scaler = torch.amp.GradScaler(device_type, init_scale=_INITIAL_SCALE)
        super().__init__("16-mixed", device_type, scaler)

    def connect(self, model: Any, optimizers: list[Any], lr_schedulers: list[Any]) -> tuple[Any, list[Any], list[Any]]:
        """Have gradients unscaled before anything looks at them, also those of a fused optimizer.

        Such an optimizer can unscale for itself while it steps, and Lightning leaves it to it: too late for a norm and
        for clipping, which Lightning therefore refuses.
        """
        for optimizer in optimizers:
            optimizer._step_supports_amp_scaling = False
        return super().connect(model, optimizers, lr_schedulers)

    @contextlib.contextmanager
    def forward_context(self) -> Iterator[None]:
        """Nothing: ``LoRALightningModule.compute_context`` casts."""
        yield


def scale_gradients(trainer: pl.Trainer) -> None:
    """Let a trainer scale the gradients of a model that computes in float16.

    Raises:
        UserError: If it cuts the model into slices, whose processes would have to agree on the scale.
    """
    if isinstance(trainer.strategy, FullyShardedStrategy):
        raise UserError(
            "model.dtype=float16 cannot be scaled in slices (--config fsdp.yaml). Use model.dtype=bfloat16, or float32 "
            "where the hardware lacks it, or --config ddp.yaml."
        )
    trainer.strategy.precision_plugin = ScaledFloat16(trainer.strategy.root_device.type)


def is_scaled(trainer: pl.Trainer) -> bool:
    """Whether gradients are scaled in the backward pass."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None
