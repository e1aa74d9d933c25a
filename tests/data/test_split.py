from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snake_lora_pl.data.split import drop_duplicates, split_by_game
from snake_lora_pl.errors import UserError

GAMES = st.lists(st.integers(0, 12), min_size=2, max_size=60).filter(lambda games: len(set(games)) > 1)


def distinct(num_rows: int) -> np.ndarray:
    return np.arange(num_rows, dtype=np.uint64)


@given(GAMES, st.floats(0.001, 0.999), st.integers(0, 5))
def test_split_keeps_games_whole_and_loses_no_row(games, val_fraction, seed):
    games = np.array(games)
    split = split_by_game(games, distinct(len(games)), val_fraction, seed)
    assert sorted([*split.train, *split.val]) == list(range(len(games)))
    assert set(games[split.train]).isdisjoint(games[split.val])
    assert len(split.train) > 0
    assert len(split.val) > 0


@given(GAMES, st.floats(0.001, 0.999), st.integers(0, 5))
def test_no_more_games_validate_than_the_fraction_needs(games, val_fraction, seed):
    games = np.array(games)
    val_games = games[split_by_game(games, distinct(len(games)), val_fraction, seed).val]
    share = len(val_games) / len(games)
    largest = max(np.bincount(val_games)) / len(games)
    assert share - largest < val_fraction or len(set(val_games)) == 1
    assert share >= val_fraction - 1e-9 or len(set(val_games)) == len(set(games)) - 1


@given(GAMES, st.lists(st.integers(0, 9), min_size=60, max_size=60), st.integers(0, 5))
def test_only_training_rows_whose_prompt_validates_are_dropped(games, hashes, seed):
    games, hashes = np.array(games), np.array(hashes, np.uint64)[: len(games)]
    try:
        split = split_by_game(games, hashes, 0.3, seed)
    except UserError:
        return
    assert set(hashes[split.train]).isdisjoint(hashes[split.val])
    removed = set(range(len(games))) - {*split.train, *split.val}
    assert len(removed) == split.num_duplicates
    assert {int(hashes[row]) for row in removed} <= {int(one) for one in hashes[split.val]}


def test_the_split_is_a_function_of_the_seed():
    games = np.repeat(np.arange(50), 3)
    splits = [split_by_game(games, distinct(150), 0.2, seed).val.tolist() for seed in (1, 1, 2)]
    assert splits[0] == splits[1] != splits[2]


def test_game_numbers_without_rows_are_never_chosen():
    games = np.array([1000, 2000])
    assert len(split_by_game(games, distinct(2), 0.1, 0).val) == 1


def test_fraction_of_zero_trains_on_all_rows():
    split = split_by_game(np.zeros(5, int), distinct(5), 0.0, 0)
    assert (split.train.tolist(), split.val.tolist()) == ([0, 1, 2, 3, 4], [])


def test_single_game_trains_without_validation_and_logs_a_warning(caplog):
    split = split_by_game(np.zeros(5, int), distinct(5), 0.1, 0)
    assert (split.train.tolist(), split.val.tolist()) == ([0, 1, 2, 3, 4], [])
    assert [(record.levelname, "data.val_path" in record.message) for record in caplog.records] == [("WARNING", True)]


@pytest.mark.parametrize("val_fraction", [-0.1, 1.0, 10, float("nan")])
def test_fraction_out_of_range_is_an_error(val_fraction):
    with pytest.raises(UserError, match=rf"data\.val_fraction .*{val_fraction}"):
        split_by_game(np.arange(5), distinct(5), val_fraction, 0)


def test_error_if_every_training_prompt_validates():
    with pytest.raises(UserError, match=r"data\.val_path"):
        drop_duplicates(np.arange(3), distinct(3), distinct(3))


def test_dropping_duplicates_drops_exactly_the_equal_hashes():
    generator = np.random.default_rng(0)
    # Some hashes differ in their first bits only.
    hashes = generator.integers(0, 40, 500).astype(np.uint64) << np.uint64(40) | generator.integers(0, 5, 500).astype(
        np.uint64
    )
    train, val = np.arange(400), hashes[400:430]
    assert drop_duplicates(train, hashes, val).tolist() == [i for i in train if hashes[i] not in val]
