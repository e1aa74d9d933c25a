"""Which game has which seed: no game that a player is judged by was ever in a data set.

Data set 7 owns the seeds 7,000,000 to 7,999,999, so no two data sets share a game and a row's seed can be read by eye.
Data sets end at ``FIRST_PLAY_SEED``; from there on the games are for playing, a million to a seed again.
"""

from __future__ import annotations

GAMES_PER_SEED = 1_000_000

# Room for a thousand million data sets; and some thousand million more of games to play fit into a float's 53 bits,
# which is what readers of JSON elsewhere have for a number.
NUM_DATA_SEEDS = 10**9
FIRST_PLAY_SEED = NUM_DATA_SEEDS * GAMES_PER_SEED


def data_seed(seed: int, game: int) -> int:
    """The seed of one game of the data set of a seed.

    Raises:
        ValueError: If the seed or the number of the game is out of range.
    """
    if not 0 <= seed < NUM_DATA_SEEDS:
        raise ValueError(f"seed must lie between 0 and {NUM_DATA_SEEDS - 1:,} (found: {seed})")
    return _seed(seed, game)


def play_seeds(num_games: int, seed: int = 0) -> list[int]:
    """The seeds of games to judge players by; no data set has any of them.

    Args:
        num_games: How many; a longer list begins with the shorter one.
        seed: Which list, for other games.

    Raises:
        ValueError: If a value is out of range.
    """
    if not 1 <= num_games <= GAMES_PER_SEED:
        raise ValueError(f"the number of games must lie between 1 and {GAMES_PER_SEED:,} (found: {num_games})")
    if not 0 <= seed < NUM_DATA_SEEDS:
        raise ValueError(f"seed must lie between 0 and {NUM_DATA_SEEDS - 1:,} (found: {seed})")
    return [FIRST_PLAY_SEED + _seed(seed, game) for game in range(num_games)]


def _seed(seed: int, game: int) -> int:
    if not 0 <= game < GAMES_PER_SEED:
        raise ValueError(f"the number of a game must lie between 0 and {GAMES_PER_SEED - 1:,} (found: {game})")
    return seed * GAMES_PER_SEED + game
