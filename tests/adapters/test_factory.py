from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from bitsandbytes.optim import PagedAdamW32bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.adapters.factory import AdapterFactory
from snake_lora_pl.adapters.lora import build_lora
from snake_lora_pl.errors import UserError
from snake_lora_pl.models import QuantizationConfig
from snake_lora_pl.models.quantization import compute_dtype
from tests.adapters.conftest import rewrite_metadata, save_adapter
from tests.registry import restored_registry


@pytest.fixture
def llama(tiny_llama_dir: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_llama_dir)


@pytest.fixture(scope="module")
def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2))


@pytest.fixture
def _registry() -> Iterator[None]:
    with restored_registry():
        yield


def adapted_layers(model: PeftModel) -> set[str]:
    return {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if ".lora_A" in name}


def test_only_adapters_of_the_attention_projections_are_trained(llama: LlamaForCausalLM) -> None:
    model = AdapterFactory.create("lora", llama, LoRAConfig())
    assert adapted_layers(model) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_fresh_adapter_changes_nothing_and_a_trained_one_adds_scaled_product(llama: LlamaForCausalLM) -> None:
    weight = llama.model.layers[0].self_attn.q_proj.weight.detach().clone()
    model = AdapterFactory.create("lora", llama, LoRAConfig(rank=4, alpha=8, dropout=0.0))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(3, weight.shape[1])
    assert torch.equal(layer(x), x @ weight.T)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    merged = weight + 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(layer(x), x @ merged.T)


def test_base_model_is_loaded_by_name(tiny_llama_dir: Path) -> None:
    assert isinstance(AdapterFactory.create("lora", str(tiny_llama_dir), LoRAConfig()), PeftModel)


def test_unknown_adapter_type_is_reported_with_the_known_ones(llama: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"model\.adapter_type.*'lorra'.*lora.*Did you mean 'lora'"):
        AdapterFactory.create("lorra", llama, LoRAConfig())


@pytest.mark.usefixtures("_registry")
def test_registered_adapter_type_is_built_by_its_builder(llama: LlamaForCausalLM) -> None:
    seen = []

    def build(base_model: LlamaForCausalLM, config: LoRAConfig) -> PeftModel:
        seen.append(config.rank)
        return build_lora(base_model, config)

    AdapterFactory.register("mine", build)
    assert "mine" in AdapterFactory.registered()
    assert isinstance(AdapterFactory.create("mine", llama, LoRAConfig(rank=3)), PeftModel)
    assert seen == [3]
    with pytest.raises(ValueError, match="'mine'"):
        AdapterFactory.register("mine", build)


def test_default_target_modules_follow_the_architecture(gpt2: GPT2LMHeadModel) -> None:
    assert adapted_layers(AdapterFactory.create("lora", gpt2, LoRAConfig())) == {"c_attn"}


def test_all_linear_selects_every_linear_layer_except_the_lm_head(llama: LlamaForCausalLM) -> None:
    model = AdapterFactory.create("lora", llama, LoRAConfig(target_modules="all-linear"))
    assert adapted_layers(model) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip


def test_pattern_is_matched_against_full_names(llama: LlamaForCausalLM) -> None:
    model = AdapterFactory.create("lora", llama, LoRAConfig(target_modules=r".*\.layers\.1\..*\.v_proj"))
    names = [name for name, _ in model.named_parameters() if ".lora_A" in name]
    assert len(names) == 1
    assert ".layers.1.self_attn.v_proj." in names[0]


@pytest.mark.parametrize("targets", [["q_proj", "qproj"], ["c_attn"]], ids=["one of two", "the only one"])
def test_missing_target_layer_is_reported_with_the_existing_layers(llama: LlamaForCausalLM, targets: list[str]) -> None:
    with pytest.raises(UserError, match=rf"'{targets[-1]}'.*LlamaForCausalLM.*down_proj.*v_proj"):
        AdapterFactory.create("lora", llama, LoRAConfig(target_modules=targets))


@pytest.mark.parametrize("pattern", ["nothing.*", "("])
def test_pattern_without_a_match_is_rejected(llama: LlamaForCausalLM, pattern: str) -> None:
    with pytest.raises(UserError, match=rf"model\.lora\.target_modules.*'{re.escape(pattern)}'"):
        AdapterFactory.create("lora", llama, LoRAConfig(target_modules=pattern))


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    return {
        name.split("layers.")[1].replace("self_attn.", ""): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


@pytest.mark.parametrize(
    ("options", "ranks", "scalings"),
    [
        ({}, {}, {}),
        ({"use_rslora": True}, {}, dict.fromkeys(["0.q_proj", "0.v_proj", "1.q_proj", "1.v_proj"], 4.0)),
        (
            {"rank_pattern": {"q_proj": 2, r"layers\.1\..*v_proj": 6}},
            {"0.q_proj": 2, "1.q_proj": 2, "1.v_proj": 6},
            {"0.q_proj": 4.0, "1.q_proj": 4.0, "1.v_proj": 8 / 6},
        ),
        ({"alpha_pattern": {"0.self_attn.q_proj": 16.0}}, {}, {"0.q_proj": 4.0}),
    ],
    ids=["plain", "rslora", "rank pattern", "alpha pattern"],
)
def test_ranks_and_scales_follow_the_settings(
    llama: LlamaForCausalLM, options: dict[str, Any], ranks: dict[str, int], scalings: dict[str, float]
) -> None:
    config = LoRAConfig(rank=4, alpha=8, target_modules=["q_proj", "v_proj"], **options)
    layers = lora_layers(AdapterFactory.create("lora", llama, config))
    assert layers.keys() == {"0.q_proj", "0.v_proj", "1.q_proj", "1.v_proj"}
    for name, layer in layers.items():
        assert layer.r["default"] == len(layer.lora_A["default"].weight) == ranks.get(name, 4)
        assert layer.scaling["default"] == pytest.approx(scalings.get(name, 2.0))


def test_factors_are_initialized_as_requested(llama: LlamaForCausalLM) -> None:
    factors = {}
    for init in (True, "gaussian", "orthogonal"):
        config = LoRAConfig(rank=4, target_modules=["q_proj"], init_lora_weights=init)
        model = AdapterFactory.create("lora", llama, config)
        layer = lora_layers(model)["0.q_proj"]
        factors[init] = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        llama = model.unload()
    uniform, gaussian, orthogonal = factors.values()
    bound = uniform[0].shape[1] ** -0.5
    assert uniform[0].abs().max() <= bound < gaussian[0].abs().max()
    assert not uniform[1].any()
    assert not gaussian[1].any()
    assert orthogonal[1].any()
    torch.testing.assert_close(orthogonal[1] @ orthogonal[0], torch.zeros(32, 32))


def test_dora_trains_a_magnitude_per_layer(llama: LlamaForCausalLM) -> None:
    model = AdapterFactory.create("lora", llama, LoRAConfig(target_modules=["q_proj"], use_dora=True))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum("lora_magnitude_vector" in name for name in trained) == 2


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
def test_layer_pattern_without_a_match_is_rejected(llama: LlamaForCausalLM, setting: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # PEFT's warning about the same problem
        with pytest.raises(UserError, match=f"model.lora.{setting}: 'gate_proj'.*q_proj"):
            AdapterFactory.create("lora", llama, LoRAConfig(**{setting: {"gate_proj": 2}}))


def test_base_with_an_adapter_is_rejected(llama: LlamaForCausalLM) -> None:
    model = AdapterFactory.create("lora", llama, LoRAConfig(rank=2))
    for base in (model, model.get_base_model()):
        with pytest.raises(UserError, match="SharedBase"):
            AdapterFactory.create("lora", base, LoRAConfig())
    assert {layer.r["default"] for layer in model.modules() if isinstance(layer, LoraLayer)} == {2}
    AdapterFactory.create("lora", model.unload(), LoRAConfig())


def test_qlora_requires_a_quantized_base(llama: LlamaForCausalLM) -> None:
    with pytest.raises(UserError, match="quantized base"):
        AdapterFactory.create("qlora", llama, LoRAConfig())


def test_unquantized_weights_of_qlora_are_float32_after_creation_and_loading(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    created = AdapterFactory.create("qlora", str(tiny_llama_dir), LoRAConfig(rank=2), dtype="bfloat16")
    for name, parameter in created.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    directory = save_adapter(created, tmp_path / "adapter", tiny_llama_dir, "qlora")
    rewrite_metadata(directory, quantization=dataclasses.asdict(QuantizationConfig()))
    loaded = AdapterFactory.load(directory, dtype="bfloat16")
    for model in (created, loaded):
        base = model.get_base_model()
        assert compute_dtype(base) == torch.bfloat16
        full = {name: p.dtype for name, p in base.named_parameters() if "embed" in name or "norm" in name}
        assert len(full) == 6
        assert set(full.values()) == {torch.float32}
    assert {"lora_" in name for name, parameter in created.named_parameters() if parameter.requires_grad} == {True}
    ids = torch.tensor([[5, 9, 30, 7]])
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, created.eval()(input_ids=ids).logits)


def test_qlora_uses_a_paged_optimizer_if_all_parameters_are_on_a_gpu() -> None:
    qlora = AdapterFactory.get_adapter_type("qlora")
    on_gpu, on_cpu = (Mock(spec=torch.nn.Parameter, is_cuda=is_cuda) for is_cuda in (True, False))
    assert qlora.optimizer_class([on_gpu, on_gpu]) == (PagedAdamW32bit, {})
    for parameters in ([on_cpu], [on_gpu, on_cpu]):
        assert qlora.optimizer_class(parameters)[0] is torch.optim.AdamW
    assert AdapterFactory.get_adapter_type("lora").optimizer_class([on_gpu])[0] is torch.optim.AdamW
