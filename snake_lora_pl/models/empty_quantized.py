"""Weightless stand-ins for quantized layers, with the same memory: for estimates of memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from snake_lora_pl.models.quantization import QuantizationConfig

# Block sizes of bitsandbytes: one scale per block of weights and, with double quantization, one per block of scales.
_BLOCK_WEIGHTS = 64
_BLOCK_SCALES = 256


def replace_linear_layers(model: Any, quantization: QuantizationConfig) -> None:
    """Replace the layers that bitsandbytes would quantize: all linear layers except the output head.

    Args:
        model: A causal language model on the meta device.
        quantization: The quantization to imitate.
    """
    from transformers.pytorch_utils import Conv1D

    lm_head = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if type(layer) in (nn.Linear, Conv1D) and layer is not lm_head:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, EmptyQuantizedLinear(layer, quantization))


class EmptyQuantizedLinear(nn.Linear):
    """A linear layer that stores a packed weight and computes with a temporary full copy of it.

    Args:
        layer: The layer to replace, linear or ``Conv1D``; it computes in the dtype of its weight.
        quantization: Quantization of the weight.
    """

    def __init__(self, layer: Any, quantization: QuantizationConfig) -> None:
        out_features, in_features = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.shape[::-1]
        super().__init__(in_features, out_features, bias=layer.bias is not None, device="meta")
        self.compute_dtype = layer.weight.dtype
        num_bytes = _num_bytes(layer.weight.numel(), out_features, quantization)
        self.weight = nn.Parameter(torch.empty(num_bytes, dtype=torch.uint8, device="meta"), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute in ``compute_dtype`` and return the dtype of the input, as bitsandbytes does."""
        shape = (self.out_features, self.in_features)
        product: Any = _Product.apply
        out: Tensor = product(x.to(self.compute_dtype), self.weight, shape, self.bias)
        return out.to(x.dtype)


def _num_bytes(num_weights: int, out_features: int, quantization: QuantizationConfig) -> int:
    """Return the memory of a quantized weight in bytes, including scales and lookup tables."""
    if quantization.bits == 8:
        return num_weights + 4 * out_features
    num_scales = -(-num_weights // _BLOCK_WEIGHTS)
    scales = num_scales + 4 * -(-num_scales // _BLOCK_SCALES) + 4 * 256 if quantization.double_quant else 4 * num_scales
    return -(-num_weights // 2) + scales + 4 * 16


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape, ctx.dtype = shape, x.dtype
        return nn.functional.linear(x, packed.new_empty(shape, dtype=x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (packed,) = ctx.saved_tensors
        return grad_outputs[0].to(ctx.dtype) @ packed.new_empty(ctx.shape, dtype=ctx.dtype), None, None, None
