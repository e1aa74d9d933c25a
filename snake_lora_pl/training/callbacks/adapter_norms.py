"""How large an adapter's weights are, and how far a step moves them, by groups of layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from snake_lora_pl.training.sharding import local_parts, total_norm

_LAYER = re.compile(r"\.(\d+)\.")
_NUM_GROUPS = 4
_OTHERS = "outside_layers"


class AdapterNorms(Callback):
    """Logs ``adapter/weight_norm/GROUP`` and ``adapter/update_norm/GROUP``, Euclidean norms over all trained weights.

    The layers make up to four groups of neighbors, such as ``layers_00-07``. The update is what one optimizer step
    changed, clipping, moments and learning rate included; a group that stands still while others move is seen at once.

    Args:
        every_n_steps: Steps from one measurement to the next; the first step is measured.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = every_n_steps
        self._groups: dict[str, list[Tensor]] = {}
        self._before: dict[str, list[Tensor]] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the groups."""
        trained = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        self._groups = group_by_layers(trained)
        self._before = {}

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep the weights of a step that is measured."""
        if trainer.global_step % self.every_n_steps == 0:
            self._before = {name: [part.detach().clone() for part in weights] for name, weights in self._groups.items()}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure, once the step is done."""
        if not self._before or trainer.fit_loop._should_accumulate():
            return
        figures = {}
        with torch.no_grad():
            for name, weights in self._groups.items():
                torch._foreach_sub_(local_parts(self._before[name]), local_parts(weights))
                figures[f"adapter/weight_norm/{name}"] = total_norm([weight.detach() for weight in weights])
                figures[f"adapter/update_norm/{name}"] = total_norm(self._before[name])
        self._before = {}
        # Not by `log`: Lightning would repeat the values at every step until the next measurement.
        values = {name: float(value) for name, value in figures.items()}
        for run_logger in trainer.loggers:
            run_logger.log_metrics(values, step=trainer.global_step - 1)


def group_by_layers(weights: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """Weights in up to four groups of neighboring layers.

    Args:
        weights: By their names, of which the first number between dots is that of the layer.

    Returns:
        The weights of each group, such as ``layers_00-07``; those of no layer under ``outside_layers``.
    """
    layers = {name: int(match[1]) for name in weights if (match := _LAYER.search(name))}
    numbers = sorted(set(layers.values()))
    num_groups = min(_NUM_GROUPS, len(numbers))
    groups: dict[str, list[Tensor]] = {}
    for index in range(num_groups):
        own = numbers[index * len(numbers) // num_groups : (index + 1) * len(numbers) // num_groups]
        label = f"layers_{own[0]:02d}-{own[-1]:02d}" if len(own) > 1 else f"layer_{own[0]:02d}"
        groups[label] = [weight for name, weight in weights.items() if layers.get(name) in own]
    if others := [weight for name, weight in weights.items() if name not in layers]:
        groups[_OTHERS] = others
    return groups
