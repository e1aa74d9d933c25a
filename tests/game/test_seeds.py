import pytest

from snake_lora_pl.game import Game
from snake_lora_pl.game.seeds import GAMES_PER_SEED, NUM_DATA_SEEDS, data_seed, play_seeds


def test_no_game_to_play_is_one_of_a_data_set():
    assert data_seed(NUM_DATA_SEEDS - 1, GAMES_PER_SEED - 1) < play_seeds(1)[0]


def test_every_seed_has_games_of_its_own_and_a_longer_list_begins_with_the_shorter():
    assert play_seeds(GAMES_PER_SEED, seed=0)[-1] < play_seeds(1, seed=1)[0]
    assert play_seeds(5, seed=3)[:2] == play_seeds(2, seed=3)
    first, second = (Game(10, seed).board for seed in play_seeds(2))
    assert first != second


def test_seeds_are_numbers_that_a_float_holds():
    seed = play_seeds(1, seed=NUM_DATA_SEEDS - 1)[0]
    assert int(float(seed)) == seed


@pytest.mark.parametrize("seed", [-1, NUM_DATA_SEEDS])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(ValueError, match="between 0 and 999,999,999"):
        play_seeds(1, seed)
    with pytest.raises(ValueError, match="between 0 and 999,999,999"):
        data_seed(seed, 0)


def test_as_many_games_as_a_seed_owns_and_no_more():
    with pytest.raises(ValueError, match="number of games"):
        play_seeds(GAMES_PER_SEED + 1)
    with pytest.raises(ValueError, match="number of a game"):
        data_seed(0, GAMES_PER_SEED)
