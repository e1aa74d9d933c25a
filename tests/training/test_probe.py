from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.errors import UserError
from snake_lora_pl.training.logit_transform import IDENTITY, LogitTransform
from tests.architectures import save_model
from tests.training.conftest import collate, make_rows

TRANSFORMED: dict[str, tuple[dict[str, Any], LogitTransform]] = {
    "gemma2": ({}, LogitTransform(cap=5.0)),
    "granite": ({}, LogitTransform(scale=0.25)),
    "cohere": ({}, LogitTransform(scale=0.5)),
    "cohere2": ({}, LogitTransform(scale=0.5)),
    "falcon_h1": ({"lm_head_multiplier": 0.3}, LogitTransform(scale=0.3)),
    "recurrent_gemma": ({"logits_soft_cap": 3.0}, LogitTransform(cap=3.0)),
    # Named like a scale, but not used by the model.
    "mpt": ({"logit_scale": 3.0}, IDENTITY),
}


@pytest.fixture
def make_architecture(make_module, tiny_llama_dir: Path, tmp_path: Path):
    def make(model_type: str, dtype: str = "float32", **overrides: Any) -> Any:
        directory = save_model(model_type, tmp_path / model_type, tiny_llama_dir, **overrides)
        target = {"mpt": "Wqkv", "bert": "query"}.get(model_type, "q_proj")
        lora = LoRAConfig(rank=2, alpha=4, dropout=0.0, target_modules=[target])
        module = make_module(base_model=str(directory), dtype=dtype, lora=lora)
        module.configure_model()
        return module

    return make


@pytest.mark.parametrize("model_type", TRANSFORMED)
def test_loss_and_gradients_are_those_of_the_models_own_logits(make_architecture, model_type: str) -> None:
    overrides, transform = TRANSFORMED[model_type]
    module = make_architecture(model_type, **overrides)
    assert module._logit_transform == pytest.approx(transform)
    adapter = [p for p in module.parameters() if p.requires_grad]
    for parameter in adapter:
        nn.init.normal_(parameter, std=0.1)
    batch = collate(make_rows(5))

    logits = module.peft_model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    expected_gradients = torch.autograd.grad(expected, adapter)
    loss = module.training_step(batch, 0)
    gradients = torch.autograd.grad(loss, adapter)

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))
    module.validation_step(batch, 0)
    num_targets = int((batch["labels"] != -100).sum())
    torch.testing.assert_close(module.val_loss.compute(), expected.detach() / num_targets, rtol=1e-5, atol=0)


@pytest.mark.parametrize("model_type", TRANSFORMED)
def test_transform_is_found_in_bfloat16_too(make_architecture, model_type: str) -> None:
    overrides, transform = TRANSFORMED[model_type]
    assert make_architecture(model_type, "bfloat16", **overrides)._logit_transform == pytest.approx(transform)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_soft_cap_much_larger_than_the_logits_is_found(make_architecture, dtype: str) -> None:
    module = make_architecture("gemma2", dtype, final_logit_softcapping=50.0)
    assert module._logit_transform == LogitTransform(cap=50.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_that_transform_hidden_states_in_the_head_are_refused_for_it(make_architecture, dtype: str) -> None:
    with pytest.raises(UserError, match=r"BertLMHeadModel transforms the hidden states before its output head"):
        make_architecture("bert", dtype, is_decoder=True)


def test_unknown_change_of_the_logits_is_refused(make_module, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def biased(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = output.logits + torch.linspace(-1, 1, output.logits.shape[-1])
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", biased)
    with pytest.raises(UserError, match=r"LlamaForCausalLM changes its logits after its output head"):
        make_module().configure_model()


def test_fused_layers_with_other_logits_are_refused(make_module, monkeypatch: pytest.MonkeyPatch) -> None:
    from snake_lora_pl.training.fused import FusedDecoder

    target_states = FusedDecoder.target_states
    monkeypatch.setattr(FusedDecoder, "target_states", lambda self, packed: target_states(self, packed).roll(1, -1))
    with pytest.raises(UserError, match=r"fused.*model\.fused_layers=never"):
        make_module().configure_model()


@pytest.mark.parametrize("fused_layers", ["auto", "never"])
def test_nonfinite_logits_name_the_model(make_module, fused_layers: str) -> None:
    module = make_module(fused_layers=fused_layers)
    module.configure_model()
    nn.init.constant_(module.peft_model.get_base_model().model.norm.weight, torch.inf)
    with pytest.raises(UserError, match=r"model\.base_model .*not finite.*float32"):
        module._check_model()
