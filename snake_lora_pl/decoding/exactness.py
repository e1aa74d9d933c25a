"""Comparison of a fast way of decoding with the plain one: in float32, at lengths where the model may differ.

Architectures differ in how they treat masks, positions and padding. Errors of a wrong window or a wrong state can be as
small as the rounding errors of bfloat16, so the comparison is made with weights in float32.
"""

from __future__ import annotations

import contextlib
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from snake_lora_pl.decoding.transformers_internals import attention_implementation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Config keys of numbers of tokens beyond which attention or positions change: sliding, local and chunked attention, and
# positions that are scaled beyond the length of pretraining.
_LENGTH_KEY = re.compile(r"window|chunk|local_attention|original_max_position|block_size")

# Mean error of centered logits, in their standard deviations. Errors of float32 are 1e-6 to 1e-4.
_TOLERANCE = 1e-3
# Where weights cannot be converted: the error of bfloat16 is about 0.01, that of wrong attention about 1.
_TOLERANCE_ROUNDED = 0.1

_PROBE_MARGIN = 16

# Weights converted at a time: 1 GiB in float32.
_MAX_CONVERTED = 2**28

# By base model, then by what may change while it is loaded.
_VERDICTS: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], dict[int, bool]]] = WeakKeyDictionary()

UNSUPPORTED_ERRORS = (RuntimeError, TypeError, ValueError)
"""Errors of architectures on masks, positions, caches and batches that they do not expect."""
MACHINE_ERRORS = (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
"""Errors with another cause, some of them subclasses of those above."""


class Exactness:
    """Remembers whether a way of decoding is exact, for each range of lengths in which a model acts alike.

    The results are shared by all decoders of a base model. Its weights are frozen, and adapters and their merged
    weights act on each token by itself, so they change neither masks and positions nor the use of a cache.

    Args:
        model: The model, with an adapter or without.
        way: Name of the way of decoding.
        probe: Returns whether it is exact for a text.
    """

    def __init__(self, model: PreTrainedModel, way: str, probe: Callable[[list[int]], bool]) -> None:
        base: PreTrainedModel = getattr(model, "get_base_model", lambda: model)()
        self._lengths = sorted(set(_critical_lengths(base.config.to_dict())))
        self._probe = probe
        # Adapters of another type may act on the whole text.
        adapter_types = frozenset(str(config.peft_type) for config in getattr(model, "peft_config", {}).values())
        key = (way, adapter_types, base.device, base.dtype, attention_implementation(base))
        self._verdicts = _VERDICTS.setdefault(base, {}).setdefault(key, {})

    def holds(self, prompt: list[int], num_new: int) -> bool:
        """Return whether the way of decoding is exact for texts up to a length.

        Args:
            prompt: The longest prompt.
            num_new: Maximum number of tokens that follow it.
        """
        max_length = len(prompt) + num_new
        num_passed = bisect_left(self._lengths, max_length)
        if num_passed not in self._verdicts:
            length = len(prompt)
            if num_passed:
                # Well beyond the critical length, but not longer than texts can become.
                critical = self._lengths[num_passed - 1]
                length = max(length, min(max_length, critical + critical // 4 + _PROBE_MARGIN))
            self._verdicts[num_passed] = self._probe((prompt * (length // len(prompt) + 1))[:length])
        return self._verdicts[num_passed]


def _critical_lengths(config: Any) -> Iterator[int]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _critical_lengths(value)
        elif type(value) is int and value > 1 and _LENGTH_KEY.search(key):
            yield value


def logits_agree(logits: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Return whether logits of shape (..., vocab) differ by rounding errors only; NaN do not agree.

    An offset common to all logits of a position changes no choice.
    """
    error = logits.float() - expected.float()
    error -= error.mean(dim=-1, keepdim=True)
    return bool(error.abs().mean() <= tolerance * expected.float().std(dim=-1).mean())


class Precision(NamedTuple):
    """Precision of a comparison.

    Attributes:
        dtype: Data type of hidden states.
        tolerance: Argument of ``logits_agree``.
    """

    dtype: torch.dtype
    tolerance: float


@contextlib.contextmanager
def float32_weights(model: PreTrainedModel) -> Iterator[Precision]:
    """Compute in float32 in the block, with at most 1 GiB of converted weights at a time.

    Weights that are quantized to 8 bits or sharded over processes are not converted.
    """
    settle_weights(model)
    if not all(map(_can_convert, model.modules())):
        yield Precision(model.dtype, _TOLERANCE_ROUNDED)
        return
    matmul_precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with contextlib.ExitStack() as stack, torch.autocast(model.device.type, enabled=False):
            if _num_parameters(model) <= _MAX_CONVERTED:
                stack.enter_context(_converted(list(model.modules())))
            else:
                for part, modules in _parts(model):
                    _convert_in_forward(part, modules, stack)
            yield Precision(torch.float32, _TOLERANCE)
    finally:
        torch.set_float32_matmul_precision(matmul_precision)


def settle_weights(model: PreTrainedModel) -> None:
    """Run a pass over one token, because RWKV scales its weights in its first pass in another mode.

    Weights that are replaced temporarily after that are put back as they are.
    """
    model(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=model.device), use_cache=False)


def _can_convert(module: nn.Module) -> bool:
    # Layers of 4-bit weights dequantize them to their ``compute_dtype``.
    return all(
        type(parameter.data) is Tensor and (parameter.is_floating_point() or hasattr(module, "compute_dtype"))
        for parameter in module.parameters(recurse=False)
    )


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _parts(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Divide a model into modules that are called, each with the modules to convert while it runs."""
    is_list = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    if is_list or (_num_parameters(module) > _MAX_CONVERTED and any(True for _ in module.children())):
        yield module, [module]
        for child in module.children():
            yield from _parts(child)
    else:
        yield module, list(module.modules())


def _convert_in_forward(part: nn.Module, modules: list[nn.Module], stack: contextlib.ExitStack) -> None:
    """Convert modules whenever a part of the model runs, until the stack is closed."""
    running: list[contextlib.ExitStack] = []

    def enter(*_: Any) -> None:
        running.append(contextlib.ExitStack())
        running[-1].enter_context(_converted(modules))

    def leave(*_: Any) -> None:
        running.pop().close()

    for handle in (part.register_forward_pre_hook(enter), part.register_forward_hook(leave, always_call=True)):
        stack.callback(handle.remove)


@contextlib.contextmanager
def _converted(modules: list[nn.Module]) -> Iterator[None]:
    """Replace the values of parameters and buffers by copies in float32 in the block."""
    tensors = {
        id(tensor): tensor
        for module in modules
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if tensor.is_floating_point() and tensor.dtype != torch.float32
    }
    values = [(tensor, tensor.data) for tensor in tensors.values()]
    quantized: list[Any] = [module for module in modules if hasattr(module, "compute_dtype")]
    compute_dtypes = [module.compute_dtype for module in quantized]
    try:
        for tensor, value in values:
            tensor.data = value.float()
        for module in quantized:
            module.compute_dtype = torch.float32
        yield
    finally:
        for tensor, value in values:
            tensor.data = value
        for module, dtype in zip(quantized, compute_dtypes, strict=True):
            module.compute_dtype = dtype
