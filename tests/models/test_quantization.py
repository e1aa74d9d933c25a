from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from snake_lora_pl.adapters.qlora import dequantize_base
from snake_lora_pl.errors import UserError
from snake_lora_pl.models import QuantizationConfig, load_base_model
from snake_lora_pl.models.quantization import (
    bitsandbytes_config,
    compute_dtype,
    full_weight_bytes,
    quantization_of,
    weight_bytes,
)
from tests.architectures import save_model

bnb = pytest.importorskip("bitsandbytes")

IDS = torch.tensor([[5, 9, 30, 7, 120, 44]])
ALL = [
    QuantizationConfig(),
    QuantizationConfig(quant_type="fp4", double_quant=False),
    QuantizationConfig(storage_dtype="bfloat16"),
    QuantizationConfig(bits=8),
]


def load(tiny_llama_dir: Path, quantization: QuantizationConfig | None, dtype: str = "float32") -> LlamaForCausalLM:
    return load_base_model(str(tiny_llama_dir), dtype=dtype, quantization=quantization)


def input_gradient(model: LlamaForCausalLM) -> torch.Tensor:
    """Return the gradient of a loss with respect to the embeddings; it passes through every linear layer."""
    embedded = model.get_input_embeddings()(IDS).detach().float().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits.float()
    torch.nn.functional.cross_entropy(logits[0, :-1], IDS[0, 1:]).backward()
    assert embedded.grad is not None
    return embedded.grad


@pytest.mark.parametrize("quantization", ALL, ids=str)
def test_all_linear_layers_except_the_lm_head_are_quantized(
    tiny_llama_dir: Path, quantization: QuantizationConfig
) -> None:
    model = load(tiny_llama_dir, quantization)
    wanted = bnb.nn.Linear8bitLt if quantization.bits == 8 else bnb.nn.Linear4bit
    assert type(model.model.layers[0].self_attn.q_proj) is wanted
    assert type(model.lm_head) is torch.nn.Linear
    assert quantization_of(model) == quantization
    assert quantization_of(load(tiny_llama_dir, None)) is None


@pytest.mark.parametrize("quantization", ALL, ids=str)
def test_dequantized_base_computes_the_same_as_the_quantized_base(
    tiny_llama_dir: Path, quantization: QuantizationConfig
) -> None:
    # In evaluation mode LLM.int8() also rounds activations, which dequantized weights cannot reproduce.
    model = load(tiny_llama_dir, quantization).train()
    logits = model(IDS).logits
    full = load(tiny_llama_dir, None)(IDS).logits
    plain = dequantize_base(model)
    assert type(plain.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    torch.testing.assert_close(plain(IDS).logits, logits, rtol=1e-3, atol=1e-3)
    assert (logits - full).abs().max() > 1e-2, "quantization changed nothing, so the comparison above is vacuous"


@pytest.mark.parametrize("quantization", ALL, ids=str)
def test_gradients_are_unchanged_by_evaluation_and_equal_those_of_the_dequantized_base(
    tiny_llama_dir: Path, quantization: QuantizationConfig
) -> None:
    model = load(tiny_llama_dir, quantization).train()
    before = input_gradient(model)
    with torch.no_grad():
        model.eval()(IDS)
    assert torch.equal(input_gradient(model.train()), before)
    torch.testing.assert_close(input_gradient(dequantize_base(model)), before, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="needs a CPU with AVX512-BF16")
def test_bitsandbytes_still_repacks_weights_in_evaluation(tmp_path: Path) -> None:
    """If this fails, the workaround in ``make_trainable`` is no longer needed."""
    # Repacking requires at least 64 inputs.
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.3, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = load(tmp_path, QuantizationConfig()).train()
    before = input_gradient(model)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        model.eval()(IDS)
    assert not torch.allclose(input_gradient(model.train()), before, rtol=1e-2)


def test_weight_bytes_include_quantization_scales(tiny_llama_dir: Path) -> None:
    full = load(tiny_llama_dir, None)
    size = full.get_memory_footprint() - sum(b.numel() * b.element_size() for b in full.buffers())
    linear = sum(m.weight.numel() for m in full.model.layers.modules() if isinstance(m, torch.nn.Linear))
    assert weight_bytes(full) == full_weight_bytes(full, torch.float32) == size
    for quantization, bytes_per_weight in ((QuantizationConfig(), 0.5), (QuantizationConfig(bits=8), 1.0)):
        model = load(tiny_llama_dir, quantization)
        assert full_weight_bytes(model, torch.float32) == size
        least = size - (4 - bytes_per_weight) * linear
        assert least < weight_bytes(model) < size


def test_layers_compute_in_the_requested_dtype(tiny_llama_dir: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = load(tiny_llama_dir, QuantizationConfig(), str(dtype).removeprefix("torch."))
        assert compute_dtype(model) == dtype
        assert model.model.layers[0].self_attn.q_proj.compute_dtype == dtype
        assert compute_dtype(load(tiny_llama_dir, None, str(dtype).removeprefix("torch."))) == dtype


def test_all_invalid_values_are_reported_at_once() -> None:
    with pytest.raises(UserError, match="bits.*3.*quant_type.*'nf5'.*storage_dtype.*'int4'"):
        QuantizationConfig(bits=3, quant_type="nf5", storage_dtype="int4")
    with pytest.raises(UserError, match="double_quant.*bits=4"):
        QuantizationConfig(bits=8, double_quant=False)


def test_missing_bitsandbytes_is_reported_with_the_command_that_installs_it(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="pip install 'bitsandbytes.*model.adapter_type=lora"):
        load(tiny_llama_dir, QuantizationConfig())


@pytest.fixture
def stored_dir(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """The tiny Llama, stored in 4 bits with another compute dtype than the tests request."""
    config = bitsandbytes_config(QuantizationConfig(double_quant=False), torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(tiny_llama_dir, quantization_config=config).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("requested", [None, QuantizationConfig()], ids=["no request", "defaults"])
def test_weights_that_are_stored_quantized_compute_in_the_requested_dtype_and_are_not_repacked(
    requested: QuantizationConfig | None, stored_dir: Path
) -> None:
    model = load(stored_dir, requested)
    assert quantization_of(model) == QuantizationConfig(double_quant=False)
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 14
    assert {layer.compute_dtype for layer in layers} == {compute_dtype(model)} == {torch.float32}
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    assert weight_bytes(load_base_model(str(stored_dir), dtype="float32", device="meta")) <= weight_bytes(model)


@pytest.mark.parametrize(
    ("requested", "key"),
    [(QuantizationConfig(bits=8), "bits=8"), (QuantizationConfig(quant_type="fp4"), "quant_type=fp4")],
)
def test_quantization_that_contradicts_stored_weights_is_refused(
    requested: QuantizationConfig, key: str, stored_dir: Path
) -> None:
    with pytest.raises(UserError, match=f"model.lora.quantization.{key}"):
        load(stored_dir, requested)


def test_weights_quantized_by_another_library_are_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(UserError, match=r"model\.base_model.*gptq"):
        quantization_of(model)


@pytest.mark.parametrize("bits", [4, 8])
def test_dequantized_gpt2_has_transposed_layers_again(bits: int, tiny_llama_dir: Path, tmp_path: Path) -> None:
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    directory = save_model("gpt2", tmp_path / "gpt2", tiny_llama_dir, **no_dropout)
    original = load(directory, None)
    quantized = load(directory, QuantizationConfig(bits=bits)).train()
    logits = quantized(IDS).logits
    plain = dequantize_base(quantized)
    for name, layer in original.named_modules():
        if isinstance(layer, Conv1D):
            restored = plain.get_submodule(name)
            assert isinstance(restored, Conv1D)
            assert restored.weight.shape == layer.weight.shape
            # A square weight that is not transposed back has the right shape and the wrong values.
            assert torch.corrcoef(torch.stack([restored.weight.flatten(), layer.weight.flatten()]))[0, 1] > 0.95
    torch.testing.assert_close(plain(IDS).logits, logits, rtol=1e-3, atol=1e-3)


def test_estimated_memory_of_quantized_gpt2_includes_its_transposed_layers(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    directory = save_model("gpt2", tmp_path / "gpt2", tiny_llama_dir)
    empty = load_base_model(str(directory), dtype="float32", quantization=QuantizationConfig(), device="meta")
    assert weight_bytes(empty) == pytest.approx(weight_bytes(load(directory, QuantizationConfig())), rel=0.05)
