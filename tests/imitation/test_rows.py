"""Rows of visited states: which are kept, with which weight, and the file format."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from snake_lora_pl.data.jsonl import read_rows
from snake_lora_pl.errors import UserError
from snake_lora_pl.game import STYLES, Board, Game, Move, get_seeded_teacher, read_move
from snake_lora_pl.imitation.rows import (
    as_data_rows,
    content_hash,
    encode_rows,
    read_round,
    rows_of,
    write_round,
)
from snake_lora_pl.imitation.settings import ImitationSettings
from snake_lora_pl.imitation.visits import STATE_TYPES, StateType, VisitedGame, VisitedState

BOARD = Board(5, ((2, 2), (2, 1)), (4, 4))
NO_WEIGHTS = {f"weight_{name}": 0.0 for name in STATE_TYPES}


def game_of(*types: set[StateType]) -> VisitedGame:
    """Return a game with one state per set of types."""
    game = VisitedGame(41, 7_000_041, Game(5, 0), get_seeded_teacher("bfs"), 8, random.Random(0))
    game.states = [VisitedState(BOARD, 10 + i, Move.UP, state_types) for i, state_types in enumerate(types)]
    return game


def weights(settings: ImitationSettings, *types: set[StateType], style: str = "compact") -> list[tuple[float, str]]:
    rows = rows_of(game_of(*types), STYLES[style], settings)
    return [(row["weight"], row["reason"]) for row in rows]


def test_state_has_the_largest_weight_of_its_types() -> None:
    settings = ImitationSettings(weight_agreement=1, weight_decisive=2, weight_disagreement=3, weight_trap=9)
    assert weights(
        settings, {"agreement"}, {"agreement", "decisive"}, {"disagreement"}, {"disagreement", "decisive", "trap"}
    ) == [(1, "agreement"), (2, "decisive"), (3, "disagreement"), (9, "trap")]


@pytest.mark.parametrize("kept", STATE_TYPES)
def test_states_of_weight_zero_are_dropped(kept: StateType) -> None:
    settings = ImitationSettings(**{**NO_WEIGHTS, f"weight_{kept}": 2.0})
    types: list[set[StateType]] = [{name} for name in STATE_TYPES]
    assert weights(settings, *types) == [(2.0, kept)]
    assert weights(settings, set(STATE_TYPES)) == [(2.0, kept)]


@pytest.mark.parametrize("style", STYLES)
def test_row_has_the_prompt_and_the_move_of_the_teacher_in_each_style(style: str) -> None:
    (row,) = rows_of(game_of({"agreement"}), STYLES[style], ImitationSettings())
    assert row["prompt"] == STYLES[style].write_prompt(BOARD)
    assert read_move(row["completion"]) is Move.UP
    assert (row["game"], row["seed"], row["step"]) == (41, 7_000_041, 10)


def test_file_is_training_data(tmp_path: Path) -> None:
    rows = rows_of(game_of({"agreement"}, {"trap"}), STYLES["compact"], ImitationSettings())
    content = encode_rows(rows)
    path = tmp_path / "rounds" / "000.jsonl"
    write_round(path, content)
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    assert list(read_rows([path])) == as_data_rows(rows, path)
    assert read_round(path, content_hash(content)) == rows


def test_round_without_rows_is_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "000.jsonl"
    write_round(path, encode_rows([]))
    assert path.read_bytes() == b""
    assert read_round(path, content_hash(b"")) == []


def test_missing_and_changed_files_are_errors_with_their_path(tmp_path: Path) -> None:
    path = tmp_path / "000.jsonl"
    with pytest.raises(UserError, match=r"000\.jsonl"):
        read_round(path, content_hash(b""))
    path.write_bytes(b"{}\n")
    with pytest.raises(UserError, match=r"000\.jsonl"):
        read_round(path, content_hash(b""))
