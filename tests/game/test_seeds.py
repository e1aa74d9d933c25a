import pytest

from snake_lora_pl.game import Game
from snake_lora_pl.game.seeds import GAMES_PER_SEED, NUM_DATA_SEEDS, data_seed, play_seeds


def test_evaluation_games_are_disjoint_from_data_sets():
    assert data_seed(NUM_DATA_SEEDS - 1, GAMES_PER_SEED - 1) < play_seeds(1)[0]


def test_seeds_have_disjoint_games_and_longer_lists_extend_shorter_ones():
    assert play_seeds(GAMES_PER_SEED, seed=0)[-1] < play_seeds(1, seed=1)[0]
    assert play_seeds(5, seed=3)[:2] == play_seeds(2, seed=3)
    first, second = (Game(10, seed).board for seed in play_seeds(2))
    assert first != second


def test_game_seeds_are_exact_as_json_numbers():
    seed = play_seeds(1, seed=NUM_DATA_SEEDS - 1)[0]
    assert int(float(seed)) == seed


@pytest.mark.parametrize("seed", [-1, NUM_DATA_SEEDS])
def test_a_seed_out_of_range_is_rejected(seed):
    with pytest.raises(ValueError, match=f"999,999,999.*{seed}"):
        play_seeds(1, seed)
    with pytest.raises(ValueError, match=f"999,999,999.*{seed}"):
        data_seed(seed, 0)


def test_a_game_index_out_of_range_is_rejected():
    with pytest.raises(ValueError, match=f"1,000,000.*{GAMES_PER_SEED + 1}"):
        play_seeds(GAMES_PER_SEED + 1)
    with pytest.raises(ValueError, match=f"999,999.*{GAMES_PER_SEED}"):
        data_seed(0, GAMES_PER_SEED)
