"""Adapters that are initialized from the base weights (PiSSA, OLoRA) without changing the base.

Both methods initialize the factors to ``B0 A0``, a part of the weight ``W``, and train
``W' = (W - s B0 A0) + s B A``. PEFT writes ``W - s B0 A0`` into the base; then the adapter fits no other copy of the
base, and disabling it does not restore the base model. Here the base is unchanged and each layer subtracts
``s B0 A0 x`` from its output, which is the same function. On disk, the two products are one plain LoRA of twice the
rank, ``[B, -B0] [A; A0]``, which loads on the unchanged base.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from snake_lora_pl.adapters.peft_internals import dequantized_weight, initialize_from_base
from snake_lora_pl.errors import UserError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor

ADAPTER_NAME = "default"
"""PEFT's default name of an adapter."""


def start_from_base(model: PeftModel, method: str) -> None:
    """Initialize a fresh adapter from the base weights.

    Args:
        model: A PEFT model with an untrained LoRA adapter.
        method: ``pissa`` (largest singular values, https://arxiv.org/abs/2404.02948), ``pissa_niter_N`` (by a faster
            randomized decomposition with N iterations) or ``olora`` (first columns of a QR decomposition,
            https://arxiv.org/abs/2406.01775).

    Raises:
        UserError: If the rank exceeds that of a layer's weight.
    """
    from peft.tuners.lora import LoraLayer, ParamWrapper

    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if isinstance(layer, ParamWrapper):
            raise UserError(
                f"model.lora.init_lora_weights={method}: not supported for expert weights ({name}). Set "
                "model.lora.init_lora_weights=true, or select other layers with model.lora.target_modules."
            )
        rank, max_rank = layer.r[ADAPTER_NAME], min(layer.in_features, layer.out_features)
        if rank > max_rank:
            raise UserError(
                f"model.lora.init_lora_weights={method}: rank {rank} exceeds {max_rank}, the maximum of {name}. "
                "Lower model.lora.rank, or set it for this layer in model.lora.rank_pattern."
            )
        with _plain_weight(layer):
            initialize_from_base(layer, method, ADAPTER_NAME)
        for factor, module in (("initial_A", layer.lora_A), ("initial_B", layer.lora_B)):
            weight = module[ADAPTER_NAME].weight
            weight.data = weight.data.contiguous()
            layer.register_buffer(factor, weight.detach().clone())
        layer.register_forward_hook(_subtract_initial_product)


def as_plain_lora(model: PeftModel, weights: dict[str, Tensor]) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Return an adapter in the form for the unchanged base; only one initialized from the base changes.

    Args:
        model: The PEFT model.
        weights: Its weights by name in ``model.state_dict()``.

    Returns:
        The PEFT config and the weights, at twice the rank if the adapter was initialized from the base.
    """
    import torch

    config = model.peft_config[ADAPTER_NAME]
    layers: list[tuple[str, Any]] = [(n, module) for n, module in model.named_modules() if hasattr(module, "initial_A")]
    if not layers:
        return config, weights
    weights = {key: value for key, value in weights.items() if not key.endswith((".initial_A", ".initial_B"))}
    for name, layer in layers:
        a, b = f"{name}.lora_A.{ADAPTER_NAME}.weight", f"{name}.lora_B.{ADAPTER_NAME}.weight"
        weights[a] = torch.cat([weights[a], layer.initial_A.to(weights[a])], dim=0)  # (2 * rank, in_features)
        weights[b] = torch.cat([weights[b], -layer.initial_B.to(weights[b])], dim=1)  # (out_features, 2 * rank)
    config = copy.deepcopy(config)
    # The scale, alpha / rank or alpha / sqrt(rank) for rsLoRA, must not change.
    alpha_factor = 2**0.5 if config.use_rslora else 2
    config.r *= 2
    config.lora_alpha *= alpha_factor
    config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
    config.alpha_pattern = {key: alpha_factor * alpha for key, alpha in config.alpha_pattern.items()}
    return config, weights


@contextlib.contextmanager
def _plain_weight(layer: Any) -> Iterator[None]:
    """Replace a layer's weight temporarily by a float32 copy of shape (out_features, in_features)."""
    import torch
    from torch import nn

    base_layer, fan_in_fan_out = layer.base_layer, layer.fan_in_fan_out
    with torch.no_grad():
        weight = dequantized_weight(base_layer).detach().to(torch.float32, copy=True)
        # Size 1 on the meta device: draws no random numbers, and an empty layer would warn.
        copied = nn.Linear(1, 1, bias=False, device="meta")
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
    hidden = functional.linear(inputs[0].to(layer.initial_A.dtype), layer.initial_A)  # (..., rank)
    product: Tensor = functional.linear(hidden, layer.initial_B) * layer.scaling[ADAPTER_NAME]
    return output - product.to(output.dtype)
