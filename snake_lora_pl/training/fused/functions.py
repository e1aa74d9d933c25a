"""Parts of a decoder layer as autograd functions that keep and compute only what LoRA needs.

In a layer of separate operations autograd keeps every intermediate and makes many small passes over memory. With LoRA
it also draws a dropout mask and multiplies matrices separately for q, k and v although they read the same input.
Here projections of one input are one product, and cheap results are recomputed instead of kept, as Unsloth
(https://github.com/unslothai/unsloth) and Liger Kernel (https://arxiv.org/abs/2410.10989) do on GPUs.

The base is frozen: there are gradients for hidden states and LoRA factors only. T is the number of packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the common alias
from torch import Tensor

from snake_lora_pl.training.fused.projection import LowRank, Projection
from snake_lora_pl.training.torch_internals import Function


class NormProjection(Function):
    """``projection(rms_norm(x))``; keeps x, which the residual stream keeps anyway, and recomputes the norm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor, eps: float, projection: Projection, *factors: Tensor
    ) -> Tensor:
        """Map x of shape (T, hidden_size) to (T, projection.out_features); ``factors`` are ``projection.factors``."""
        normed, inverse_rms = _rms_norm(x, norm_weight, eps)
        output, low_rank = projection.forward(normed, factors)
        ctx.projection = projection
        _save(ctx, [x, norm_weight, inverse_rms], low_rank, factors)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        """Return the gradients of x and of the factors."""
        (x, norm_weight, inverse_rms), low_rank, factors = _load(ctx)
        normed = _scale_rows(x, inverse_rms).mul_(norm_weight) if factors else None
        grad_normed, grad_factors = ctx.projection.backward(
            grad_outputs[0], normed, low_rank, factors, needs_input=ctx.needs_input_grad[0]
        )
        grad_x = None if grad_normed is None else _rms_norm_backward(grad_normed, x, norm_weight, inverse_rms)
        return grad_x, None, None, None, *grad_factors


class ProjectionResidual(Function):
    """``residual + projection(x)``; keeps x only if the projection has LoRA."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, projection: Projection, *factors: Tensor) -> Tensor:
        """Map x of shape (T, projection.in_features) to (T, projection.out_features), the shape of ``residual``."""
        output, low_rank = projection.forward(x, factors, residual)
        ctx.projection = projection
        _save(ctx, [x] if factors else [], low_rank, factors)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        """Return the gradients of x, of the residual and of the factors."""
        inputs, low_rank, factors = _load(ctx)
        grad_x, grad_factors = ctx.projection.backward(
            grad_outputs[0], inputs[0] if inputs else None, low_rank, factors, needs_input=ctx.needs_input_grad[0]
        )
        return grad_x, grad_outputs[0], None, *grad_factors


class SwiGLU(Function):
    """``silu(gate) * up`` of a tensor that holds gate and up side by side (https://arxiv.org/abs/2002.05202)."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        """Map ``gate_up`` of shape (T, 2 * intermediate_size) to (T, intermediate_size)."""
        gate, up = gate_up.chunk(2, dim=-1)
        ctx.save_for_backward(gate_up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        """Return the gradient of ``gate_up``."""
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad = torch.empty_like(gate_up)
        grad_gate, grad_up = grad.chunk(2, dim=-1)
        torch.mul(grad_outputs[0], F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_outputs[0] * up, gate, grad_input=grad_gate)
        return grad


def _save(ctx: Any, inputs: Sequence[Tensor], low_rank: LowRank | None, factors: Sequence[Tensor]) -> None:
    kept_scale = low_rank.kept_scale if low_rank is not None else 1.0
    low_rank_tensors = [] if low_rank is None else [t for t in (low_rank.product, low_rank.kept) if t is not None]
    ctx.layout = len(inputs), len(low_rank_tensors), kept_scale
    ctx.save_for_backward(*inputs, *low_rank_tensors, *factors)


def _load(ctx: Any) -> tuple[Sequence[Tensor], LowRank | None, Sequence[Tensor]]:
    num_inputs, num_low_rank, kept_scale = ctx.layout
    saved = ctx.saved_tensors
    inputs, low_rank = saved[:num_inputs], saved[num_inputs : num_inputs + num_low_rank]
    factors = saved[num_inputs + num_low_rank :]
    if not low_rank:
        return inputs, None, factors
    return inputs, LowRank(low_rank[0], low_rank[1] if num_low_rank == 2 else None, kept_scale), factors


def _scale_rows(x: Tensor, inverse_rms: Tensor) -> Tensor:
    return (x * inverse_rms).to(x.dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the RMS norm of x (https://arxiv.org/abs/1910.07467) and its inverse root mean squares, (T, 1).

    As in transformers' Llama the statistic is float32 and the product with the weight has the data type of x.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    inverse_rms = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # (T, 1)
    return _scale_rows(x, inverse_rms).mul_(weight), inverse_rms


def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor) -> Tensor:
    # With g = grad * weight: inverse_rms * g - x * inverse_rms**3 * mean(g * x), in float32.
    scaled, x_float = grad.mul_(weight).float(), x.float()  # (T, hidden_size)
    mean = torch.linalg.vecdot(scaled, x_float).unsqueeze(-1).div_(x.shape[-1])  # (T, 1)
    return scaled.mul_(inverse_rms).addcmul_(x_float, mean.mul_(inverse_rms.pow(3)), value=-1).to(x.dtype)
