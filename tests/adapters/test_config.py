from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from snake_lora_pl.__main__ import main
from snake_lora_pl.adapters.config import PRESETS, LoRAConfig
from snake_lora_pl.errors import UserError
from snake_lora_pl.paths import shipped_configs


def test_defaults_equal_the_balanced_preset() -> None:
    assert LoRAConfig() == LoRAConfig.preset("balanced")
    assert LoRAConfig() == LoRAConfig(16, 32, 0.05, ["q_proj", "k_proj", "v_proj", "o_proj"])


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_equals_the_shipped_config_of_that_name(name: str) -> None:
    content = yaml.safe_load(Path(shipped_configs()[f"{name}.yaml"]).read_text())
    assert LoRAConfig(**content["model"]["lora"]) == LoRAConfig.preset(name)


def test_unknown_preset_is_reported_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="lightweight, balanced, high_capacity.*Did you mean 'balanced'"):
        LoRAConfig.preset("balance")


def test_all_invalid_values_are_reported_at_once() -> None:
    with pytest.raises(UserError, match="rank.*alpha.*dropout.*target_modules"):
        LoRAConfig(rank=0, alpha=-1, dropout=1.0, target_modules=[])


def test_configs_do_not_share_their_list_of_target_modules() -> None:
    LoRAConfig().target_modules.append("gate_proj")  # type: ignore[union-attr]
    assert LoRAConfig().target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "eva"}, "init_lora_weights.*true, gaussian, .*'eva'"),
        ({"init_lora_weights": False}, "init_lora_weights.*'False'"),
        ({"init_lora_weights": "pissa_niter_0"}, "init_lora_weights.*'pissa_niter_0'"),
        ({"init_lora_weights": "olora", "use_dora": True}, "init_lora_weights=olora.*use_dora"),
        ({"init_lora_weights": "orthogonal", "rank": 3}, "init_lora_weights=orthogonal.*even"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.*16,384.*'q_proj': 0"),
        ({"alpha_pattern": {"q_proj": 0.0}}, "alpha_pattern.*'q_proj': 0.0"),
        ({"rank_pattern": {"(": 2}}, r"'\(' in rank_pattern or alpha_pattern"),
        ({"loraplus_lr_ratio": 0.5}, "loraplus_lr_ratio.*0.5"),
    ],
)
def test_invalid_setting_is_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LoRAConfig(**settings)


@pytest.mark.parametrize("overlay", ["qlora", "adalora"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.e2e
def test_overlay_changes_only_the_adapter_type_of_a_preset(
    preset: str, overlay: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def resolved(*names: str) -> dict[str, Any]:
        with pytest.raises(SystemExit, match="0"):
            main(["fit", *(part for name in names for part in ("--config", f"{name}.yaml")), "--print_config"])
        return yaml.safe_load(capsys.readouterr().out)["model"]

    plain = resolved(preset)
    assert plain["adapter_type"] == "lora"
    assert resolved(preset, overlay) == {**plain, "adapter_type": overlay}
