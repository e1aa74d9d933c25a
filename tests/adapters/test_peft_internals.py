"""Each undocumented name of PEFT exists, behaves as assumed, and is still undocumented."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from snake_lora_pl.adapters import peft_internals as internals


@pytest.fixture
def llama(tiny_llama_dir: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_llama_dir)


@pytest.mark.parametrize(
    "name",
    [
        "BaseTunerLayer",
        "get_pattern_key",
        "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
        "dequantize_module_weight",
    ],
)
def test_name_is_not_public(name: str) -> None:
    assert not hasattr(peft, name), "PEFT publishes this name now: import it from there"


def test_adapter_layers_are_the_adapted_layers(llama: LlamaForCausalLM) -> None:
    model = get_peft_model(llama, LoraConfig(target_modules=["q_proj"]))
    names = [name for name, module in model.named_modules() if internals.is_adapter_layer(module)]
    assert [name.rsplit(".", 1)[-1] for name in names] == ["q_proj", "q_proj"]


@pytest.mark.parametrize(
    ("key", "is_match"), [("q_proj", True), ("layers.0.q_proj", True), (r"layers\.\d\.q_proj", True), ("proj", False)]
)
def test_layer_pattern_matches_suffixes_and_regular_expressions(key: str, is_match: bool) -> None:
    assert internals.matches_layer_pattern(key, "layers.0.q_proj") == is_match


def test_default_target_modules_are_known_for_gpt2_only_by_architecture() -> None:
    assert internals.default_target_modules("gpt2") == ["c_attn"]
    assert internals.default_target_modules("unknown") is None


def test_weight_of_a_plain_layer_is_returned_unchanged() -> None:
    layer = torch.nn.Linear(3, 2)
    assert torch.equal(internals.dequantized_weight(layer), layer.weight)


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_initialization_of_peft_still_changes_the_base(llama: LlamaForCausalLM, method: str) -> None:
    before = llama.model.layers[0].self_attn.q_proj.weight.detach().clone()
    model = get_peft_model(llama, LoraConfig(r=4, target_modules=["q_proj"]))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    internals.initialize_from_base(layer, method, "default")
    assert not torch.equal(layer.base_layer.weight, before), "start_from_base is no longer needed"
