"""Base models and their tokenizers, loaded by name. Knows nothing of adapters or data.

Importing this package is cheap: its functions import torch and transformers when they need them.
"""

from snake_lora_pl.models.base_model import (
    BaseModelSource,
    BaseModelSpec,
    load_base_model,
    load_tokenizer,
    prepare_base_model,
    resolve_base_model,
)
from snake_lora_pl.models.dtype import DTYPES, choose_dtype
from snake_lora_pl.models.model_files import stored_dtype
from snake_lora_pl.models.quantization import QuantizationConfig
from snake_lora_pl.models.transformers_internals import repeated_layers
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
