from __future__ import annotations

from snake_lora_pl.adapters.registry import get_adapter_type, saved_conventions


def test_saved_rank_is_the_largest_of_any_layer() -> None:
    assert get_adapter_type("lora").saved_rank({"r": 16, "rank_pattern": {"q_proj": 64}}) == 64
    assert get_adapter_type("adalora").saved_rank({"r": 8, "init_r": 12, "rank_pattern": {"x": [True]}}) == 12
    assert get_adapter_type("lora").saved_rank({"peft_type": "IA3"}) is None


def test_conventions_of_lora_apply_to_adapter_types_that_are_not_registered() -> None:
    assert saved_conventions("unknown") is get_adapter_type("lora")
    assert saved_conventions("adalora") is get_adapter_type("adalora")
