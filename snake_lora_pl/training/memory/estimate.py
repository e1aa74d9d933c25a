"""Estimate of the peak memory of a training step, made without running it.

The step runs once on fake tensors, which have a shape and a type but no content, and the bytes of all live tensors are
added up. The estimate therefore follows from the model, the adapter, the loss and gradient checkpointing, without a
formula for each. Memory that is not in tensors is added by the constants below, which ``python -m benchmarks.memory``
measures. The estimate is within 15% of the measured peak.
"""

from __future__ import annotations

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
from snake_lora_pl.models.limits import ModelLimits

if TYPE_CHECKING:
    from peft import PeftModel

    from snake_lora_pl.training.module import LoRALightningModule

_MIB = 2**20

# Resident set of a trainer process with a Llama model, without the weights, and the buffers of oneDNN.
_CPU_PROCESS_BYTES = 655 * _MIB
# Unused gaps in the heap, as a fraction of the activations, if freed memory is kept (`allocator.keep_freed_memory`).
_CPU_FRAGMENTATION = 0.25
_ADAM_MOMENTS = 2
_EMPTY = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default}
# Operators that internally allocate a temporary of the size of their input.
_OPERATORS_WITH_TEMPORARY = {torch.ops.aten.logsumexp.default}


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory of a training step on one micro-batch, in bytes, by use.

    Attributes:
        device: ``cpu`` or ``cuda``.
        process: Interpreter, libraries and their buffers; 0 on a GPU, where only tensors are counted.
        weights: Frozen base model, and its copies in int8 if training multiplies in int8.
        adapter: Trained parameters.
        gradients: Gradients of the trained parameters.
        optimizer: Moments of the optimizer.
        activations: All other tensors at the peak: saved for backward, and temporary.
        heap: Fragmentation of the process's heap; 0 on a GPU, and with gradient checkpointing, which returns freed
            memory to the system.
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
        """Peak in bytes: resident set on a CPU, allocated tensors on a GPU."""
        return sum(value for value in asdict(self).values() if isinstance(value, int))


def estimate_memory(module: LoRALightningModule, batch: dict[str, Any], device_type: str = "cpu") -> MemoryEstimate:
    """Estimate the peak memory of training a module, without loading weights or computing values.

    Takes about two seconds for 30 layers. Of a hub model, only the config is downloaded.

    Args:
        module: Module to train. It is not changed, and need not be configured.
        batch: The largest micro-batch, as ``training_step`` takes it; see ``blank_batch``.
        device_type: ``cpu`` or ``cuda``: the device to train on.

    Raises:
        UserError: If the base model or the adapter cannot be loaded, or the model cannot read the longest row.
    """
    # Fake tensors cannot pass through compiled layers. Compiled layers are never the fused ones.
    changes = {"compile_layers": False, "fused_layers": "never"} if module.compile_layers else {}
    twin = unconfigured_copy(module, **changes)
    twin.model = _empty_model(twin, device_type)
    # A row ends with its last target. Fake tensors cannot tell that a row has more tokens than the model has positions.
    row, position = max((batch["labels"] != IGNORE_INDEX).nonzero().tolist(), key=lambda index: index[1])
    ModelLimits.of(twin.model).check_row(batch["sources"][row], position + 1)
    adapter = sum(p.numel() * p.element_size() for p in twin.parameters() if p.requires_grad)
    with _only_warnings("snake_lora_pl"):
        twin.choose_base_compute(device_type)
    with _only_warnings("snake_lora_pl"), _FakeStep() as step:
        step.replace_parameters(twin.model)
        twin.prepare_for_training()
        weights_adapter_gradients = step.live_bytes
        twin.backward(twin.training_step(batch, 0))
    activations = step.peak_bytes - weights_adapter_gradients
    is_cpu = device_type == "cpu"
    keeps_freed_memory = is_cpu and not module.gradient_checkpointing
    return MemoryEstimate(
        device=device_type,
        process=_CPU_PROCESS_BYTES if is_cpu else 0,
        weights=weights_adapter_gradients - 2 * adapter,
        adapter=adapter,
        gradients=adapter,
        optimizer=_ADAM_MOMENTS * adapter,
        activations=activations,
        heap=int(_CPU_FRAGMENTATION * activations) if keeps_freed_memory else 0,
    )


def blank_batch(batch_size: int, length: int, num_targets: int) -> dict[str, Any]:
    """Return a micro-batch of a given shape.

    Args:
        batch_size: Number of rows.
        length: Tokens per row.
        num_targets: Target tokens at the end of each row.
    """
    input_ids = torch.zeros((batch_size, length), dtype=torch.int64)
    input_ids[1:, 0] = 1  # a prefix shared by all rows would be computed only once
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    labels[:, length - num_targets :] = 0
    return {"input_ids": input_ids, "labels": labels, "sources": [""] * batch_size}


def unconfigured_copy(module: LoRALightningModule, **changes: Any) -> LoRALightningModule:
    """Return a module with the same settings and without a model.

    Args:
        module: Any module, configured or not.
        changes: Arguments of the module's class that differ.
    """
    settings = {
        name: getattr(module, "dtype_name" if name == "dtype" else name)
        for name in inspect.signature(type(module)).parameters
    }
    return type(module)(**settings | {"text_metrics": None} | changes)


def _empty_model(module: LoRALightningModule, device_type: str) -> PeftModel:
    """Return the module's model on the meta device."""
    options = {
        "dtype": choose_dtype(module.dtype_name, device_type),
        "device": "meta",
    }
    # The same messages are logged when the model is loaded for training.
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


class _FakeStep(TorchDispatchMode):
    """Runs code on floating-point tensors without content, and counts the bytes of live tensors.

    Integer and boolean tensors stay real, because shapes depend on their content: the number of target tokens.

    Attributes:
        live_bytes: Bytes of the live tensors.
        peak_bytes: Maximum of ``live_bytes``.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._storages: set[int] = set()
        # Of the last sparse tensor of each shape.
        self._num_entries: dict[torch.Size, int] = {}

    def replace_parameters(self, module: nn.Module) -> None:
        """Replace a module's parameters and buffers by fake ones, and give the trained ones gradients."""
        # The original is kept with its replacement: the id of a deleted object can be reused.
        replaced: dict[int, tuple[Tensor, Tensor]] = {}
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, original in tensors.items():
                    if original is None:
                        continue
                    if id(original) not in replaced:
                        replaced[id(original)] = (original, self._fake_like(original))
                    tensors[name] = replaced[id(original)][1]  # type: ignore[assignment]

    def _fake_like(self, original: Tensor) -> Tensor:
        with self._fake:
            fake = torch.empty(original.shape, dtype=original.dtype)
            if isinstance(original, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=original.requires_grad)
            if fake.requires_grad:
                fake.grad = torch.empty_like(fake)
                self._count(fake.grad)
        self._count(fake)
        return fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run an operator on fake tensors if its inputs or outputs are floating-point, else on real ones."""
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func is torch.ops.aten.sparse_mask.default:
            # A copy of a fake sparse tensor has no entries; that of a real one has as many.
            dense, mask = args
            num_entries = self._num_entries[mask.shape]
            with self._fake:
                indices = torch.empty((mask.ndim, num_entries), dtype=torch.int64)
                values = torch.empty(num_entries, dtype=dense.dtype)
                out = torch.sparse_coo_tensor(indices, values, mask.shape, is_coalesced=True)
        elif func.name() == "aten::_grouped_mm":
            out = _grouped_product(*args[:2], *args[2:3], **kwargs)
        elif any(isinstance(tensor, FakeTensor) for tensor in inputs):
            out = func(*_masks_to_indices(args), **kwargs)
        elif inputs:
            out = tree_map_only(Tensor, self._fake_if_floating, func(*args, **kwargs))
        else:
            with self._fake:
                out = func(*args, **kwargs)
            # An uninitialized tensor has no content. It is filled later, with random numbers for a dropout mask.
            if func not in _EMPTY and not any(tensor.is_floating_point() for tensor in tree_leaves(out)):
                out = func(*args, **kwargs)
        if func is torch.ops.aten._sparse_coo_tensor_with_dims_and_tensors.default:
            self._num_entries[out.shape] = len(args[4])
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        if func in _OPERATORS_WITH_TEMPORARY:
            self.peak_bytes = max(self.peak_bytes, self.live_bytes + inputs[0].nbytes)
        return out

    def _fake_if_floating(self, tensor: Tensor) -> Tensor:
        return self._fake.from_tensor(tensor) if tensor.is_floating_point() else tensor

    def _count(self, tensor: Tensor) -> None:
        if tensor.layout != torch.strided:  # its indices and values are counted as tensors
            return
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages.add(key)
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._uncount, key, num_bytes).atexit = False

    def _uncount(self, key: int, num_bytes: int) -> None:
        self._storages.discard(key)
        self.live_bytes -= num_bytes


def _grouped_product(a: Tensor, b: Tensor, offs: Tensor, **options: Any) -> Tensor:
    """Return a tensor with the shape of ``torch._grouped_mm``, the product of experts.

    On fake tensors torch computes it in bfloat16 only. Either the rows of ``a`` are grouped, shapes (T, K) and
    (E, K, N), or the inner dimension, shapes (M, T) and (T, N).
    """
    if b.ndim == 3:
        return a.new_empty((a.shape[0], b.shape[2]))
    return a.new_empty((offs.numel(), a.shape[0], b.shape[1]))


def _masks_to_indices(args: Any) -> Any:
    """Convert boolean masks that index a tensor to indices, whose number a fake tensor could not know."""

    def indices(index: Any) -> Any:
        if not isinstance(index, (list, tuple)) or not any(_is_mask(part) for part in index):
            return index
        return [i for part in index for i in (part.nonzero().unbind(1) if _is_mask(part) else [part])]

    return [indices(arg) for arg in args]


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bool and not isinstance(value, FakeTensor)
