from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.tuners.miss.layer import MissLayer
from transformers import GPT2Config, GPT2LMHeadModel

from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.adapters.factory import AdapterFactory
from snake_lora_pl.adapters.temporary_merge import temporarily_merged
from snake_lora_pl.errors import UserError
from tests.architectures import build_model

IDS = torch.tensor([[5, 9, 30, 7]])


@pytest.mark.parametrize("rank", [4, 5])
def test_each_shard_of_the_input_is_multiplied_by_the_same_matrix(tiny_llama_dir: Path, rank: int) -> None:
    torch.manual_seed(0)
    model = AdapterFactory.create("miss", str(tiny_llama_dir), LoRAConfig(rank=rank, dropout=0.0), dtype="float32")
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    layer = next(module for module in model.modules() if isinstance(module, MissLayer))
    x = torch.randn(3, 32)
    shared = layer.miss_block["default"]  # (rank, out_features)
    expected = layer.get_base_layer()(x) + sum(
        x[:, start : start + rank] @ shared[: x[:, start : start + rank].shape[1]] for start in range(0, 32, rank)
    )
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        before = model.eval()(input_ids=IDS).logits
        with temporarily_merged(model):
            torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(input_ids=IDS).logits, before)


def test_rank_above_the_input_features_is_rejected(tiny_llama_dir: Path) -> None:
    with pytest.raises(UserError, match=r"model\.lora\.rank: 33.*32.*q_proj"):
        AdapterFactory.create("miss", str(tiny_llama_dir), LoRAConfig(rank=33))


@pytest.mark.parametrize("adapter_type", ["miss", "shira"])
def test_layers_that_are_not_linear_are_rejected(adapter_type: str) -> None:
    base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(UserError, match=rf"'{adapter_type}'.*c_attn.*Conv1D"):
        AdapterFactory.create(adapter_type, base, LoRAConfig(rank=2))


@pytest.mark.parametrize("adapter_type", ["miss", "shira"])
@pytest.mark.parametrize(
    ("model_type", "target"), [("llama", "c_attn"), ("mamba", "dt_proj"), ("bamba", "out_proj"), ("mllama", "fc1")]
)
def test_targets_that_are_missing_or_cannot_be_trained_are_rejected(
    adapter_type: str, model_type: str, target: str
) -> None:
    with pytest.raises(UserError, match=rf"model\.lora\.target_modules: '{target}'"):
        AdapterFactory.create(adapter_type, build_model(model_type), LoRAConfig(rank=2, target_modules=[target]))
