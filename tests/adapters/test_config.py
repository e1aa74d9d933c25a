from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from snake_lora_pl.adapters.config import PRESETS, LoRAConfig
from snake_lora_pl.errors import UserError
from snake_lora_pl.paths import shipped_configs


def test_defaults_are_those_of_the_balanced_preset() -> None:
    assert LoRAConfig() == LoRAConfig.preset("balanced")
    assert LoRAConfig() == LoRAConfig(16, 32, 0.05, ["q_proj", "k_proj", "v_proj", "o_proj"])


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_is_also_a_config_with_the_same_values(name: str) -> None:
    content = yaml.safe_load(Path(shipped_configs()[f"{name}.yaml"]).read_text())
    assert LoRAConfig(**content["model"]["lora"]) == LoRAConfig.preset(name)


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="lightweight, balanced, high_capacity.*Did you mean 'balanced'"):
        LoRAConfig.preset("balance")


def test_every_value_out_of_range_is_reported_at_once() -> None:
    with pytest.raises(UserError, match=r"rank must.*alpha must.*dropout must.*target_modules is empty"):
        LoRAConfig(rank=0, alpha=-1, dropout=1.0, target_modules=[])


def test_two_configs_do_not_share_their_list_of_layers() -> None:
    LoRAConfig().target_modules.append("gate_proj")  # type: ignore[union-attr]
    assert LoRAConfig().target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
