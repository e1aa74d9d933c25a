"""Pieces of a decoder layer, each with a backward pass of its own that keeps and computes only what LoRA needs.

Autograd, given the layer as it is usually written, keeps every intermediate, computes in many small passes over memory
and, with LoRA, draws a dropout mask and multiplies matrices for q, k and v one by one although they read the same
input. Here projections of one input are one product, and what is cheap is computed again instead of kept (as Unsloth
and Liger Kernel do on GPUs, https://github.com/unslothai/unsloth, https://arxiv.org/abs/2410.10989).

The base is frozen: gradients are computed for hidden states and LoRA factors only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

from snake_lora_pl.training.fused.projection import LowRank, Projection


class NormProjection(torch.autograd.Function):
    """``projection(rms_norm(x))``; keeps x (which the residual stream keeps anyway) and computes the norm again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor, eps: float, projection: Projection, *factors: Tensor
    ) -> Tensor:
        """Map x, (T, hidden_size), to (T, projection.out_features); factors as ``projection.factors``."""
        normed, inverse_rms = _rms_norm(x, norm_weight, eps)
        output, low = projection.forward(normed, factors)
        ctx.projection = projection
        _save(ctx, [x, norm_weight, inverse_rms], low, factors)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        """Gradients of x and of the factors."""
        (x, norm_weight, inverse_rms), low, factors = _saved(ctx)
        normed = _scale_rows(x, inverse_rms).mul_(norm_weight) if factors else None
        grad_normed, grad_factors = ctx.projection.backward(
            grad_outputs[0], normed, low, factors, needs_input=ctx.needs_input_grad[0]
        )
        grad_x = None if grad_normed is None else _rms_norm_backward(grad_normed, x, norm_weight, inverse_rms)
        return grad_x, None, None, None, *grad_factors


class ProjectionResidual(torch.autograd.Function):
    """``residual + projection(x)``; keeps x only where it meets LoRA."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, projection: Projection, *factors: Tensor) -> Tensor:
        """Map x, (T, projection.in_features), to the residual's shape, (T, projection.out_features)."""
        output, low = projection.forward(x, factors, residual)
        ctx.projection = projection
        _save(ctx, [x] if factors else [], low, factors)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        """Gradients of x, of the residual and of the factors."""
        inputs, low, factors = _saved(ctx)
        grad_x, grad_factors = ctx.projection.backward(
            grad_outputs[0], inputs[0] if inputs else None, low, factors, needs_input=ctx.needs_input_grad[0]
        )
        return grad_x, grad_outputs[0], None, *grad_factors


class SwiGLU(torch.autograd.Function):
    """``silu(gate) * up`` of a tensor that holds gate and up side by side."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        """Args: gate_up (T, 2 * intermediate_size). Returns (T, intermediate_size)."""
        gate, up = gate_up.chunk(2, dim=-1)
        ctx.save_for_backward(gate_up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        """The gradient of gate_up."""
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad = torch.empty_like(gate_up)
        grad_gate, grad_up = grad.chunk(2, dim=-1)
        torch.mul(grad_outputs[0], F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_outputs[0] * up, gate, grad_input=grad_gate)
        return grad


def _save(ctx: Any, inputs: Sequence[Tensor], low: LowRank | None, factors: Sequence[Tensor]) -> None:
    kept_scale = low.kept_scale if low is not None else 1.0
    low_tensors = [] if low is None else [t for t in (low.product, low.kept) if t is not None]
    ctx.layout = len(inputs), len(low_tensors), kept_scale
    ctx.save_for_backward(*inputs, *low_tensors, *factors)


def _saved(ctx: Any) -> tuple[Sequence[Tensor], LowRank | None, Sequence[Tensor]]:
    num_inputs, num_low, kept_scale = ctx.layout
    saved = ctx.saved_tensors
    inputs, low, factors = saved[:num_inputs], saved[num_inputs : num_inputs + num_low], saved[num_inputs + num_low :]
    if not low:
        return inputs, None, factors
    return inputs, LowRank(low[0], low[1] if num_low == 2 else None, kept_scale), factors


def _scale_rows(x: Tensor, inverse_rms: Tensor) -> Tensor:
    return (x * inverse_rms).to(x.dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As Llama's: the statistic in float32, the product with the weight in x's type."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    inverse_rms = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # (T, 1)
    return _scale_rows(x, inverse_rms).mul_(weight), inverse_rms


def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor) -> Tensor:
    # With g = grad * weight: inverse_rms * g - x * inverse_rms**3 * mean(g * x), in float32.
    scaled, x_float = grad.mul_(weight).float(), x.float()
    mean = torch.linalg.vecdot(scaled, x_float).unsqueeze(-1).div_(x.shape[-1])
    return scaled.mul_(inverse_rms).addcmul_(x_float, mean.mul_(inverse_rms.pow(3)), value=-1).to(x.dtype)
