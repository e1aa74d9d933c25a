"""Norms of an adapter's weights and of their updates, by groups of layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from snake_lora_pl.training.lightning_internals import is_accumulating
from snake_lora_pl.training.sharding import local_parts, total_norm

_LAYER = re.compile(r"\.(\d+)\.")
_NUM_GROUPS = 4
_OTHERS = "outside_layers"


class AdapterNorms(Callback):
    """Logs ``adapter/weight_norm/GROUP`` and ``adapter/update_norm/GROUP``: Euclidean norms over all trained weights.

    There are up to four groups of adjacent layers, such as ``layers_00-07``. The update is the change of the weights
    in one optimizer step, with clipping, moments and learning rate applied.

    Args:
        every_n_steps: Steps between two measurements; the first step is measured.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = every_n_steps
        self._groups: dict[str, list[Tensor]] = {}
        self._before: dict[str, list[Tensor]] = {}

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trained = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        self._groups = group_by_layers(trained)
        self._before = {}

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._before = {name: [part.detach().clone() for part in weights] for name, weights in self._groups.items()}

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._before or is_accumulating(trainer):
            return
        norms = {}
        with torch.no_grad():
            for name, weights in self._groups.items():
                torch._foreach_sub_(local_parts(self._before[name]), local_parts(weights))
                norms[f"adapter/weight_norm/{name}"] = total_norm([weight.detach() for weight in weights])
                norms[f"adapter/update_norm/{name}"] = total_norm(self._before[name])
        self._before = {}
        # `self.log` would repeat the values at every step until the next measurement.
        metrics = dict(zip(norms, torch.stack(list(norms.values())).tolist(), strict=True))
        for run_logger in trainer.loggers:
            run_logger.log_metrics(metrics, step=trainer.global_step - 1)


def group_by_layers(weights: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """Divide weights into up to four groups of adjacent layers.

    Args:
        weights: Weights by name; the first number between dots is the index of the layer.

    Returns:
        Weights by group, such as ``layers_00-07``; weights without a layer under ``outside_layers``.
    """
    layers = {name: int(match[1]) for name in weights if (match := _LAYER.search(name))}
    indices = sorted(set(layers.values()))
    num_groups = min(_NUM_GROUPS, len(indices))
    groups: dict[str, list[Tensor]] = {}
    for index in range(num_groups):
        members = indices[index * len(indices) // num_groups : (index + 1) * len(indices) // num_groups]
        label = f"layers_{members[0]:02d}-{members[-1]:02d}" if len(members) > 1 else f"layer_{members[0]:02d}"
        groups[label] = [weight for name, weight in weights.items() if layers.get(name) in members]
    if others := [weight for name, weight in weights.items() if name not in layers]:
        groups[_OTHERS] = others
    return groups
