"""Frozen linear layers that read the same input, and the LoRA factors on them, as one product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from snake_lora_pl.training.fused.dropout import draw_kept


class LowRank(NamedTuple):
    """What the backward pass needs of a projection's LoRA part.

    Args:
        product: The dropped-out input times every A; shape (T, sum of ranks).
        kept: The dropout mask, zeros and ones of shape (T, in_features), or None without dropout.
        kept_scale: Factor of the kept elements.
    """

    product: Tensor
    kept: Tensor | None
    kept_scale: float


class Projection:
    """One or more linear layers on one input, some of which carry LoRA.

    The layers' weights become views of one tensor, so that the modules work on as they were and nothing is held twice.
    One dropout mask serves all layers: they read the same input, and each layer sees the same distribution of masks.

    Args:
        layers: ``nn.Linear``, or PEFT's LoRA layer around one, with equal ``in_features``.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self._linears: list[nn.Linear] = [getattr(layer, "base_layer", layer) for layer in layers]
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self.in_features = self._linears[0].in_features
        self.out_features = sum(linear.out_features for linear in self._linears)
        # PEFT's layer and the columns of the output that are its own.
        self._lora: list[tuple[Any, slice]] = []
        start = 0
        for layer, linear in zip(layers, self._linears, strict=True):
            if hasattr(layer, "lora_A"):
                self._lora.append((layer, slice(start, start + linear.out_features)))
            start += linear.out_features

    @property
    def factors(self) -> list[Tensor]:
        """The trained parameters: A of every layer with LoRA, then B of every one."""
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

    def _base(self) -> tuple[Tensor, Tensor | None]:
        """The layers' weights as one tensor of shape (out_features, in_features), and their biases."""
        if len(self._linears) == 1:
            return self._linears[0].weight, self._linears[0].bias
        # Moving a module to another device gives every parameter a storage of its own again.
        if self._weight is None or any(not _share_storage(linear.weight, self._weight) for linear in self._linears):
            sizes = [linear.out_features for linear in self._linears]
            self._weight = torch.cat([linear.weight.data for linear in self._linears])
            for linear, part in zip(self._linears, self._weight.split(sizes), strict=True):
                linear.weight.data = part
            if any(linear.bias is not None for linear in self._linears):
                parts = [self._weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.data
                         for linear in self._linears]  # fmt: skip
                self._bias = torch.cat(parts)
        return self._weight, self._bias

    def forward(
        self, x: Tensor, factors: Sequence[Tensor], residual: Tensor | None = None
    ) -> tuple[Tensor, LowRank | None]:
        """Apply the layers.

        Args:
            x: Shape (T, in_features).
            factors: As ``self.factors``.
            residual: Added to the output; of the output's shape.

        Returns:
            The output, (T, out_features), and what ``backward`` needs of the LoRA part, None without LoRA.
        """
        weight, bias = self._base()
        if residual is None:
            output = F.linear(x, weight, bias)
        else:
            output = torch.addmm(residual if bias is None else residual + bias, x, weight.t())
        if not factors:
            return output, None
        kept, kept_scale = None, 1.0
        if self._dropout:
            kept, kept_scale = draw_kept(x, self._dropout)
            x = x * kept
        low = LowRank(F.linear(x, self._down(factors, x.dtype)), kept, kept_scale)
        for part, columns, up, scale in self._parts(low, low.product, factors):
            # Strided views: each layer's update goes straight into its columns.
            output[:, columns].addmm_(part, up.to(x.dtype).t(), alpha=scale)
        return output, low

    def backward(
        self, grad: Tensor, x: Tensor | None, low: LowRank | None, factors: Sequence[Tensor], *, needs_input: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Gradients of the input, (T, in_features), and of the factors.

        Args:
            grad: That of the output, (T, out_features).
            x: The input, (T, in_features); not read without LoRA.
            low: As ``forward`` returned it.
            factors: As given to ``forward``.
            needs_input: Whether the input's gradient is asked for; None is returned for it otherwise.
        """
        weight, _ = self._base()
        grad_x = grad @ weight if needs_input else None
        if low is None or x is None:
            return grad_x, []
        grad_low = torch.empty_like(low.product)
        grads_up = []
        for (part, columns, up, scale), (grad_part, *_) in zip(
            self._parts(low, low.product, factors), self._parts(low, grad_low, factors), strict=True
        ):
            grad_columns = grad[:, columns]
            grads_up.append((grad_columns.t() @ part).to(up.dtype).mul_(scale))
            torch.mul(grad_columns @ up.to(grad.dtype), scale, out=grad_part)
        dropped = x if low.kept is None else x * low.kept
        grads_down = (grad_low.t() @ dropped).to(factors[0].dtype).split([a.shape[0] for a in self._downs(factors)])
        if grad_x is not None:
            down = self._down(factors, grad.dtype)
            if low.kept is None:
                grad_x.addmm_(grad_low, down)
            else:
                grad_x += (grad_low @ down).mul_(low.kept)
        return grad_x, [*grads_down, *grads_up]

    def _downs(self, factors: Sequence[Tensor]) -> Sequence[Tensor]:
        return factors[: len(self._lora)]

    def _down(self, factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return torch.cat([a.to(dtype) for a in self._downs(factors)])

    def _parts(
        self, low: LowRank, product: Tensor, factors: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, slice, Tensor, float]]:
        """Of each layer with LoRA: its columns of ``product``, its columns of the output, B and the scale."""
        ranks = [a.shape[0] for a in self._downs(factors)]
        ups = factors[len(self._lora) :]
        for (layer, columns), part, up in zip(self._lora, product.split(ranks, dim=-1), ups, strict=True):
            yield part, columns, up, float(layer.scaling[layer.active_adapters[0]]) * low.kept_scale


def _share_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata
