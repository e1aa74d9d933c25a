"""How much memory a training step takes, said before it runs.

The step itself is the description: it runs once on tensors that have a shape and a type but no content, and what would
be alive at each moment is added up. So the estimate follows the model's architecture, the adapter, the loss and
gradient checkpointing without a formula for any of them. What no tensor shows is added by the constants below; those
are measured (``python -m benchmarks.memory``), and are all there is to calibrate.
"""

from __future__ import annotations

import bisect
import contextlib
import inspect
import logging
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from snake_lora_pl.adapters.factory import AdapterFactory
from snake_lora_pl.constants import IGNORE_INDEX
from snake_lora_pl.models import choose_dtype

if TYPE_CHECKING:
    from peft import PeftModel

    from snake_lora_pl.training.module import LoRALightningModule

_MIB = 2**20

# Resident set of a process that has loaded a model of the Llama family through transformers and PEFT in a trainer,
# without the model's weights.
_CPU_PROCESS_BYTES = 605 * _MIB
# What oneDNN and its threads hold once they have computed.
_CPU_KERNEL_BYTES = 50 * _MIB
# Of what torch asks the allocator for. Up to glibc 2.37 a hole must hold a block wherever that would have to begin, so
# that a block does not fit where one of its size was.
_ALIGNMENT = 64
_ROOM_TO_ALIGN = 96
_ADAM_MOMENTS = 2
_EMPTY = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default}
# Operators that hold, while they run, another tensor of their input's size which no dispatch shows.
_OPERATORS_WITH_SCRATCH = {torch.ops.aten.logsumexp.default}


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory of training one micro-batch at a time, in bytes, by what holds it.

    Attributes:
        device: Type of the device that it is the memory of.
        process: Interpreter, libraries and their buffers; 0 on a GPU, whose figure counts tensors alone.
        weights: The frozen base model.
        adapter: The trained parameters.
        gradients: Their gradients.
        optimizer: The optimiser's moments.
        activations: What the step holds beside all these at its peak: saved for backward, and in use.
        heap: Room in the process's heap that is held and not used; 0 on a GPU, and where freed memory is given back.
    """

    device: str
    process: int
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    heap: int

    @property
    def total(self) -> int:
        """Peak in bytes: of the resident set on a CPU, of allocated tensors on a GPU."""
        return sum(value for value in asdict(self).values() if isinstance(value, int))


def estimate_memory(module: LoRALightningModule, batch: dict[str, Any], device_type: str = "cpu") -> MemoryEstimate:
    """Peak memory of training a module on batches like one, without loading weights or computing anything.

    Takes about two seconds for 30 layers. Of a hub model only the config is downloaded.

    Args:
        module: What is to be trained; it is only read, and need not have been configured.
        batch: The largest micro-batch, as the module's ``training_step`` takes it; ``blank_batch`` makes one.
        device_type: ``cpu`` or ``cuda``, where the step is to run.

    Raises:
        UserError: If the base model or the adapter cannot be had.
    """
    # A compiled layer cannot be followed; without compiling the layers are the same ones, and never the fused ones.
    twin = twin_of(module, compile_layers=False, fused_layers="never") if module.compile_layers else twin_of(module)
    twin.model = _empty_model(twin, device_type)
    adapter = sum(p.numel() * p.element_size() for p in twin.parameters() if p.requires_grad)
    with _only_warnings("snake_lora_pl"), _Shapes() as shapes:
        shapes.take_over(twin.model)
        twin.prepare_for_training()
        weights_adapter_gradients = shapes.alive_bytes
        shapes.heap = heap = _Heap()
        twin.backward(twin.training_step(batch, 0))
    activations = shapes.peak_bytes - weights_adapter_gradients
    on_cpu = device_type == "cpu"
    return MemoryEstimate(
        device=device_type,
        process=_CPU_PROCESS_BYTES + _CPU_KERNEL_BYTES if on_cpu else 0,
        weights=weights_adapter_gradients - 2 * adapter,
        adapter=adapter,
        gradients=adapter,
        optimizer=_ADAM_MOMENTS * adapter,
        activations=activations,
        heap=heap.peak_bytes - activations if on_cpu and not module.gradient_checkpointing else 0,
    )


def blank_batch(batch_size: int, length: int, num_targets: int) -> dict[str, Any]:
    """A micro-batch of a given shape.

    Args:
        batch_size: Rows.
        length: Tokens of each row.
        num_targets: Tokens at the end of each row that carry loss.
    """
    input_ids = torch.zeros((batch_size, length), dtype=torch.int64)
    input_ids[1:, 0] = 1  # a beginning that all rows share may be computed once
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    labels[:, length - num_targets :] = 0
    return {"input_ids": input_ids, "labels": labels, "sources": [""] * batch_size}


def twin_of(module: LoRALightningModule, **changes: Any) -> LoRALightningModule:
    """A module with the same settings, but for ``changes``, and without a model.

    Args:
        module: Any module, configured or not.
        changes: Arguments of the module's class.
    """
    settings = {
        name: getattr(module, "dtype_name" if name == "dtype" else name)
        for name in inspect.signature(type(module)).parameters
    }
    return type(module)(**settings | {"text_metrics": None} | changes)


def _empty_model(module: LoRALightningModule, device_type: str) -> PeftModel:
    """The module's model as it would train, each parameter on the meta device."""
    options = {
        "dtype": choose_dtype(module.dtype_name, device_type),
        "device": "meta",
    }
    # What loading says of a model, it says when the model is loaded.
    with _only_warnings("snake_lora_pl"), torch.device("meta"):
        if module.adapter_path is None:
            return AdapterFactory.create(module.adapter_type, module.base_spec, module.lora, **options)
        return AdapterFactory.load(
            module.adapter_path,
            module.base_spec,
            is_trainable=True,
            full_precision_base=module.full_precision_base,
            **options,
        )


@contextlib.contextmanager
def _only_warnings(logger_name: str) -> Iterator[None]:
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)


class _Shapes(TorchDispatchMode):
    """Runs code with floating-point tensors that have no content, and counts the bytes that would be alive.

    Integers and masks stay real: they say where the targets are, and so what shapes come of them.

    Attributes:
        alive_bytes: Bytes of the tensors that are alive.
        peak_bytes: The most there were.
        heap: Where they would lie.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive_bytes = 0
        self.peak_bytes = 0
        self.heap = _Heap()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._storages: set[int] = set()

    def take_over(self, module: nn.Module) -> None:
        """Replace a module's parameters and buffers, give the trained ones gradients, and count all of it."""
        # The old tensor is kept with the new one: an id is free again as soon as its object is gone.
        replaced: dict[int, tuple[Tensor, Tensor]] = {}
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, old in tensors.items():
                    if old is None:
                        continue
                    if id(old) not in replaced:
                        replaced[id(old)] = (old, self._like(old))
                    tensors[name] = replaced[id(old)][1]  # type: ignore[assignment]

    def _like(self, old: Tensor) -> Tensor:
        with self._fake:
            new = torch.empty(old.shape, dtype=old.dtype)
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            if new.requires_grad:
                new.grad = torch.empty_like(new)
                self._count(new.grad)
        self._count(new)
        return new

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run one operator on shapes where a floating-point tensor takes part, for real elsewhere."""
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in inputs):
            out = func(*_without_masks(args), **kwargs)
        elif inputs:
            out = tree_map_only(Tensor, self._fake_if_floating, func(*args, **kwargs))
        else:
            with self._fake:
                out = func(*args, **kwargs)
            # What is empty has no content to keep: it will be filled with random numbers, as many as a mask has.
            if func not in _EMPTY and not any(tensor.is_floating_point() for tensor in tree_leaves(out)):
                out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        if func in _OPERATORS_WITH_SCRATCH:
            self.peak_bytes = max(self.peak_bytes, self.alive_bytes + inputs[0].nbytes)
            self.heap.free(self.heap.allocate(inputs[0].nbytes))
        return out

    def _fake_if_floating(self, tensor: Tensor) -> Tensor:
        return self._fake.from_tensor(tensor) if tensor.is_floating_point() else tensor

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages.add(key)
        self.alive_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.alive_bytes)
        heap = self.heap
        weakref.finalize(storage, self._forget, key, num_bytes, heap, heap.allocate(num_bytes)).atexit = False

    def _forget(self, key: int, num_bytes: int, heap: _Heap, address: int) -> None:
        self._storages.discard(key)
        self.alive_bytes -= num_bytes
        heap.free(address)


class _Heap:
    """glibc's heap as ``allocator.keep_freed_memory`` sets it: best fit, neighbors joined, never given back.

    What a step holds is more than its tensors: holes between those that are alive, into which no later one fits.

    Attributes:
        peak_bytes: The most that it came to reach to.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._top = 0  # behind the last block that is in use
        self._used: dict[int, int] = {}
        # Holes by size, by where they begin and by where they end.
        self._holes: list[tuple[int, int]] = []
        self._hole_sizes: dict[int, int] = {}
        self._hole_starts: dict[int, int] = {}

    def allocate(self, num_bytes: int) -> int:
        """Find a place, of the smallest hole that is large enough or at the end; returns its address."""
        size = -(-max(num_bytes, 1) // _ALIGNMENT) * _ALIGNMENT
        index = bisect.bisect_left(self._holes, (size + _ROOM_TO_ALIGN, 0))
        if index < len(self._holes):
            hole_size, address = self._holes[index]
            self._remove_hole(address)
            if hole_size > size:
                self._add_hole(address + size, hole_size - size)
        else:
            address = self._top
            self._top += size
            self.peak_bytes = max(self.peak_bytes, self._top)
        self._used[address] = size
        return address

    def free(self, address: int) -> None:
        """Make a hole, one with those beside it."""
        end = address + self._used.pop(address)
        if end in self._hole_sizes:
            end += self._remove_hole(end)
        if address in self._hole_starts:
            address = self._hole_starts[address]
            self._remove_hole(address)
        if end == self._top:
            self._top = address
        else:
            self._add_hole(address, end - address)

    def _add_hole(self, address: int, size: int) -> None:
        bisect.insort(self._holes, (size, address))
        self._hole_sizes[address] = size
        self._hole_starts[address + size] = address

    def _remove_hole(self, address: int) -> int:
        size = self._hole_sizes.pop(address)
        del self._hole_starts[address + size]
        del self._holes[bisect.bisect_left(self._holes, (size, address))]
        return size


def _without_masks(args: Any) -> Any:
    """Turn boolean masks that index a tensor into the indices they stand for: how many is in their content alone."""

    def indices(index: Any) -> Any:
        if not isinstance(index, (list, tuple)) or not any(_is_mask(part) for part in index):
            return index
        return [i for part in index for i in (part.nonzero().unbind(1) if _is_mask(part) else [part])]

    return [indices(arg) for arg in args]


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bool and not isinstance(value, FakeTensor)
