"""QLoRA (https://arxiv.org/abs/2305.14314): LoRA on a base whose linear layers are stored in 4 or 8 bits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from snake_lora_pl.adapters.adapter_type import AdapterType
from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.adapters.lora import build_lora
from snake_lora_pl.errors import UserError
from snake_lora_pl.models.quantization import compute_dtype, full_weight_bytes, quantization_of, weight_bytes

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from snake_lora_pl.models.base_model import BaseModelSpec

logger = logging.getLogger(__name__)


def build_qlora(base_model: PreTrainedModel, config: LoRAConfig) -> PeftModel:
    """LoRA on a quantized base.

    Raises:
        UserError: If the base is not quantized.
    """
    if quantization_of(base_model) is None:
        raise UserError(
            "model.adapter_type=qlora needs a quantized base: give its name, or load it by "
            "load_base_model(NAME, quantization=QuantizationConfig())."
        )
    prepare_quantized_base(base_model)
    return build_lora(base_model, config)


def prepare_quantized_base(base_model: PreTrainedModel) -> None:
    """Freeze a quantized base, bring what is not quantized to float32, and log its memory.

    An adapter gives the logits it was trained with only on a base that was prepared like this.
    """
    from peft import prepare_model_for_kbit_training

    quantization = quantization_of(base_model)
    assert quantization is not None
    dtype = compute_dtype(base_model)
    # Gradient checkpointing is the trainer's to choose.
    prepare_model_for_kbit_training(base_model, use_gradient_checkpointing=False)
    logger.info(
        "Base model in %d bits: %.0f MiB, embeddings and norms in float32 included; in %s it takes %.0f MiB",
        quantization.bits,
        weight_bytes(base_model) / 2**20,
        str(dtype).removeprefix("torch."),
        full_weight_bytes(base_model, dtype) / 2**20,
    )


def dequantize_base(base_model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Turn a quantized base, without an adapter on it, into a plain one that computes the same function.

    The weights are those that the 4 or 8 bits stand for, not those that were quantized. An adapter that was trained
    on the quantized base can be merged into this one; merged into the quantized base it would drown in rounding.

    Args:
        base_model: A base model as ``load_base_model`` returns it; changed in place.
        dtype: Type of the weights; float32 if None.

    Returns:
        The model; one that is not quantized is returned as it is.
    """
    import torch

    if quantization_of(base_model) is None:
        return base_model
    dtype = torch.float32 if dtype is None else dtype
    # What is not quantized keeps its type otherwise, and layers of two types do not fit together.
    return base_model.dequantize(dtype=dtype).to(dtype)


class QLoRA(AdapterType):
    """LoRA whose base is quantized while it loads."""

    ignored_settings = ("adalora",)

    def __init__(self) -> None:
        super().__init__(build_qlora)

    def load_base(self, base_model: BaseModelSpec | str, config: LoRAConfig, **load_options: Any) -> PreTrainedModel:
        """Load the base model in the bits that the config says."""
        return super().load_base(base_model, config, quantization=config.quantization, **load_options)

    def optimizer_class(self, parameters: Sequence[torch.nn.Parameter]) -> tuple[type[Any], dict]:
        """AdamW whose state may be paged out to the CPU's memory where a GPU's runs short; elsewhere torch's."""
        from torch.distributed.tensor import DTensor

        # bitsandbytes' kernels take whole tensors on a GPU, no shards.
        if all(p.is_cuda and not isinstance(p, DTensor) for p in parameters):
            from bitsandbytes.optim import PagedAdamW32bit

            return PagedAdamW32bit, {}
        return super().optimizer_class(parameters)
