"""A name becomes a loaded base model and its tokenizer. Knows nothing of adapters or of data.

Importing this room is cheap: torch and transformers are imported by the functions that need them.
"""

from snake_lora_pl.models.base_model import (
    BaseModelSource,
    BaseModelSpec,
    load_base_model,
    load_tokenizer,
    prepare_base_model,
    resolve_base_model,
    stored_dtype,
)
from snake_lora_pl.models.dtype import DTYPES, choose_dtype
from snake_lora_pl.models.layers import repeated_layers
from snake_lora_pl.models.quantization import QuantizationConfig
from snake_lora_pl.models.wheel import WHEEL_MODELS

__all__ = [
    "DTYPES",
    "WHEEL_MODELS",
    "BaseModelSource",
    "BaseModelSpec",
    "QuantizationConfig",
    "choose_dtype",
    "load_base_model",
    "load_tokenizer",
    "prepare_base_model",
    "repeated_layers",
    "resolve_base_model",
    "stored_dtype",
]
