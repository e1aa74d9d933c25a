from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.models.quantization import QuantizationConfig, weight_bytes
from snake_lora_pl.training.memory.estimate import _CPU_FRAGMENTATION, blank_batch, estimate_memory, unconfigured_copy
from snake_lora_pl.training.module import LoRALightningModule
from tests.adapters.conftest import save_adapter
from tests.architectures import save_model


def allocated_peak(module: LoRALightningModule, batch: dict[str, Any], trace_path: Path) -> int:
    """Measure the peak bytes of all tensors of a real step except gradients, with the profiler."""
    module.configure_model()
    gradients = [torch.zeros_like(p) for p in module.parameters() if p.requires_grad]
    for parameter, gradient in zip((p for p in module.parameters() if p.requires_grad), gradients, strict=True):
        parameter.grad = gradient
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        module.backward(module.training_step(batch, 0))
    profiler.export_chrome_trace(str(trace_path))
    events = [e for e in json.loads(trace_path.read_text())["traceEvents"] if e["name"] == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
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
def test_activations_equal_the_allocations_of_a_real_step(
    make_module, tmp_path: Path, settings: dict[str, Any]
) -> None:
    module = make_module(**settings)
    batch = blank_batch(8, 96, 40)
    estimate = estimate_memory(module, batch)
    assert estimate.activations == pytest.approx(allocated_peak(module, batch, tmp_path / "trace.json"), rel=0.05)


@pytest.mark.parametrize(
    "lora", [LoRAConfig(), LoRAConfig(target_modules="all-linear", dropout=0.0)], ids=["attention", "experts"]
)
def test_activations_of_experts_equal_the_allocations_of_a_real_step(
    lora: LoRAConfig, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    base_dir = save_model("mixtral", tmp_path / "base", tiny_llama_dir)
    module = LoRALightningModule(str(base_dir), lora=lora, dtype="float32")
    batch = blank_batch(8, 96, 40)
    estimate = estimate_memory(module, batch)
    assert estimate.activations == pytest.approx(allocated_peak(module, batch, tmp_path / "trace.json"), rel=0.15)


@pytest.mark.parametrize(("dtype", "num_bytes"), [("float32", 4), ("bfloat16", 2)])
def test_parameters_are_counted_by_dtype(make_module, dtype: str, num_bytes: int) -> None:
    module = make_module(dtype=dtype)
    estimate = estimate_memory(module, blank_batch(1, 8, 4))
    module.configure_model()
    trained, total = module.peft_model.get_nb_trainable_parameters()
    # Rotary frequencies are buffers.
    assert estimate.weights == pytest.approx(num_bytes * (total - trained), rel=0.01)
    assert estimate.adapter == estimate.gradients == 4 * trained
    assert estimate.optimizer == 8 * trained


def test_module_is_not_changed(make_module) -> None:
    module = make_module()
    estimate_memory(module, blank_batch(1, 8, 4))
    assert module.model is None
    module.configure_model()
    before = {name: p.clone() for name, p in module.named_parameters()}
    estimate_memory(module, blank_batch(1, 8, 4))
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_memory_grows_with_the_batch_and_gpu_estimate_counts_tensors_only(make_module) -> None:
    module = make_module()
    small, large = (estimate_memory(module, blank_batch(size, 64, 32)) for size in (2, 8))
    on_gpu = estimate_memory(module, blank_batch(8, 64, 32), "cuda")
    assert 3 < large.activations / small.activations < 5
    assert large.total > small.total
    assert on_gpu.process == on_gpu.heap == 0
    assert on_gpu.activations == large.activations


@pytest.mark.e2e
def test_estimate_needs_no_weights(make_module, tiny_llama_dir: Path, tmp_path: Path) -> None:
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
        {"adapter_type": "miss", "lora": LoRAConfig(rank=4)},
        {"adapter_type": "shira", "lora": LoRAConfig(rank=4)},
        {"lora": LoRAConfig(rank=4, use_dora=True)},
        {"lora": LoRAConfig(rank=4, init_lora_weights="pissa")},
        {"lora": LoRAConfig(rank=4, init_lora_weights="olora")},
    ],
    ids=["adalora", "miss", "shira", "dora", "pissa", "olora"],
)
def test_every_adapter_type_can_be_estimated(make_module, tmp_path: Path, settings: dict[str, Any]) -> None:
    module = make_module(**settings)
    batch = blank_batch(8, 96, 40)
    estimate = estimate_memory(module, batch)
    assert estimate.activations == pytest.approx(allocated_peak(module, batch, tmp_path / "trace.json"), rel=0.05)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert estimate.adapter == 4 * trained


@pytest.mark.parametrize("adapter_type", ["lora", "miss", "shira"])
def test_estimate_of_a_saved_adapter_is_that_of_a_new_one(
    make_module, adapter_type: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    module = make_module(adapter_type=adapter_type, lora=LoRAConfig(rank=4))
    module.configure_model()
    adapter_dir = save_adapter(module.peft_model, tmp_path / "adapter", tiny_llama_dir, adapter_type)
    loaded = make_module(adapter_path=str(adapter_dir))
    batch = blank_batch(4, 32, 8)
    assert estimate_memory(loaded, batch) == estimate_memory(module, batch)


@pytest.mark.parametrize("quantization", [QuantizationConfig(), QuantizationConfig(double_quant=False)])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_quantized_base_is_counted_as_stored(
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


def test_unconfigured_copy_has_the_same_settings(make_module) -> None:
    module = make_module(dtype="bfloat16", loss_chunk_tokens=64)
    copy = unconfigured_copy(module, learning_rate=0.5)
    assert (copy.dtype_name, copy.loss_chunk_tokens, copy.lora, copy.learning_rate) == (
        "bfloat16",
        64,
        module.lora,
        0.5,
    )
    assert copy.model is None


def test_heap_is_a_fraction_of_activations_unless_freed_memory_is_returned(make_module) -> None:
    batch = blank_batch(8, 64, 32)
    estimate = estimate_memory(make_module(), batch)
    assert estimate.heap == int(_CPU_FRAGMENTATION * estimate.activations)
    assert estimate_memory(make_module(gradient_checkpointing=True), batch).heap == 0
