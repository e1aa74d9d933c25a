from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.shira import ShiraLayer
from safetensors.torch import load_file

from snake_lora_pl.adapters import store
from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.adapters.factory import AdapterFactory
from snake_lora_pl.adapters.shira import random_mask
from snake_lora_pl.adapters.temporary_merge import temporarily_merged
from snake_lora_pl.errors import UserError
from tests.adapters.conftest import rewrite_weights, save_adapter

IDS = torch.tensor([[5, 9, 30, 7]])


@pytest.fixture
def model(tiny_llama_dir: Path) -> PeftModel:
    torch.manual_seed(0)
    model = AdapterFactory.create("shira", str(tiny_llama_dir), LoRAConfig(rank=2), dtype="float32")
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def logits(model: PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_mask_is_the_same_on_every_device_and_has_as_many_entries_as_a_lora() -> None:
    layer = torch.nn.Linear(6, 8)
    mask = random_mask(layer, 2, 5)
    assert mask.shape == (8, 6)
    assert mask.sum() == 2 * (6 + 8)
    assert torch.equal(random_mask(layer.to("meta"), 2, 5), mask)
    assert not torch.equal(random_mask(layer, 2, 6), mask)


def test_only_the_drawn_entries_of_a_weight_change(model: PeftModel) -> None:
    layers = [module for module in model.modules() if isinstance(module, ShiraLayer)]
    assert len(layers) == 8
    for layer in layers:
        before = layer.get_base_layer().weight.clone()
        layer.merge()
        changed = layer.get_base_layer().weight != before
        assert torch.equal(changed, random_mask(layer.get_base_layer(), 2))


def test_temporarily_merged_layers_compute_the_same(model: PeftModel) -> None:
    before = logits(model)
    with temporarily_merged(model) as num_layers:
        assert num_layers == 8
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), before)


def test_saved_indices_are_loaded(model: PeftModel, tiny_llama_dir: Path, tmp_path: Path) -> None:
    for layer in model.modules():
        if isinstance(layer, ShiraLayer):
            layer.shira_indices["default"] = layer.shira_indices["default"].flip(1)
    directory = save_adapter(model, tmp_path / "adapter", tiny_llama_dir, "shira")
    assert torch.equal(logits(AdapterFactory.load(directory, dtype="float32")), logits(model))


@pytest.mark.parametrize("value", [-1, 10**6])
def test_index_outside_the_weight_is_rejected(
    model: PeftModel, tiny_llama_dir: Path, tmp_path: Path, value: int
) -> None:
    directory = save_adapter(model, tmp_path / "adapter", tiny_llama_dir, "shira")
    tensors = load_file(directory / store.WEIGHTS_FILE)
    key = next(name for name in sorted(tensors) if name.endswith("shira_indices"))
    tensors[key][1, 0] = value
    rewrite_weights(directory, tensors)
    with pytest.raises(UserError, match=r"shira_indices.*\d+x32"):
        AdapterFactory.load(directory)
    rewrite_weights(directory, {**tensors, key: tensors[key].float()})
    with pytest.raises(UserError, match="shira_indices.*float32"):
        AdapterFactory.load(directory)


def test_index_outside_the_weight_in_a_checkpoint_is_rejected(model: PeftModel) -> None:
    shira = AdapterFactory.get_adapter_type("shira")
    state = shira.state(model)
    name = sorted(state)[0]
    for damaged in (state[name] + 1000, state[name][:, :3]):
        with pytest.raises(ValueError, match=f"{name}.shira_indices"):
            shira.load_state(model, {**state, name: damaged})
    shira.load_state(model, state)


def test_rank_that_trains_more_than_all_weights_is_rejected(tiny_llama_dir: Path) -> None:
    with pytest.raises(UserError, match=r"model\.lora\.rank: 30"):
        AdapterFactory.create("shira", str(tiny_llama_dir), LoRAConfig(rank=30))
