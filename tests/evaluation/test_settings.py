from __future__ import annotations

import re
from typing import Any

import pytest

from snake_lora_pl.errors import UserError
from snake_lora_pl.evaluation.settings import PlaySettings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reading", "guess"),
        ("style", "bfs"),
        ("teacher", "bsf"),
        ("seed", -1),
        ("grid_size", 1),
        ("grid_size", 257),
        ("max_steps", 0),
        ("max_steps_without_apple", 0),
        ("batch_size", 0),
        ("val_games", -1),
        ("every_n_epochs", 0),
        ("test_games", 0),
        ("test_games", 1_000_001),
        ("final_games", 1_000_001),
    ],
)
def test_value_out_of_range_is_rejected_with_its_key(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"play\.{name}\b.*{re.escape(str(value))}\b"):
        PlaySettings(**{name: value})


def test_all_invalid_values_are_reported_at_once() -> None:
    with pytest.raises(UserError) as error:
        PlaySettings(reading="guess", style="bfs", teacher="bsf", seed=-1, max_steps=0)  # type: ignore[arg-type]
    assert all(f"play.{name}" in str(error.value) for name in ("reading", "style", "teacher", "seed", "max_steps"))


def test_legal_mask_needs_score() -> None:
    with pytest.raises(UserError, match=r"play\.legal_mask.*play\.reading"):
        PlaySettings(legal_mask=True)
    assert PlaySettings(legal_mask=True, reading="score").legal_mask


def test_starvation_limit_defaults_to_four_times_the_cells() -> None:
    assert PlaySettings().loop(5)["max_steps_without_apple"] == 100
    assert PlaySettings(max_steps_without_apple=7).loop(5)["max_steps_without_apple"] == 7
