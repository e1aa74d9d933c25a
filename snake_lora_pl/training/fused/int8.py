"""Products of frozen layers in 8-bit integers, for CPUs that multiply these faster than floats.

The scheme is SwitchBack's (https://arxiv.org/abs/2304.13013): a scale for each token of the activations, and for each
channel of the weights that the product does not sum over. LoRA and its gradients stay in float. The weights are frozen,
so they are quantized once: one copy for the output, one for the gradient of the input, a byte for each weight and copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snake_lora_pl.training.fused.projection import Projection
from snake_lora_pl.training.torch_internals import int8_product, pack_int8

# Elements that are quantized at a time by one thread: their float32 copy stays in its cache between the passes.
_CHUNK_ELEMENTS = 2**17
# Smaller rows are zero.
_SMALLEST_AMPLITUDE = 1e-30
# Input columns that are multiplied in float, and rows that they are chosen by.
_FLOAT_COLUMNS = 32
_SAMPLED_ROWS = 64


class Int8Weight:
    """Weight of shape (out_features, in_features) in int8, with a scale for each output."""

    def __init__(self, weight: Tensor) -> None:
        amplitudes = weight.abs().amax(dim=1, keepdim=True).float().clamp_min_(_SMALLEST_AMPLITUDE)
        self._packed = pack_int8((weight * (127 / amplitudes)).round_().to(torch.int8).contiguous())
        self._scales = (amplitudes / 127).squeeze(1)

    def multiply(self, x: Tensor, skipped_columns: Tensor | None = None) -> Tensor:
        """Return ``x @ weight.t()`` for x of shape (T, in_features), as if ``skipped_columns`` of x were zero."""
        quantized, scales = quantize_rows(x, skipped_columns)
        return int8_product(quantized, self._packed, self._scales, x.dtype).mul_(scales)


def quantize_rows(x: Tensor, skipped_columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round each row to 255 evenly spaced values.

    Args:
        x: Shape (T, features).
        skipped_columns: Indices of columns that become zero.

    Returns:
        Values from 1 to 255, uint8 of shape (T, features), and scales of x's data type, (T, 1); a row of x is about
        ``(value - 128) * scale``.
    """
    quantized = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scales = x.new_empty(len(x), 1)
    num_rows = max(1, torch.get_num_threads() * _CHUNK_ELEMENTS // x.shape[1])
    buffer = torch.empty(min(num_rows, len(x)), x.shape[1], device=x.device)
    for part, output, scale in zip(x.split(num_rows), quantized.split(num_rows), scales.split(num_rows), strict=True):
        part_float, scaled = part.float(), buffer[: len(part)]
        torch.abs(part_float, out=scaled)
        if skipped_columns is not None:
            scaled.index_fill_(1, skipped_columns, 0)
        scale.copy_(scaled.amax(dim=1, keepdim=True).clamp_min_(_SMALLEST_AMPLITUDE).div_(127))
        torch.mul(part_float, scale.float().reciprocal(), out=scaled)
        if skipped_columns is not None:
            scaled.index_fill_(1, skipped_columns, 0)
        # The conversion truncates, and truncation of a positive number plus a half rounds it.
        output.copy_(scaled.add_(128.5))
    return quantized, scales


def largest_columns(x: Tensor) -> Tensor:
    """Return the indices of the columns with the largest elements, judged by a sample of the rows.

    A few channels of a language model's activations are up to a hundred times larger than the others
    (https://arxiv.org/abs/2208.07339), and would leave few of a row's 255 values to the others.
    """
    sample = x[:: max(1, len(x) // _SAMPLED_ROWS)]
    return sample.abs().amax(dim=0).topk(min(_FLOAT_COLUMNS, x.shape[1] // 8)).indices


class Int8Projection(Projection):
    """``Projection`` whose frozen layers are multiplied in int8.

    Args:
        float_projection: Projection of the same layers, which holds their weights.
        needs_input_gradient: Whether ``backward`` will be asked for the gradient of the input.
    """

    def __init__(self, float_projection: Projection, *, needs_input_gradient: bool) -> None:
        super().__init__(float_projection.layers)
        self._float_projection = float_projection
        weight, _ = float_projection.base()
        self._weight_int8 = Int8Weight(weight)
        self._transposed_int8 = Int8Weight(weight.t()) if needs_input_gradient else None

    def _base_product(self, x: Tensor, residual: Tensor | None) -> Tensor:
        columns = largest_columns(x)
        output = self._weight_int8.multiply(x, columns)
        weight, bias = self._float_projection.base()
        output.addmm_(x.index_select(1, columns), weight.index_select(1, columns).t())
        for term in (bias, residual):
            if term is not None:
                output += term
        return output

    def _base_input_gradient(self, grad: Tensor) -> Tensor:
        assert self._transposed_int8 is not None
        return self._transposed_int8.multiply(grad)
