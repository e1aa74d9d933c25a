from __future__ import annotations

from pathlib import Path

import pytest

from snake_lora_pl.data.data_files import expand_paths
from snake_lora_pl.data.game_counter import GameCounter
from snake_lora_pl.data.generated_rows import generate_rows
from snake_lora_pl.data.jsonl import Row, read_rows
from tests.data.conftest import games_of_steps, position

SHARED_DIR = Path(__file__).parents[3] / "shared" / "data" / "heuristics_v0.04"


def games_of(rows: list[dict]) -> list[int]:
    counter = GameCounter()
    return [
        counter.game_of(Row(row["prompt"], row["completion"], row.get("game"), "x", line))
        for line, row in enumerate(rows)
    ]


def test_game_begins_at_a_position_that_does_not_follow_from_the_previous_move():
    assert games_of(games_of_steps(3, 1, 4)) == [0, 0, 0, 1, 2, 2, 2, 2]


def test_rows_that_name_their_game_belong_to_it_in_any_order():
    named = [{**position(5, 5, "UP"), "game": game} for game in "abab"]
    assert games_of(named) == [0, 1, 0, 1]
    assert games_of([named[0], *games_of_steps(2), named[1], named[0]]) == [0, 1, 1, 2, 0]


def test_each_row_of_an_unknown_format_is_a_game():
    unknown = {"prompt": "p", "completion": "c"}
    assert games_of([unknown, unknown, *games_of_steps(2), unknown]) == [0, 1, 2, 2, 3]


@pytest.mark.parametrize("style", ["features", "cycle"])
def test_prompts_without_the_head_are_one_game_while_the_length_stays_or_grows_by_one(style):
    rows = list(generate_rows(3, 6, "safe_greedy", style))
    assert games_of([dict(row) | {"game": None} for row in rows]) == [row["game"] for row in rows]


@pytest.mark.skipif(not SHARED_DIR.is_dir(), reason="needs the shared heuristics-v0.04 files next to the repository")
def test_upstream_file_has_forty_games():
    counter = GameCounter()
    games = [
        counter.game_of(row)
        for row in read_rows(expand_paths(str(SHARED_DIR / "grid-size-10" / "bfs-512" / "*.jsonl")))
    ]
    assert (len(games), counter.num_games) == (5348, 40)
