"""Adapters initialized from the base weights, compared with PEFT's implementation, which changes the base."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.adapters.lora import build_lora
from snake_lora_pl.adapters.temporary_merge import temporarily_merged
from snake_lora_pl.errors import UserError

IDS = torch.tensor([[5, 9, 30, 7, 12, 44]])


@pytest.fixture(params=["llama", "gpt2"])
def bases(request: pytest.FixtureRequest, tiny_llama_dir: Path) -> list[PreTrainedModel]:
    """Two copies of a model; GPT-2's weights are transposed."""
    if request.param == "llama":
        return [LlamaForCausalLM.from_pretrained(tiny_llama_dir).eval() for _ in range(2)]
    config = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(GPT2LMHeadModel(config).eval())
    return models


def perturb(model: PeftModel) -> None:
    """Perturb the factors, identically in every model."""
    generator = torch.Generator().manual_seed(1)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_rslora", [False, True])
# PEFT's OLoRA does not support GPT-2's transposed layers.
@pytest.mark.parametrize(
    ("bases", "method"), [("llama", "pissa"), ("llama", "olora"), ("gpt2", "pissa")], indirect=["bases"]
)
def test_logits_and_gradients_equal_those_of_peft_and_the_base_is_unchanged(
    bases: list[PreTrainedModel], method: str, use_rslora: bool
) -> None:
    ours, theirs = bases
    targets = "c_attn" if isinstance(ours, GPT2LMHeadModel) else "v_proj"
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    options = {"use_rslora": use_rslora, "init_lora_weights": method}
    own = build_lora(ours, LoRAConfig(rank=4, alpha=6, dropout=0.0, target_modules=[targets], **options))
    peft = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=6, target_modules=[targets], **options))
    for model in (own, peft):
        model.eval()
        perturb(model)
    torch.testing.assert_close(own(input_ids=IDS).logits, peft(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    expected = gradients(peft)
    for name, gradient in gradients(own).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)
    after = {n.replace("base_layer.", ""): v for n, v in own.get_base_model().state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("method", ["pissa", "pissa_niter_64", "olora"])
def test_adapter_starts_as_a_part_of_the_weight_without_changing_logits(
    bases: list[PreTrainedModel], method: str
) -> None:
    base, other = bases
    targets = "c_attn" if isinstance(base, GPT2LMHeadModel) else "v_proj"
    config = LoRAConfig(rank=4, dropout=0.0, target_modules=[targets], init_lora_weights=method)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*zero-element.*")
        model = build_lora(base, config).eval()
    torch.testing.assert_close(model(input_ids=IDS).logits, other(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
    perturb(model)
    perturbed = model(input_ids=IDS).logits
    with temporarily_merged(model) as num_merged:
        torch.testing.assert_close(model(input_ids=IDS).logits, perturbed, rtol=1e-4, atol=1e-4)
    assert num_merged == 2
    layer = next(m for m in model.modules() if hasattr(m, "initial_A"))
    weight = layer.get_base_layer().weight.T if layer.fan_in_fan_out else layer.get_base_layer().weight
    part = layer.scaling["default"] * layer.initial_B @ layer.initial_A
    if method == "olora":
        q, r = torch.linalg.qr(weight)
        expected = layer.scaling["default"] * q[:, :4] @ r[:4]
        torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-5)
    else:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        exact = left[:, :4] * values[:4] @ right[:4]
        assert (part - exact).norm() < (1e-4 if method == "pissa" else 0.05) * exact.norm()


def test_rank_above_that_of_a_weight_is_rejected(bases: list[PreTrainedModel]) -> None:
    targets = "c_attn" if isinstance(bases[0], GPT2LMHeadModel) else "v_proj"
    with pytest.raises(UserError, match=rf"rank 20 .*16.*{targets}"):
        build_lora(bases[0], LoRAConfig(rank=20, target_modules=[targets], init_lora_weights="pissa"))
