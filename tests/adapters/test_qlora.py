"""QLoRA on bases that are not all linear layers, or that are stored quantized."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from snake_lora_pl.adapters import store
from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.adapters.factory import AdapterFactory
from snake_lora_pl.adapters.merge import merge
from snake_lora_pl.errors import UserError
from snake_lora_pl.models.quantization import QuantizationConfig, bitsandbytes_config, quantization_of
from tests.adapters.conftest import rewrite_metadata, save_adapter
from tests.architectures import save_model

bnb = pytest.importorskip("bitsandbytes")

IDS = torch.tensor([[5, 9, 30, 7, 201]])


@pytest.fixture
def stored_dir(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """The tiny Llama, stored in 4 bits."""
    directory = save_model("llama", tmp_path / "stored", tiny_llama_dir)
    config = bitsandbytes_config(QuantizationConfig(), torch.float32)
    AutoModelForCausalLM.from_pretrained(directory, quantization_config=config).save_pretrained(directory)
    return directory


def make_adapter(
    adapter_type: str, base_dir: Path, directory: Path, **settings: Any
) -> tuple[Path, torch.Tensor, QuantizationConfig]:
    """Return a saved adapter with random weights, its logits, and the quantization of its base."""
    torch.manual_seed(0)
    config = LoRAConfig(rank=2, **settings)
    model = AdapterFactory.create(adapter_type, str(base_dir), config, dtype="float32").eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    quantization = quantization_of(model.get_base_model())
    assert quantization is not None
    adapter_dir = save_adapter(model, directory, base_dir, adapter_type)
    rewrite_metadata(adapter_dir, quantization=dataclasses.asdict(quantization))
    return adapter_dir, expected, quantization


@pytest.mark.parametrize("targets", [["c_attn"], ["c_attn", "c_proj", "c_fc"]], ids=["default", "square layers too"])
def test_adapter_of_quantized_gpt2_is_merged_into_transposed_layers(
    targets: list[str], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    base_dir = save_model("gpt2", tmp_path / "gpt2", tiny_llama_dir)
    adapter_dir, expected, _ = make_adapter("qlora", base_dir, tmp_path / "adapter", target_modules=targets)
    merge(adapter_dir, tmp_path / "merged")
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(IDS).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapter_type", ["lora", "qlora"])
def test_adapter_of_a_base_that_is_stored_quantized_is_loaded_and_merged(
    adapter_type: str, stored_dir: Path, tmp_path: Path
) -> None:
    adapter_dir, expected, quantization = make_adapter(adapter_type, stored_dir, tmp_path / "adapter")
    assert quantization == QuantizationConfig()
    loaded = store.load(adapter_dir, dtype="float32").eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, expected)
    merge(adapter_dir, tmp_path / "merged")
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(IDS).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"model\.full_precision_base"):
        store.load(adapter_dir, full_precision_base=True, dtype="float32")


def test_quantized_base_that_is_already_loaded_is_not_repacked_either(stored_dir: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(stored_dir)
    AdapterFactory.create("lora", base, LoRAConfig(rank=2))
    layers = [module for module in base.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_expert_weights_keep_their_dtype_and_the_log_reports_them(
    model_type: str, tiny_llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base_dir = save_model(model_type, tmp_path / "base", tiny_llama_dir)
    with caplog.at_level(logging.INFO, logger="snake_lora_pl"):
        model = AdapterFactory.create("qlora", str(base_dir), LoRAConfig(rank=2), dtype="bfloat16")
    dtypes = {name: p.dtype for name, p in model.named_parameters() if ".experts." in name}
    assert dtypes
    assert set(dtypes.values()) == {torch.bfloat16}
    assert model.get_input_embeddings().weight.dtype == torch.float32
    assert any("expert weights" in record.getMessage() for record in caplog.records)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=IDS).logits.logsumexp(-1).sum().backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if ".lora_B" in name)
    assert model(input_ids=IDS).logits.isfinite().all(), "also without autocast"


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"dropout": 0.05}, "dropout"), ({"use_dora": True}, "use_dora"), ({"init_lora_weights": "pissa"}, "pissa")],
)
def test_setting_that_experts_do_not_support_is_reported(
    settings: dict[str, Any], key: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    base_dir = save_model("mixtral", tmp_path / "base", tiny_llama_dir)
    config = LoRAConfig(**{"rank": 2, "target_modules": "all-linear", "dropout": 0.0, **settings})
    with pytest.raises(UserError, match=rf"model\.lora.*{key}"):
        AdapterFactory.create("lora", str(base_dir), config, dtype="float32")
