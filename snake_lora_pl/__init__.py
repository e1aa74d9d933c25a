"""LoRA fine-tuning of causal language models that learn Snake from written heuristics, evaluated by playing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snake_lora_pl.adapters.config import LoRAConfig
    from snake_lora_pl.adapters.factory import AdapterFactory
    from snake_lora_pl.api.training import TrainingResult, train_on_heuristic_data
    from snake_lora_pl.data.datamodule import SnakeJSONLDataModule
    from snake_lora_pl.evaluation.callbacks.play_evaluation import PlayEvaluation
    from snake_lora_pl.evaluation.settings import PlaySettings
    from snake_lora_pl.player import Player, load_player
    from snake_lora_pl.training.callbacks.adapter_checkpoint import AdapterCheckpoint
    from snake_lora_pl.training.module import LoRALightningModule

# Name -> module, imported on first access: importing the package must not import torch.
_EXPORTS = {
    "AdapterCheckpoint": "snake_lora_pl.training.callbacks.adapter_checkpoint",
    "AdapterFactory": "snake_lora_pl.adapters.factory",
    "LoRAConfig": "snake_lora_pl.adapters.config",
    "LoRALightningModule": "snake_lora_pl.training.module",
    "PlayEvaluation": "snake_lora_pl.evaluation.callbacks.play_evaluation",
    "PlaySettings": "snake_lora_pl.evaluation.settings",
    "Player": "snake_lora_pl.player",
    "SnakeJSONLDataModule": "snake_lora_pl.data.datamodule",
    "TrainingResult": "snake_lora_pl.api.training",
    "load_player": "snake_lora_pl.player",
    "train_on_heuristic_data": "snake_lora_pl.api.training",
}

__all__ = [
    "AdapterCheckpoint",
    "AdapterFactory",
    "LoRAConfig",
    "LoRALightningModule",
    "PlayEvaluation",
    "PlaySettings",
    "Player",
    "SnakeJSONLDataModule",
    "TrainingResult",
    "load_player",
    "train_on_heuristic_data",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'snake_lora_pl' has no attribute '{name}'")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
