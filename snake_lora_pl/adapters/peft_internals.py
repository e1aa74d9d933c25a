"""Names of PEFT that its documentation does not list.

No other module of this package uses such a name. Each function links the upstream source and has a test that fails when
the name is gone or behaves differently.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


def is_adapter_layer(module: nn.Module) -> bool:
    """Return whether a module is a base layer with an adapter on it.

    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/tuners_utils.py (``BaseTunerLayer``)
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def matches_layer_pattern(key: str, layer_name: str) -> bool:
    """Return whether a key of ``rank_pattern`` or ``alpha_pattern`` applies to a layer.

    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/other.py (``get_pattern_key``)
    """
    from peft.utils.other import get_pattern_key

    # It returns the layer's own name if no key matches.
    return key == layer_name or bool(get_pattern_key([key], layer_name) != layer_name)


def default_target_modules(model_type: str) -> list[str] | None:
    """Return the names in PEFT's default LoRA targets for an architecture; None if it has none, or a pattern.

    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/constants.py
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
    return list(targets) if isinstance(targets, list) else None


def dequantized_weight(base_layer: nn.Module) -> torch.Tensor:
    """Return a layer's weight, dequantized if it is quantized.

    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/integrations.py (``dequantize_module_weight``)
    """
    from peft.utils.integrations import dequantize_module_weight

    weight: torch.Tensor = dequantize_module_weight(base_layer)
    return weight


def initialize_from_base(layer: Any, method: str, adapter_name: str) -> None:
    """Initialize a LoRA layer from its base weight with PEFT's PiSSA or OLoRA.

    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/layer.py (``pissa_init``, ``olora_init``)
    """
    if method == "olora":
        layer.olora_init(adapter_name)
    else:
        layer.pissa_init(adapter_name, method)
