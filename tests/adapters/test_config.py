from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from snake_lora_pl.__main__ import main
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "eva"}, "init_lora_weights must be one of true, gaussian, .* not 'eva'"),
        ({"init_lora_weights": False}, "init_lora_weights must be one of .* not 'False'"),
        ({"init_lora_weights": "pissa_niter_0"}, "init_lora_weights must be one of"),
        ({"init_lora_weights": "olora", "use_dora": True}, "init_lora_weights=olora does not go with use_dora"),
        ({"init_lora_weights": "orthogonal", "rank": 3}, "needs even ranks"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern must hold ranks between 1 and 16,384"),
        ({"alpha_pattern": {"q_proj": 0.0}}, "alpha_pattern must hold alphas above 0"),
        ({"rank_pattern": {"(": 2}}, r"'\(' in rank_pattern or alpha_pattern is no regular expression"),
        ({"loraplus_lr_ratio": 0.5}, "loraplus_lr_ratio must be at least 1, not 0.5"),
    ],
)
def test_an_option_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LoRAConfig(**settings)


@pytest.mark.parametrize("overlay", ["qlora", "adalora"])
@pytest.mark.parametrize("preset", PRESETS)
def test_an_overlay_changes_the_kind_of_a_preset_and_none_of_its_settings(
    preset: str, overlay: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def resolved(*names: str) -> dict[str, Any]:
        with pytest.raises(SystemExit, match="0"):
            main(["fit", *(part for name in names for part in ("--config", f"{name}.yaml")), "--print_config"])
        return yaml.safe_load(capsys.readouterr().out)["model"]

    plain = resolved(preset)
    assert plain["adapter_type"] == "lora"
    assert resolved(preset, overlay) == {**plain, "adapter_type": overlay}
