"""MiSS (https://arxiv.org/abs/2409.15371): shards of the base weight share one trained matrix.

The input is cut into parts of ``rank`` features, which are summed and multiplied by one matrix of shape (rank,
out_features). There is no second factor, and no scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from snake_lora_pl.adapters.adapter_type import LORA_ONLY_SETTINGS, AdapterType
from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.adapters.targets import add_adapter, check_are_linear, resolve_target_modules, selected_layers
from snake_lora_pl.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def build_miss(base_model: PreTrainedModel, config: LoRAConfig) -> PeftModel:
    """Add MiSS to a base model; its matrices are zero, so logits are unchanged at first.

    Raises:
        UserError: If a selected layer is not linear, or has fewer input features than the rank.
    """
    from peft import MissConfig

    targets = resolve_target_modules(base_model, config.target_modules, config.layers)
    layers = selected_layers(base_model, targets)
    check_are_linear("miss", layers)
    for name, layer in layers.items():
        if config.rank > layer.in_features:
            raise UserError(
                f"model.lora.rank: {config.rank} exceeds the {layer.in_features} input features of {name}. Lower it, "
                "or select other layers with model.lora.target_modules."
            )
    peft_config = MissConfig(r=config.rank, miss_dropout=config.dropout, target_modules=targets, task_type="CAUSAL_LM")
    return add_adapter(base_model, peft_config)


class MiSS(AdapterType):
    """One trained matrix per adapted layer, shared by all shards of its weight."""

    ignored_settings = LORA_ONLY_SETTINGS
    peft_setting_types: ClassVar[Mapping[str, Any]] = {**AdapterType.peft_setting_types, "peft_type": Literal["MISS"]}
    card_settings: ClassVar[Mapping[str, str]] = {"r": "rank", "miss_dropout": "dropout"}

    def __init__(self) -> None:
        super().__init__(build_miss)
