"""Checks of the settings of imitation."""

from __future__ import annotations

import pytest

from snake_lora_pl.errors import UserError
from snake_lora_pl.imitation.settings import ImitationSettings
from snake_lora_pl.imitation.visits import STATE_TYPES


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"every_n_steps": -1}, "imitate.every_n_steps"),
        ({"num_games": 0}, "imitate.num_games"),
        ({"max_states": 0}, "imitate.max_states"),
        ({"num_games": 5, "max_states": 4}, "imitate.max_states"),
        ({"warm_starts": 1.5}, "imitate.warm_starts"),
        ({"teacher_share": -0.1}, "imitate.teacher_share"),
        ({"teacher_share_rounds": 0}, "imitate.teacher_share_rounds"),
        ({"rows_share": float("nan")}, "imitate.rows_share"),
        ({"seed": 10**9}, "imitate.seed"),
        ({"weight_trap": -1.0}, "imitate.weight_trap"),
        ({"weight_trap": float("inf")}, "imitate.weight_trap"),
        ({"teacher": "nobody"}, "imitate.teacher"),
        ({f"weight_{name}": 0.0 for name in STATE_TYPES}, "imitate.weight_"),
    ],
)
def test_value_out_of_range_is_an_error_with_its_key(values: dict[str, float], key: str) -> None:
    with pytest.raises(UserError, match=key):
        ImitationSettings(**values)


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(UserError, match=r"imitate\.num_games.*imitate\.rows_share"):
        ImitationSettings(num_games=0, rows_share=2)


def test_each_state_type_has_a_weight() -> None:
    settings = ImitationSettings(weight_trap=7.0)
    assert settings.weight_of("trap") == 7.0
    assert all(settings.weight_of(name) > 0 for name in STATE_TYPES)


def test_teacher_share_falls_linearly_to_none() -> None:
    settings = ImitationSettings(teacher_share=0.8, teacher_share_rounds=4)
    assert [settings.teacher_share_of(number) for number in range(6)] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0, 0])
