"""Warning about adapted layers that do not train."""

from __future__ import annotations

import logging
import re

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

logger = logging.getLogger(__name__)

# From the name of an adapter's parameter to the name of its layer.
_ADAPTER_PART = re.compile(r"\.(lora|miss|shira)_.*")


class UntrainedLayers(Callback):
    """Logs one warning after the first gradient that names all layers whose adapter got none.

    Such a layer is not called in the forward pass: its model uses the weight directly, or skips the layer for text.
    """

    def __init__(self) -> None:
        self._is_done = False

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._is_done:
            return
        has_gradient: dict[str, bool] = {}
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad:
                layer = _ADAPTER_PART.sub("", name)
                # One factor of an adapter starts at zero, so the other has no gradient in the first step.
                has_gradient[layer] = has_gradient.get(layer, False) or _has_gradient(parameter)
        if not any(has_gradient.values()):
            return  # a step without a target
        self._is_done = True
        untrained = [layer.removeprefix("model.base_model.model.") for layer, has in has_gradient.items() if not has]
        if untrained and trainer.is_global_zero:
            logger.warning(
                "%d of %d adapted layers got no gradient in the first step and do not train: %s. Remove them from "
                "model.lora.target_modules.",
                len(untrained),
                len(has_gradient),
                ", ".join(untrained),
            )


def _has_gradient(parameter: nn.Parameter) -> bool:
    gradient = parameter.grad
    # The values of a shard may all be zero where those of the whole gradient are not.
    return gradient is not None and (isinstance(gradient, DTensor) or bool(gradient.any()))
