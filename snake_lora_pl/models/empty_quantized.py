"""Quantized layers as far as their memory goes: what they store, and what they hold while they compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from snake_lora_pl.models.quantization import QuantizationConfig

# As bitsandbytes has them: a scale for each block of weights and, quantized twice, one for each block of scales.
_BLOCK_WEIGHTS = 64
_BLOCK_SCALES = 256


def replace_linear_layers(model: Any, quantization: QuantizationConfig) -> None:
    """Put a stand-in for each layer that bitsandbytes would quantize: every linear one but the output head.

    Args:
        model: A causal language model on the meta device.
        quantization: How it would be quantized.
    """
    head = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and layer is not head:
            parent, _, own_name = name.rpartition(".")
            setattr(model.get_submodule(parent), own_name, EmptyQuantizedLinear(layer, quantization))


class EmptyQuantizedLinear(nn.Linear):
    """A linear layer that stores its weight in a few bits and computes with a whole copy that lives for the moment.

    Args:
        layer: The layer it stands for; its weight's type is the one that is computed in.
        quantization: How the weight is stored.
    """

    def __init__(self, layer: nn.Linear, quantization: QuantizationConfig) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.compute_dtype = layer.weight.dtype
        num_bytes = _num_bytes(layer.weight.numel(), layer.out_features, quantization)
        self.weight = nn.Parameter(torch.empty(num_bytes, dtype=torch.uint8, device="meta"), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute as bitsandbytes does, in its own type."""
        shape = (self.out_features, self.in_features)
        out = _Product.apply(x.to(self.compute_dtype), self.weight, shape, self.bias)
        return out.to(x.dtype)


def _num_bytes(num_weights: int, out_features: int, quantization: QuantizationConfig) -> int:
    """What a quantized weight takes, its scales and tables of levels included."""
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
