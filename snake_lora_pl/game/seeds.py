"""Seeds of games: the ranges for data sets and for evaluation are disjoint.

The data set of seed 7 uses the game seeds 7,000,000 to 7,999,999, so no two data sets share a game and a row's game
seed shows its data set. Game seeds from ``FIRST_PLAY_SEED`` on are for evaluation, again a million to a seed.
"""

from __future__ import annotations

GAMES_PER_SEED = 1_000_000

# With this bound, all game seeds of data sets and of evaluation fit into the 53 bits of a JSON number.
NUM_DATA_SEEDS = 10**9
FIRST_PLAY_SEED = NUM_DATA_SEEDS * GAMES_PER_SEED


def data_seed(seed: int, game: int) -> int:
    """Return the seed of one game of a data set.

    Args:
        seed: Seed of the data set.
        game: Index of the game in the data set.

    Raises:
        ValueError: If a value is out of range.
    """
    _check_seed(seed)
    if not 0 <= game < GAMES_PER_SEED:
        raise ValueError(f"the index of a game must be between 0 and {GAMES_PER_SEED - 1:,} (found: {game})")
    return seed * GAMES_PER_SEED + game


def play_seeds(num_games: int, seed: int = 0) -> list[int]:
    """Return seeds of games for evaluation; no data set uses them.

    Args:
        num_games: Number of seeds. A longer list begins with the shorter one.
        seed: Selects another list of games.

    Raises:
        ValueError: If a value is out of range.
    """
    _check_seed(seed)
    if not 1 <= num_games <= GAMES_PER_SEED:
        raise ValueError(f"the number of games must be between 1 and {GAMES_PER_SEED:,} (found: {num_games})")
    first = FIRST_PLAY_SEED + seed * GAMES_PER_SEED
    return list(range(first, first + num_games))


def _check_seed(seed: int) -> None:
    if not 0 <= seed < NUM_DATA_SEEDS:
        raise ValueError(f"seed must be between 0 and {NUM_DATA_SEEDS - 1:,} (found: {seed})")
