"""Frozen linear layers on one input, with their LoRA factors, as one product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the common alias
from torch import Tensor, nn

from snake_lora_pl.training.fused.dropout import draw_mask


class LowRank(NamedTuple):
    """Intermediates of the LoRA part that the backward pass needs."""

    product: Tensor
    """The input after dropout times every A; shape (T, sum of ranks)."""
    kept: Tensor | None
    """Dropout mask of zeros and ones, shape (T, in_features), or None without dropout."""
    kept_scale: float
    """Factor for kept elements."""


class Projection:
    """One or more linear layers on one input, some of them with LoRA (https://arxiv.org/abs/2106.09685).

    The layers' weights become views of one tensor, so that the modules still work and no weight is stored twice. One
    dropout mask serves all layers: they read the same input, and each layer sees the same distribution of masks.

    Args:
        layers: ``nn.Linear`` modules, or PEFT's LoRA layers around them, with equal ``in_features``.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self._linears: list[nn.Linear] = [getattr(layer, "base_layer", layer) for layer in layers]
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self.in_features = self._linears[0].in_features
        self.out_features = sum(linear.out_features for linear in self._linears)
        # PEFT's layers and their columns of the output.
        self._lora: list[tuple[Any, slice]] = []
        start = 0
        for layer, linear in zip(layers, self._linears, strict=True):
            if hasattr(layer, "lora_A"):
                self._lora.append((layer, slice(start, start + linear.out_features)))
            start += linear.out_features

    @property
    def factors(self) -> list[Tensor]:
        """The trained parameters: A of every layer with LoRA, then B of every layer with LoRA."""
        named = [(layer, layer.active_adapters[0]) for layer, _ in self._lora]
        return [layer.lora_A[name].weight for layer, name in named] + [
            layer.lora_B[name].weight for layer, name in named
        ]

    @property
    def _dropout(self) -> float:
        if not self._lora:
            return 0.0
        layer, _ = self._lora[0]
        return float(getattr(layer.lora_dropout[layer.active_adapters[0]], "p", 0.0)) if layer.training else 0.0

    def base(self) -> tuple[Tensor, Tensor | None]:
        """Return the layers' weights as one tensor of shape (out_features, in_features), and their biases."""
        if len(self._linears) == 1:
            return self._linears[0].weight, self._linears[0].bias
        # Moving a module to another device gives each parameter its own storage again.
        if self._weight is None or any(not _share_storage(linear.weight, self._weight) for linear in self._linears):
            sizes = [linear.out_features for linear in self._linears]
            self._weight = torch.cat([linear.weight.data for linear in self._linears])
            for linear, part in zip(self._linears, self._weight.split(sizes), strict=True):
                linear.weight.data = part
            if any(linear.bias is not None for linear in self._linears):
                self._bias = torch.cat(
                    [
                        self._weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.data
                        for linear in self._linears
                    ]
                )
        return self._weight, self._bias

    def _base_product(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Return the output of the frozen layers, plus ``residual``; shape (T, out_features)."""
        weight, bias = self.base()
        if residual is None:
            return F.linear(x, weight, bias)
        return torch.addmm(residual if bias is None else residual + bias, x, weight.t())

    def _base_input_gradient(self, grad: Tensor) -> Tensor:
        """Return the part of the input's gradient that passes through the frozen layers; shape (T, in_features)."""
        weight, _ = self.base()
        return grad @ weight

    def forward(
        self, x: Tensor, factors: Sequence[Tensor], residual: Tensor | None = None
    ) -> tuple[Tensor, LowRank | None]:
        """Apply the layers.

        Args:
            x: Input of shape (T, in_features).
            factors: ``self.factors``.
            residual: Tensor of the output's shape that is added to the output.

        Returns:
            The output, (T, out_features), and the intermediates for ``backward``, or None without LoRA.
        """
        output = self._base_product(x, residual)
        if not factors:
            return output, None
        kept, kept_scale = None, 1.0
        if self._dropout:
            kept, kept_scale = draw_mask(x, self._dropout)
            x = x * kept
        low_rank = LowRank(F.linear(x, self._concat_a(factors, x.dtype)), kept, kept_scale)
        for product, columns, b, scale in self._split(low_rank, low_rank.product, factors):
            # Strided views: each layer's update goes directly into its columns.
            output[:, columns].addmm_(product, b.to(x.dtype).t(), alpha=scale)
        return output, low_rank

    def backward(
        self, grad: Tensor, x: Tensor | None, low_rank: LowRank | None, factors: Sequence[Tensor], *, needs_input: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Return the gradients of the input and of the factors.

        Args:
            grad: Gradient of the output, (T, out_features).
            x: Input, (T, in_features); unused without LoRA.
            low_rank: Second value that ``forward`` returned.
            factors: Factors given to ``forward``.
            needs_input: Whether to compute the gradient of the input.

        Returns:
            The gradient of the input, (T, in_features), or None; and the gradients of the factors.
        """
        grad_x = self._base_input_gradient(grad) if needs_input else None
        if low_rank is None or x is None:
            return grad_x, []
        grad_product = torch.empty_like(low_rank.product)  # (T, sum of ranks)
        grads_b = []
        for (product, columns, b, scale), (grad_part, *_) in zip(
            self._split(low_rank, low_rank.product, factors), self._split(low_rank, grad_product, factors), strict=True
        ):
            grad_columns = grad[:, columns]
            grads_b.append((grad_columns.t() @ product).to(b.dtype).mul_(scale))
            torch.mul(grad_columns @ b.to(grad.dtype), scale, out=grad_part)
        dropped = x if low_rank.kept is None else x * low_rank.kept
        grads_a = (grad_product.t() @ dropped).to(factors[0].dtype).split(self._ranks(factors))
        if grad_x is not None:
            a = self._concat_a(factors, grad.dtype)
            if low_rank.kept is None:
                grad_x.addmm_(grad_product, a)
            else:
                grad_x += (grad_product @ a).mul_(low_rank.kept)
        return grad_x, [*grads_a, *grads_b]

    def _ranks(self, factors: Sequence[Tensor]) -> list[int]:
        return [a.shape[0] for a in factors[: len(self._lora)]]

    def _concat_a(self, factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return every A as one tensor of shape (sum of ranks, in_features)."""
        return torch.cat([a.to(dtype) for a in factors[: len(self._lora)]])

    def _split(
        self, low_rank: LowRank, product: Tensor, factors: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, slice, Tensor, float]]:
        """Yield for each layer with LoRA: its part of ``product``, its columns of the output, B and the scale."""
        parts = product.split(self._ranks(factors), dim=-1)
        for (layer, columns), part, b in zip(self._lora, parts, factors[len(self._lora) :], strict=True):
            yield part, columns, b, float(layer.scaling[layer.active_adapters[0]]) * low_rank.kept_scale


def _share_storage(a: Tensor, b: Tensor) -> bool:
    # Not by data_ptr(), which fake tensors (used for the memory estimate) do not have.
    return a.untyped_storage() is b.untyped_storage()
