from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from snake_lora_pl.decoding import exactness
from snake_lora_pl.decoding.exactness import Exactness, float32_weights, logits_agree
from tests.architectures import build_model

IDS = torch.arange(3, 43)[None]


@pytest.mark.parametrize("max_converted", [2**28, 3000])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
@torch.no_grad()
def test_weights_are_converted_in_the_block_whole_or_in_parts(
    model_type: str, max_converted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exactness, "_MAX_CONVERTED", max_converted)
    model = build_model(model_type).to(torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = copy.deepcopy(model).float()(input_ids=IDS).logits
    with float32_weights(model) as precision:
        logits = model(input_ids=IDS).logits
    assert precision.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
    assert model(input_ids=IDS).logits.dtype == torch.bfloat16


@torch.no_grad()
def test_block_overrides_autocast() -> None:
    model = build_model("llama")
    expected = model(input_ids=IDS).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(model(input_ids=IDS).logits.float(), expected)
        with float32_weights(model):
            assert torch.equal(model(input_ids=IDS).logits, expected)


@torch.no_grad()
def test_weights_of_4_bits_are_computed_in_float32_and_those_of_8_bits_compared_loosely() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    tolerances = []
    for layer in (
        bnb.nn.Linear4bit(32, 32, bias=False, compute_dtype=torch.bfloat16),
        bnb.nn.Linear8bitLt(32, 32, bias=False, has_fp16_weights=False),
    ):
        model = build_model("llama").to(torch.bfloat16)
        layer.weight = type(layer.weight)(torch.randn(32, 32), requires_grad=False)
        model.model.layers[0].self_attn.o_proj = layer.to("cpu")
        dtype = getattr(layer, "compute_dtype", None)
        with float32_weights(model) as precision:
            tolerances.append(precision.tolerance)
            if dtype is not None:
                assert layer.compute_dtype == torch.float32
        assert getattr(layer, "compute_dtype", None) == dtype
    assert tolerances == [exactness._TOLERANCE, exactness._TOLERANCE_ROUNDED]


@torch.no_grad()
def test_rwkv_scales_its_weights_before_they_are_converted() -> None:
    model = build_model("rwkv", rescale_every=1).to(torch.bfloat16)
    expected = copy.deepcopy(model)(input_ids=IDS).logits
    unscaled = copy.deepcopy(model).rwkv.blocks[1].feed_forward.value.weight
    with float32_weights(model):
        pass
    assert torch.equal(model(input_ids=IDS).logits, expected)
    assert torch.equal(2 * model.rwkv.blocks[1].feed_forward.value.weight, unscaled)


def test_each_range_of_lengths_is_probed_once_with_a_text_beyond_its_beginning() -> None:
    model = build_model("gpt_neo", window_size=100)
    probed: list[int] = []

    def probe(text: list[int]) -> bool:
        probed.append(len(text))
        return len(text) < 100

    exact = Exactness(model, "lockstep", probe)
    assert exact.holds([1] * 50, 10)
    assert exact.holds([1] * 90, 10)
    assert not exact.holds([1] * 50, 60)
    assert not exact.holds([1] * 90, 90)
    assert probed == [50, 110]
    for prompt, num_new, length in (([1] * 10, 1000, 141), ([1] * 300, 9, 300)):
        probed.clear()
        Exactness(build_model("gpt_neo", window_size=100), "lockstep", probe).holds(prompt, num_new)
        assert probed == [length]


def test_result_is_remembered_for_a_base_model_with_any_adapters_of_one_type() -> None:
    base = build_model("llama")
    probed: list[str] = []

    def holds(model: PreTrainedModel, way: str = "lockstep") -> bool:
        return Exactness(model, way, lambda text: probed.append(way) is None).holds([1] * 10, 5)

    assert holds(base)
    for seed in range(2):
        torch.manual_seed(seed)
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        assert holds(model)
        base = model.unload()
    assert holds(base)
    assert len(probed) == 2
    assert holds(base, "padding")
    assert holds(build_model("llama"))
    assert holds(base.to(torch.bfloat16))
    assert probed[2:] == ["padding", "lockstep", "lockstep"]


def test_windows_are_found_in_nested_configs() -> None:
    lengths = [
        Exactness(build_model(name), "", bool)._lengths for name in ("gemma3", "mistral", "llama4_text", "llama")
    ]
    assert [16 in found for found in lengths] == [True, True, True, False]


def test_logits_agree_up_to_rounding_and_a_common_offset() -> None:
    expected = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    assert logits_agree(expected + 1e-4 * noise + 5, expected, 1e-3)
    assert not logits_agree(expected + 1e-2 * noise, expected, 1e-3)
    assert not logits_agree(expected * torch.nan, expected, 1e-3)
