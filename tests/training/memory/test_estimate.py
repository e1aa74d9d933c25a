from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from snake_lora_pl.adapters import store
from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.models.quantization import QuantizationConfig, weight_bytes
from snake_lora_pl.training.memory.estimate import _Heap, blank_batch, estimate_memory, twin_of
from snake_lora_pl.training.module import LoRALightningModule


def allocated_peak(module: LoRALightningModule, batch: dict[str, Any], trace_path: Path) -> int:
    """Most bytes that a real step's tensors hold at once, gradients aside: the profiler sees each allocation."""
    module.configure_model()
    gradients = [torch.zeros_like(p) for p in module.parameters() if p.requires_grad]
    for parameter, gradient in zip((p for p in module.parameters() if p.requires_grad), gradients, strict=True):
        parameter.grad = gradient
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        module.backward(module.training_step(batch, 0))
    profiler.export_chrome_trace(str(trace_path))
    events = [e for e in json.loads(trace_path.read_text())["traceEvents"] if e["name"] == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        alive += event["args"]["Bytes"]
        peak = max(peak, alive)
    return peak


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dtype": "bfloat16"},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "dtype": "bfloat16", "lora": LoRAConfig(rank=32, target_modules="all-linear")},
    ],
    ids=["float32", "bfloat16", "checkpointed", "bfloat16, checkpointed, all layers"],
)
def test_activations_are_what_a_real_step_allocates(make_module, tmp_path: Path, settings: dict[str, Any]) -> None:
    module = make_module(**settings)
    batch = blank_batch(8, 96, 40)
    estimate = estimate_memory(module, batch)
    assert estimate.activations == pytest.approx(allocated_peak(module, batch, tmp_path / "trace.json"), rel=0.05)


@pytest.mark.parametrize(("dtype", "num_bytes"), [("float32", 4), ("bfloat16", 2)])
def test_parameters_are_counted_by_type(make_module, dtype: str, num_bytes: int) -> None:
    module = make_module(dtype=dtype)
    estimate = estimate_memory(module, blank_batch(1, 8, 4))
    module.configure_model()
    trained, total = module.peft_model.get_nb_trainable_parameters()
    # Rotary frequencies are no parameters.
    assert estimate.weights == pytest.approx(num_bytes * (total - trained), rel=0.01)
    assert estimate.adapter == estimate.gradients == 4 * trained
    assert estimate.optimizer == 8 * trained


def test_the_module_is_left_as_it_was(make_module) -> None:
    module = make_module()
    estimate_memory(module, blank_batch(1, 8, 4))
    assert module.model is None
    module.configure_model()
    before = {name: p.clone() for name, p in module.named_parameters()}
    estimate_memory(module, blank_batch(1, 8, 4))
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_longer_batches_take_more_and_a_gpu_has_no_heap(make_module) -> None:
    module = make_module()
    small, large = (estimate_memory(module, blank_batch(size, 64, 32)) for size in (2, 8))
    on_gpu = estimate_memory(module, blank_batch(8, 64, 32), "cuda")
    assert 3 < large.activations / small.activations < 5
    assert large.total > small.total
    assert on_gpu.process == on_gpu.heap == 0
    assert on_gpu.activations == large.activations


def test_a_model_without_weights_can_be_estimated(make_module, tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_llama_dir / "config.json").read_text())
    config |= {"hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000, "num_attention_heads": 32}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama_dir / name, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    estimate = estimate_memory(make_module(base_model=str(tmp_path)), blank_batch(64, 2048, 512))
    assert estimate.activations > 20 * 2**30


@pytest.mark.parametrize(
    "settings",
    [
        {"adapter_type": "adalora"},
        {"lora": LoRAConfig(rank=4, use_dora=True)},
        {"lora": LoRAConfig(rank=4, init_lora_weights="pissa")},
        {"lora": LoRAConfig(rank=4, init_lora_weights="olora")},
    ],
    ids=["adalora", "dora", "pissa", "olora"],
)
def test_every_kind_of_adapter_can_be_estimated(make_module, tmp_path: Path, settings: dict[str, Any]) -> None:
    module = make_module(**settings)
    batch = blank_batch(8, 96, 40)
    estimate = estimate_memory(module, batch)
    assert estimate.activations == pytest.approx(allocated_peak(module, batch, tmp_path / "trace.json"), rel=0.05)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert estimate.adapter == 4 * trained


@pytest.mark.parametrize("quantization", [QuantizationConfig(), QuantizationConfig(double_quant=False)])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_quantized_base_is_counted_as_stored(
    make_module, tmp_path: Path, quantization: QuantizationConfig, gradient_checkpointing: bool
) -> None:
    module = make_module(
        adapter_type="qlora",
        lora=LoRAConfig(rank=4, quantization=quantization),
        gradient_checkpointing=gradient_checkpointing,
    )
    batch = blank_batch(8, 96, 40)
    estimate = estimate_memory(module, batch)
    assert estimate.activations == pytest.approx(allocated_peak(module, batch, tmp_path / "trace.json"), rel=0.1)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert estimate.weights == pytest.approx(weight_bytes(module.peft_model) - 4 * trained, rel=0.05)


def test_a_saved_adapter_is_counted_as_it_was_saved(make_module, tmp_path: Path) -> None:
    module = make_module(lora=LoRAConfig(rank=8))
    module.configure_model()
    store.save(module.peft_model, tmp_path / "adapter", module.adapter_metadata(), module.tokenizer)
    batch = blank_batch(4, 32, 16)
    saved = estimate_memory(make_module(adapter_path=str(tmp_path / "adapter")), batch)
    assert saved == estimate_memory(module, batch)


def test_a_twin_has_the_same_settings(make_module) -> None:
    module = make_module(dtype="bfloat16", loss_chunk_tokens=64)
    twin = twin_of(module, learning_rate=0.5)
    assert (twin.dtype_name, twin.loss_chunk_tokens, twin.lora, twin.learning_rate) == (
        "bfloat16",
        64,
        module.lora,
        0.5,
    )
    assert twin.model is None


@given(st.lists(st.integers(1, 1000) | st.integers(-20, -1), max_size=200))
def test_blocks_of_the_heap_lie_apart_and_in_the_smallest_hole_there_is(requests: list[int]) -> None:
    heap = _Heap()
    blocks: dict[int, int] = {}  # address to end
    reach = 0
    for request in requests:
        if request < 0:  # frees one of the blocks
            if blocks:
                address = sorted(blocks)[request % len(blocks)]
                heap.free(address)
                del blocks[address]
            continue
        size = -(-request // 64) * 64
        edges = sorted(blocks.items())
        starts, ends = [start for start, _ in edges], [0, *(end for _, end in edges)]
        holes = [(start - end, end) for start, end in zip(starts, ends, strict=False) if start - end >= size + 96]
        address = heap.allocate(request)
        assert address == (min(holes)[1] if holes else ends[-1])
        blocks[address] = address + size
        reach = max(reach, address + size)
        assert heap.peak_bytes == reach


def test_a_hole_that_is_too_small_stays_empty() -> None:
    heap = _Heap()
    blocks = [heap.allocate(1024) for _ in range(4)]
    heap.free(blocks[0])
    heap.free(blocks[2])
    heap.allocate(1024)
    assert heap.peak_bytes == 5 * 1024
    heap.free(blocks[1])  # joins the holes on both sides
    heap.allocate(2048)
    assert heap.peak_bytes == 5 * 1024
