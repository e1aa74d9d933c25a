"""Private and untyped parts of torch that training uses, each with the reason; private names have a test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


def softmax_backward(grad: Tensor, probabilities: Tensor) -> Tensor:
    """Return the gradient of the scores of a softmax over the last dimension.

    Args:
        grad: Gradient of the probabilities.
        probabilities: Output of the softmax, of the same shape.

    The written-out formula, ``p * (g - (g * p).sum(-1))``, makes three passes over memory instead of one.
    https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/native_functions.yaml
    """
    return torch._softmax_backward_data(grad, probabilities, -1, probabilities.dtype)


def has_forward_hooks(module: nn.Module) -> bool:
    """Return whether a hook runs before or after a module's forward pass.

    ``nn.Module`` registers hooks publicly but does not list them.
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/module.py
    """
    return bool(module._forward_hooks or module._forward_pre_hooks)


class Function(torch.autograd.Function):
    """``torch.autograd.Function`` with a typed ``apply``."""

    if TYPE_CHECKING:

        @classmethod
        def apply(cls, *args: Any, **kwargs: Any) -> Tensor: ...  # noqa: D102


def pack_int8(weight: Tensor) -> Tensor:
    """Return an int8 weight of shape (out_features, in_features) in the layout that ``int8_product`` reads.

    https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/quantized/cpu/qlinear_prepack.cpp
    """
    if isinstance(weight, FakeTensor):  # the operator has no implementation for them
        return weight.t()
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
    return packed


def int8_product(x: Tensor, packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply quantized activations by a weight of ``pack_int8`` with oneDNN.

    ``torch._int_mm``, the other product of integers, packs the weight again for each product and returns int32, which
    takes as long as the product. Activations are unsigned, because on CPUs without AMX oneDNN multiplies signed ones
    with its reference implementation, 10,000 times as slowly.
    https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/quantized/cpu/qlinear.cpp

    Args:
        x: uint8 of shape (T, in_features) that represents ``x - 128``.
        packed: The weight, packed.
        scales: Scale of each output, float32 of shape (out_features,).
        dtype: Data type of the output.

    Returns:
        Shape (T, out_features).
    """
    zero_points = torch.zeros(scales.shape, dtype=torch.int64)
    output: Tensor = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 128, packed, scales, zero_points, None, 1.0, 0, dtype, "none", [], ""
    )
    return output


def has_vnni() -> bool:
    """Return whether the CPU multiplies 8-bit integers with AVX-512 (AVX512-VNNI), and torch has oneDNN to do so.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/cpu/__init__.py
    """
    onednn: Any = torch.backends.mkldnn
    return bool(onednn.is_available() and torch.cpu._is_vnni_supported())
