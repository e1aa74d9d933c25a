"""Choice between float and int8 for products of the frozen base in training."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the common alias

from snake_lora_pl.training.fused.int8 import Int8Weight, largest_columns
from snake_lora_pl.training.torch_internals import has_vnni

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BaseCompute = Literal["auto", "float", "int8"]

MIN_SPEEDUP = 1.2
"""Measured speedup of a product from which ``auto`` chooses int8; the other parts of a step do not change."""
# Smaller layers spend more time on quantizing than on the product.
_MIN_HIDDEN_SIZE = 256
_NUM_TOKENS = 512
_NUM_REPEATS = 5


def int8_obstacle(device_type: str, dtype: torch.dtype) -> str | None:
    """Return why the base cannot be multiplied in int8, as a clause for messages, or None if it can.

    Args:
        device_type: Device that trains.
        dtype: Data type of the base.
    """
    if device_type != "cpu":
        return f"the device is {device_type}, not cpu"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"model.dtype is {str(dtype).removeprefix('torch.')}, not float32 or bfloat16"
    if not has_vnni():
        return "the processor has no AVX512-VNNI instructions"
    return None


def measure_speedup(config: PretrainedConfig, dtype: torch.dtype) -> float:
    """Return how much faster int8 is at the first MLP product of a model, quantization included; below a second.

    Args:
        config: The config of a Llama-like decoder.
        dtype: Data type of the base.

    Returns:
        Duration in ``dtype`` divided by the duration in int8; 0 for layers that are too small to gain.
    """
    if config.hidden_size < _MIN_HIDDEN_SIZE:
        return 0.0
    return _measure(config.hidden_size, 2 * config.intermediate_size, dtype)


@functools.cache
def _measure(in_features: int, out_features: int, dtype: torch.dtype) -> float:
    # The values have no influence on the speed.
    x = torch.full((_NUM_TOKENS, in_features), 0.5, dtype=dtype)
    weight = torch.full((out_features, in_features), 0.5, dtype=dtype)
    weight_int8 = Int8Weight(weight)
    durations: dict[str, list[float]] = {"float": [], "int8": []}
    for _ in range(1 + _NUM_REPEATS):  # interleaved, because the speed of a machine drifts; the first one warms up
        start = time.perf_counter()
        F.linear(x, weight)
        middle = time.perf_counter()
        weight_int8.multiply(x, largest_columns(x))
        durations["float"].append(middle - start)
        durations["int8"].append(time.perf_counter() - middle)
    return min(durations["float"][1:]) / min(durations["int8"][1:])
