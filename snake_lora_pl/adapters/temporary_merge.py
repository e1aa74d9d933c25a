"""An adapter merged into its base for a while, and the base back to the last bit."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def temporarily_merged(model: nn.Module) -> Iterator[int]:
    """Merge the active adapters into copies of the base's weights while the context lasts.

    A merged layer is one matrix product in place of three. PEFT's own way back subtracts what it added, which in
    bfloat16 does not give the weights that were there; here they are put aside and put back.

    Some layers compute as before: those whose adapter is switched off, whose weights are quantized (merging would
    quantize anew), shared with another layer (which has no adapter on it) or spread over processes.

    Args:
        model: A PEFT model, or any other: then nothing is merged.

    Yields:
        How many layers were merged. They take memory for a second copy of their weights.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    owners = Counter(id(p) for part in model.modules() for p in part.parameters(recurse=False))
    with contextlib.ExitStack() as stack:
        layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer) and _can_merge(layer, owners)]
        for layer in layers:
            stack.enter_context(_merged_layer(layer))
        yield len(layers)


def _can_merge(layer: Any, owners: Counter[int]) -> bool:
    weight = getattr(layer.get_base_layer(), "weight", None)
    return bool(
        hasattr(layer, "merge")
        and not layer.disable_adapters
        and not layer.merged
        and type(weight) is nn.Parameter
        and type(weight.data) is Tensor
        and weight.is_floating_point()
        and owners[id(weight)] == 1
    )


@contextlib.contextmanager
def _merged_layer(layer: Any) -> Iterator[None]:
    base = layer.get_base_layer()
    parameters = list(base.parameters(recurse=False))
    originals = [parameter.data for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.data = parameter.data.clone()
        layer.merge()
    try:
        yield
    finally:
        layer.merged_adapters.clear()
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.data = original
