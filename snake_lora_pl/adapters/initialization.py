"""Adapters that start from the base's own weights (PiSSA, OLoRA) and leave those weights alone.

Both methods start at ``B0 A0``, a part of the weight ``W``, and train ``W' = (W - s B0 A0) + s B A``. PEFT writes the
first term into the base, after which no other copy of the base fits the adapter, and switching the adapter off no
longer gives the base model. Here the base stays as it is and each layer subtracts ``s B0 A0 x`` from its output: the
same function. On disk the two products are one plain LoRA of twice the rank, ``[B, -B0] [A; A0]``, which loads on
the unchanged base everywhere.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from snake_lora_pl.errors import UserError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor

ADAPTER_NAME = "default"
"""The name that PEFT gives an adapter."""


def start_from_base(model: PeftModel, method: str) -> None:
    """Set a fresh adapter to a part of the base's weights.

    Args:
        model: A PEFT model with a LoRA adapter that has not been trained.
        method: ``pissa`` (the largest singular values, https://arxiv.org/abs/2404.02948), ``pissa_niter_N`` (the same,
            by a randomized decomposition with N iterations: faster) or ``olora`` (the first columns of a QR
            decomposition, https://arxiv.org/abs/2406.01775).

    Raises:
        UserError: If the rank exceeds what a layer's weight has.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        rank, largest = layer.r[ADAPTER_NAME], min(layer.in_features, layer.out_features)
        if rank > largest:
            raise UserError(
                f"model.lora.init_lora_weights={method}: rank {rank} is more than the {largest} that {name} has. "
                "Lower model.lora.rank, or set it for this layer in model.lora.rank_pattern."
            )
        with _plain_weight(layer):
            if method == "olora":
                layer.olora_init(ADAPTER_NAME)
            else:
                layer.pissa_init(ADAPTER_NAME, method)
        for factor, module in (("initial_A", layer.lora_A), ("initial_B", layer.lora_B)):
            weight = module[ADAPTER_NAME].weight
            weight.data = weight.data.contiguous()
            layer.register_buffer(factor, weight.detach().clone())
        layer.register_forward_hook(_subtract_initial_product)


def as_plain_lora(model: PeftModel, weights: dict[str, Tensor]) -> tuple[PeftConfig, dict[str, Tensor]]:
    """An adapter in the form that fits the unchanged base; one that did not start from the base is in it already.

    Args:
        model: The PEFT model.
        weights: Its weights by the names of ``model.state_dict()``.

    Returns:
        The PEFT config and the weights, of twice the rank where the adapter started from the base.
    """
    import torch

    config = model.peft_config[ADAPTER_NAME]
    started: list[tuple[str, Any]] = [
        (n, module) for n, module in model.named_modules() if hasattr(module, "initial_A")
    ]
    if not started:
        return config, weights
    weights = {key: value for key, value in weights.items() if not key.endswith((".initial_A", ".initial_B"))}
    for name, layer in started:
        a, b = f"{name}.lora_A.{ADAPTER_NAME}.weight", f"{name}.lora_B.{ADAPTER_NAME}.weight"
        weights[a] = torch.cat([weights[a], layer.initial_A.to(weights[a])], dim=0)
        weights[b] = torch.cat([weights[b], -layer.initial_B.to(weights[b])], dim=1)
    config = copy.deepcopy(config)
    # The scale is alpha / rank, or alpha / sqrt(rank) for rsLoRA: it must not change.
    alpha_factor = 2**0.5 if config.use_rslora else 2
    config.r *= 2
    config.lora_alpha *= alpha_factor
    config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
    config.alpha_pattern = {key: alpha_factor * alpha for key, alpha in config.alpha_pattern.items()}
    return config, weights


@contextlib.contextmanager
def _plain_weight(layer: Any) -> Iterator[None]:
    """Let PEFT work on a copy of the layer's weight: float32, (out, in), whatever the base stores."""
    import torch
    from peft.utils.integrations import dequantize_module_weight
    from torch import nn

    base_layer, fan_in_fan_out = layer.base_layer, layer.fan_in_fan_out
    with torch.no_grad():
        weight = dequantize_module_weight(base_layer).detach().to(torch.float32, copy=True)
        copied = nn.Linear(1, 1, bias=False, device="meta")  # draws no random numbers; an empty one would warn
        copied.weight = nn.Parameter(weight.T.contiguous() if fan_in_fan_out else weight)
        try:
            layer.base_layer, layer.fan_in_fan_out = copied, False
            yield
        finally:
            layer.base_layer, layer.fan_in_fan_out = base_layer, fan_in_fan_out


def _subtract_initial_product(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    from torch.nn import functional

    if layer.disable_adapters or ADAPTER_NAME not in layer.active_adapters:
        return output
    hidden = functional.linear(inputs[0].to(layer.initial_A.dtype), layer.initial_A)
    product = functional.linear(hidden, layer.initial_B) * layer.scaling[ADAPTER_NAME]
    return output - product.to(output.dtype)
