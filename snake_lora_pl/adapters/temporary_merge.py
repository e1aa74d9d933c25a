"""Temporary merging of adapters; the base weights are restored bit for bit."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from snake_lora_pl.adapters.peft_internals import is_adapter_layer


@contextlib.contextmanager
def temporarily_merged(model: nn.Module) -> Iterator[int]:
    """Merge the active adapters into copies of the base weights inside the context.

    A merged layer computes one matrix product instead of three. PEFT's ``unmerge`` subtracts what ``merge`` added,
    which does not restore the weights exactly in bfloat16; here the original weights are kept and put back.

    Layers are not merged if their adapter is disabled, or if their weights are quantized (merging would quantize them
    again), shared with another layer, or sharded over processes.

    Args:
        model: A PEFT model; in any other model, nothing is merged.

    Yields:
        The number of merged layers. Each takes memory for a second copy of its weights.
    """
    owners = Counter(id(p) for part in model.modules() for p in part.parameters(recurse=False))
    with contextlib.ExitStack() as stack:
        layers = [layer for layer in model.modules() if is_adapter_layer(layer) and _can_merge(layer, owners)]
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
