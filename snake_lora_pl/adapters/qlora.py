"""QLoRA (https://arxiv.org/abs/2305.14314): LoRA on a base with linear layers quantized to 4 or 8 bits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from snake_lora_pl.adapters.adapter_type import AdapterType
from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.adapters.lora import build_lora
from snake_lora_pl.errors import UserError
from snake_lora_pl.models.quantization import (
    QuantizationConfig,
    compute_dtype,
    full_weight_bytes,
    quantization_of,
    weight_bytes,
)

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from snake_lora_pl.models.base_model import BaseModelSpec

logger = logging.getLogger(__name__)


def build_qlora(base_model: PreTrainedModel, config: LoRAConfig) -> PeftModel:
    """Add LoRA to a quantized base.

    Raises:
        UserError: If the base is not quantized.
    """
    quantization = quantization_of(base_model)
    if quantization is None:
        raise UserError(
            "model.adapter_type=qlora requires a quantized base: pass its name, or load it with "
            "load_base_model(NAME, quantization=QuantizationConfig())."
        )
    prepare_quantized_base(base_model, quantization)
    return build_lora(base_model, config)


def prepare_quantized_base(base_model: PreTrainedModel, quantization: QuantizationConfig) -> None:
    """Freeze a quantized base, cast its other weights to float32, and log its memory.

    An adapter reproduces the logits of its training only on a base that was prepared like this.
    """
    from peft import prepare_model_for_kbit_training

    dtype = compute_dtype(base_model)
    # Gradient checkpointing is enabled by the training module.
    prepare_model_for_kbit_training(base_model, use_gradient_checkpointing=False)
    logger.info(
        "%d-bit base: %.0f MiB including embeddings and norms in float32 (%.0f MiB in %s)",
        quantization.bits,
        weight_bytes(base_model) / 2**20,
        full_weight_bytes(base_model, dtype) / 2**20,
        str(dtype).removeprefix("torch."),
    )


def dequantize_base(base_model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Replace a quantized base by an unquantized one that computes the same function.

    The weights are the dequantized values, not the original weights. An adapter that was trained on the quantized base
    can be merged into the result; merged into the quantized base, it would be lost in rounding.

    Args:
        base_model: A base model without adapters, as returned by ``load_base_model``; changed in place.
        dtype: Dtype of the weights; float32 if None.

    Returns:
        The dequantized model, or ``base_model`` if it is not quantized.
    """
    import torch

    if quantization_of(base_model) is None:
        return base_model
    dtype = torch.float32 if dtype is None else dtype
    # dequantize() casts quantized layers only, but all layers must have the same dtype.
    return base_model.dequantize(dtype=dtype).to(dtype)


class QLoRA(AdapterType):
    """LoRA on a base that is quantized while it loads."""

    ignored_settings = ("adalora",)

    def __init__(self) -> None:
        super().__init__(build_qlora)

    @override
    def load_base(self, base_model: BaseModelSpec | str, config: LoRAConfig, **load_options: Any) -> PreTrainedModel:
        return super().load_base(base_model, config, quantization=config.quantization, **load_options)

    @override
    def optimizer_class(self, parameters: Sequence[torch.nn.Parameter]) -> tuple[type[Any], dict[str, Any]]:
        """Return an AdamW whose state is paged to CPU memory on a GPU, else torch's AdamW."""
        from torch.distributed.tensor import DTensor

        # The kernels of bitsandbytes require whole tensors on a GPU.
        if all(p.is_cuda and not isinstance(p, DTensor) for p in parameters):
            from bitsandbytes.optim import PagedAdamW32bit

            return PagedAdamW32bit, {}
        return super().optimizer_class(parameters)
