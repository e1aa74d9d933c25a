"""Private and untyped parts of torch that training uses, each with the reason; private names have a test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn


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
