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
    dequantize,
    full_weight_bytes,
    make_trainable,
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
    if quantization_of(base_model) is None:
        raise UserError(
            "model.adapter_type=qlora requires a quantized base: pass its name, or load it with "
            "load_base_model(NAME, quantization=QuantizationConfig())."
        )
    return build_lora(base_model, config)


def prepare_quantized_base(base_model: PreTrainedModel, quantization: QuantizationConfig) -> None:
    """Freeze a quantized base, cast its other weights to float32 except for experts, and log its memory.

    An adapter reproduces the logits of its training only on a base that was prepared like this.
    """
    import torch
    from bitsandbytes.nn import Params4bit

    dtype = compute_dtype(base_model)
    full_bytes = full_weight_bytes(base_model, dtype)
    make_trainable(base_model)
    expert_bytes = 0
    for module in base_model.modules():
        is_expert = _holds_stacked_weights(module)
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
            if is_expert:
                expert_bytes += parameter.nbytes
            elif parameter.dtype in (torch.float16, torch.bfloat16) and not isinstance(parameter, Params4bit):
                parameter.data = parameter.data.float()
        if is_expert:
            module.register_forward_pre_hook(_cast_inputs)
    num_bytes = weight_bytes(base_model)
    experts = f", and {expert_bytes / 2**20:.0f} MiB of unquantized expert weights" if expert_bytes else ""
    logger.log(
        logging.INFO if num_bytes < full_bytes else logging.WARNING,
        "%d-bit base: %.0f MiB including embeddings and norms in float32%s (%.0f MiB unquantized in %s)",
        quantization.bits,
        num_bytes / 2**20,
        experts,
        full_bytes / 2**20,
        str(dtype).removeprefix("torch."),
    )


def _holds_stacked_weights(module: torch.nn.Module) -> bool:
    """Return whether a module has one tensor for the weights of several layers, as mixtures of experts do."""
    from torch import nn

    is_convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return not is_convolution and any(p.ndim == 3 and len(p) > 1 for p in module.parameters(recurse=False))


def _cast_inputs(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast inputs to the dtype of the module's weights; the layers around it return float32."""
    from torch import Tensor

    dtype = next(module.parameters(recurse=False)).dtype
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


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
    return dequantize(base_model, torch.float32 if dtype is None else dtype)


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
