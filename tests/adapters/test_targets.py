"""Target layers of many architectures: defaults, layers that cannot be trained, and multimodal models."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.adapters.factory import AdapterFactory
from snake_lora_pl.errors import UserError
from tests.architectures import build_model

QKVO = {"q_proj", "k_proj", "v_proj", "o_proj"}
LATENT = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}


def adapted_names(model: PeftModel) -> list[str]:
    names = [name for name, _ in model.get_base_model().named_parameters() if ".lora_A" in name]
    return [name.split(".lora_A")[0] for name in names]


def last_parts(model: PeftModel) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in adapted_names(model)}


def without_gradient(model: PeftModel) -> list[str]:
    """Return the layers whose adapter gets no gradient from text."""
    ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    model.eval()(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if ".lora_B" in name}
    return [name for name, gradient in gradients.items() if gradient is None or not gradient.any()]


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", QKVO),
        ("gpt2", {"c_attn"}),
        ("phi3", {"qkv_proj", "o_proj"}),
        ("persimmon", {"query_key_value", "dense"}),
        ("xglm", {"q_proj", "k_proj", "v_proj", "out_proj"}),
        ("deepseek_v2", LATENT),
        ("deepseek_v3", LATENT),
        ("mamba", {"in_proj", "x_proj"}),
        ("falcon_mamba", {"in_proj", "x_proj"}),
        ("mamba2", {"in_proj"}),
        ("lfm2", {"q_proj", "k_proj", "v_proj", "in_proj", "out_proj"}),
        ("qwen3_next", QKVO | {"in_proj_qkvz", "out_proj"}),
        ("qwen3_5_text", QKVO | {"in_proj_qkv", "in_proj_z", "out_proj"}),
        ("jamba", QKVO | {"in_proj", "x_proj"}),
        ("recurrent_gemma", QKVO | {"linear_x", "linear_y", "linear_out"}),
    ],
)
def test_default_targets_cover_every_token_mixer_and_all_of_them_train(model_type: str, expected: set[str]) -> None:
    model = AdapterFactory.create("lora", build_model(model_type), LoRAConfig(rank=2))
    assert last_parts(model) == expected
    layers = {match[1] for name in adapted_names(model) if (match := re.search(r"\.(\d+)\.", name))}
    assert len(layers) == model.get_base_model().config.num_hidden_layers
    assert without_gradient(model) == []


def test_latent_attention_without_compressed_queries_has_the_plain_query_projection_by_default() -> None:
    model = AdapterFactory.create("lora", build_model("deepseek_v2", q_lora_rank=None), LoRAConfig(rank=2))
    assert last_parts(model) == LATENT - {"q_a_proj", "q_b_proj"} | {"q_proj"}


def test_default_target_with_the_name_of_another_layer_is_qualified_by_its_parent() -> None:
    base = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    model = AdapterFactory.create("lora", base, LoRAConfig(rank=2))
    assert {name.split("h.0.")[1] for name in adapted_names(model)} == {"attn.c_attn", "attn.c_proj"}


@pytest.mark.parametrize(
    ("model_type", "target"),
    [("mamba", "out_proj"), ("mamba", "dt_proj"), ("mamba2", "conv1d"), ("jamba", "dt_proj"), ("bamba", "out_proj")],
)
@pytest.mark.parametrize("as_pattern", [False, True], ids=["name", "pattern"])
def test_layer_that_cannot_be_trained_is_refused_and_not_offered(
    model_type: str, target: str, as_pattern: bool
) -> None:
    targets = f".*{target}" if as_pattern else [target]
    with pytest.raises(UserError, match=r"model\.lora\.target_modules") as refusal:
        AdapterFactory.create("lora", build_model(model_type), LoRAConfig(target_modules=targets))
    assert str(refusal.value).count(target) == 1
    assert "in_proj" in str(refusal.value)


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "jamba", "llama4_text"])
def test_all_linear_skips_layers_that_cannot_be_trained(model_type: str) -> None:
    config = LoRAConfig(rank=2, target_modules="all-linear", dropout=0.0)
    model = AdapterFactory.create("lora", build_model(model_type), config)
    assert without_gradient(model) == []
    assert not last_parts(model) & {"dt_proj", "router", "lm_head"}


@pytest.mark.parametrize("model_type", ["gemma3", "gemma4", "mllama"])
@pytest.mark.parametrize(
    "targets", [list(LoRAConfig().target_modules), ["q_proj"], r".*\.v_proj", "all-linear"], ids=str
)
def test_adapters_of_a_multimodal_model_are_on_its_text_decoder_only(model_type: str, targets: list[str] | str) -> None:
    model = AdapterFactory.create("lora", build_model(model_type), LoRAConfig(rank=2, target_modules=targets))
    names = adapted_names(model)
    assert names
    assert all(name.startswith("model.language_model.") for name in names)
    assert without_gradient(model) == []


def layer_numbers(model: PeftModel) -> set[int]:
    return {int(re.search(r"\.(\d+)\.", name)[1]) for name in adapted_names(model)}  # type: ignore[index]


@pytest.mark.parametrize(
    ("layers", "expected"), [(None, {0, 1}), ([1], {1}), ([0], {0}), ("0-1", {0, 1}), ("1-1", {1}), ("upper_half", {1})]
)
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear", r".*\.mlp\.\w+"])
def test_adapter_is_on_the_selected_layers_only(layers: Any, expected: set[int], targets: Any) -> None:
    model = AdapterFactory.create(
        "lora", build_model("llama"), LoRAConfig(rank=2, layers=layers, target_modules=targets)
    )
    assert layer_numbers(model) == expected
    everywhere = AdapterFactory.create("lora", build_model("llama"), LoRAConfig(rank=2, target_modules=targets))
    assert last_parts(model) == last_parts(everywhere)


@pytest.mark.parametrize("adapter_type", ["adalora", "miss", "shira"])
def test_every_adapter_type_can_select_layers(adapter_type: str) -> None:
    config = LoRAConfig(rank=2, layers=[1])
    model = AdapterFactory.create(adapter_type, build_model("llama"), _without_scale(adapter_type, config))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".1." in name for name in trained)


def _without_scale(adapter_type: str, config: LoRAConfig) -> LoRAConfig:
    dropout = {"shira": {"dropout": LoRAConfig().dropout}}.get(adapter_type, {})
    return dataclasses.replace(config, alpha=LoRAConfig().alpha, **dropout)


@pytest.mark.parametrize("layers", [[2], [0, 7], "1-2", "1-0"])
def test_layers_that_do_not_exist_are_refused_with_those_that_do(layers: Any) -> None:
    with pytest.raises(UserError, match=r"^model\.lora\.layers: .*0-1") as caught:
        AdapterFactory.create("lora", build_model("llama"), LoRAConfig(rank=2, layers=layers))
    assert "\n" not in str(caught.value)


def test_names_that_match_in_other_layers_only_are_refused() -> None:
    config = LoRAConfig(rank=2, layers=[0], target_modules=["model.layers.1.self_attn.q_proj"])
    with pytest.raises(UserError, match=r"^model\.lora\.layers: model\.layers\.1\.self_attn\.q_proj"):
        AdapterFactory.create("lora", build_model("llama"), config)


@pytest.mark.parametrize("layers", [[], [-1], "", "3", "1-", "upper", "5:"])
def test_other_syntax_of_layers_is_refused(layers: Any) -> None:
    with pytest.raises(UserError, match=r"^model\.lora: layers .*upper_half"):
        LoRAConfig(layers=layers)
