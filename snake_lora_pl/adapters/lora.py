"""LoRA with all options that PEFT offers for it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from snake_lora_pl.adapters.adapter_type import AdapterType
from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.adapters.initialization import start_from_base
from snake_lora_pl.adapters.targets import add_adapter, check_layer_patterns, resolve_target_modules

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def build_lora(base_model: PreTrainedModel, config: LoRAConfig) -> PeftModel:
    """Add LoRA (https://arxiv.org/abs/2106.09685) to a base model of any precision; logits are unchanged at first.

    Raises:
        UserError: If a setting names a layer that does not exist, or does not fit the base.
    """
    from peft import LoraConfig

    targets = resolve_target_modules(base_model, config.target_modules, config.layers)
    peft_config = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=True if config.starts_from_base else config.init_lora_weights,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*_pattern keys did not match.*")  # check_layer_patterns raises instead
        model = add_adapter(base_model, peft_config)
    check_layer_patterns(model, "rank_pattern", config.rank_pattern)
    check_layer_patterns(model, "alpha_pattern", config.alpha_pattern)
    if config.starts_from_base:
        start_from_base(model, str(config.init_lora_weights))
    return model


class LoRA(AdapterType):
    """Two low-rank factors per adapted layer of a frozen base."""

    ignored_settings = ("quantization", "adalora")

    def __init__(self) -> None:
        super().__init__(build_lora)
