from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from snake_lora_pl.adapters.temporary_merge import temporarily_merged

IDS = torch.tensor([[5, 9, 2, 7, 30, 4]])


def adapted(base: torch.nn.Module, targets: list[str], is_adalora: bool = False, **settings: object) -> PeftModel:
    """Return a model with a random adapter."""
    torch.manual_seed(1)
    settings = {"target_modules": targets, "task_type": "CAUSAL_LM"} | settings
    config = AdaLoraConfig(init_r=4, total_step=10, **settings) if is_adalora else LoraConfig(r=4, **settings)
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_E" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def llama(directory: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(directory, dtype=dtype)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2))


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {}),
        ("llama", {"use_dora": True}),
        ("llama", {"use_rslora": True}),
        ("llama", {"is_adalora": True}),
        ("gpt2", {}),
        ("gpt2", {"lora_bias": True}),  # Llama's layers have no bias
    ],
)
def test_merged_layers_compute_the_same_without_the_adapter(
    tiny_llama_dir: Path, architecture: str, settings: dict
) -> None:
    if architecture == "gpt2":
        model = adapted(gpt2(), ["c_attn", "c_proj"], **({"fan_in_fan_out": True} | settings))
    else:
        model = adapted(llama(tiny_llama_dir), ["q_proj", "v_proj", "down_proj"], **settings)
    before = logits(model)
    with model.disable_adapter():
        assert (logits(model) - before).abs().max() > 1e-2  # the adapter has an effect
    with temporarily_merged(model) as num_merged:
        assert num_merged == 6
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.zero_()
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_is_restored_bit_for_bit_even_after_an_error(tiny_llama_dir: Path, dtype: torch.dtype) -> None:
    model = adapted(llama(tiny_llama_dir, dtype), ["q_proj", "o_proj"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pointers = {name: value.data_ptr() for name, value in model.state_dict().items()}
    output = logits(model)
    with pytest.raises(RuntimeError, match="lost"), temporarily_merged(model):
        assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
        raise RuntimeError("lost")
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name: value.data_ptr() for name, value in after.items()} == pointers
    assert torch.equal(logits(model), output)


def test_disabled_adapter_is_not_merged(tiny_llama_dir: Path) -> None:
    model = adapted(llama(tiny_llama_dir), ["q_proj"])
    plain = logits(llama(tiny_llama_dir).eval())
    with model.disable_adapter(), temporarily_merged(model) as num_merged:
        assert num_merged == 0
        assert torch.equal(logits(model), plain)


def test_tied_weights_are_not_merged(tiny_llama_dir: Path) -> None:
    model = adapted(llama(tiny_llama_dir), ["q_proj", "lm_head"])
    assert model.get_base_model().lm_head.weight is model.get_base_model().model.embed_tokens.weight
    before = logits(model)
    with temporarily_merged(model) as num_merged:
        assert num_merged == 2
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_quantized_weights_are_not_merged(tiny_llama_dir: Path) -> None:
    from transformers import BitsAndBytesConfig

    quantized = LlamaForCausalLM.from_pretrained(
        tiny_llama_dir, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    model = adapted(quantized, ["q_proj"])
    with temporarily_merged(model) as num_merged:
        assert num_merged == 0


def test_nested_merge_merges_nothing_twice(tiny_llama_dir: Path) -> None:
    model = adapted(llama(tiny_llama_dir), ["q_proj"])
    before = logits(model)
    with temporarily_merged(model), temporarily_merged(model) as num_merged:
        assert num_merged == 0
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), before)


def test_model_without_an_adapter_is_unchanged(tiny_llama_dir: Path) -> None:
    with temporarily_merged(llama(tiny_llama_dir)) as num_merged:
        assert num_merged == 0
