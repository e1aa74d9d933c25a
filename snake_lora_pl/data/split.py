"""Split of rows into training and validation: by whole games, and without a prompt on both sides.

Neighboring positions of a game are nearly equal, so a split by row would measure memorization.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from snake_lora_pl.errors import UserError

logger = logging.getLogger(__name__)

_CHUNK_ROWS = 2**17
_TABLE_SIZE = np.uint64(2**24)


class Split(NamedTuple):
    """Indices of rows, ascending.

    Attributes:
        train: Training rows.
        val: Validation rows.
        num_duplicates: Number of rows in neither, because their prompt is also in ``val``.
    """

    train: npt.NDArray[np.integer[Any]]
    val: npt.NDArray[np.integer[Any]]
    num_duplicates: int


def split_by_game(
    games: npt.NDArray[np.integer[Any]],
    prompt_hashes: npt.NDArray[np.uint64],
    val_fraction: float,
    seed: int,
) -> Split:
    """Choose games for validation, in a seeded order, until they contain a fraction of the rows.

    At least one game validates and at least one trains. All rows train if the fraction is 0 or if there is only one
    game; the latter logs a warning, because early stopping needs validation rows.

    Args:
        games: Game of each row, shape (num_rows,).
        prompt_hashes: Hash of each row's prompt, shape (num_rows,); training rows whose prompt is also in the
            validation rows are dropped.
        val_fraction: Fraction of the rows for validation, in [0, 1).
        seed: Seed of the order.

    Raises:
        UserError: If the fraction is out of range, or if dropping duplicates leaves no training row.
    """
    if not 0 <= val_fraction < 1:
        raise UserError(f"data.val_fraction must be at least 0 and below 1 (found: {val_fraction}).")
    all_train = Split(np.arange(len(games)), np.arange(0), 0)
    if val_fraction == 0:
        return all_train
    rows_per_game = np.bincount(games)
    shuffled = np.random.default_rng(seed).permutation(np.flatnonzero(rows_per_game))
    if len(shuffled) < 2:
        logger.warning(
            "all rows belong to one game: training without validation. Add games, or set data.val_path to other rows."
        )
        return all_train
    wanted = val_fraction * len(games)
    num_val_games = int(np.searchsorted(np.cumsum(rows_per_game[shuffled]), wanted)) + 1
    is_val_game = np.zeros(len(rows_per_game), bool)
    is_val_game[shuffled[: min(num_val_games, len(shuffled) - 1)]] = True
    is_val = is_val_game[games]
    val, train = np.flatnonzero(is_val), np.flatnonzero(~is_val)
    kept = drop_duplicates(train, prompt_hashes, prompt_hashes[val])
    return Split(kept, val, len(train) - len(kept))


def drop_duplicates(
    train: npt.NDArray[np.integer[Any]],
    prompt_hashes: npt.NDArray[np.uint64],
    val_prompt_hashes: npt.NDArray[np.uint64],
) -> npt.NDArray[np.integer[Any]]:
    """Return the training rows whose prompt is not in the validation rows.

    Args:
        train: Indices of training rows.
        prompt_hashes: Hash of the prompt of each row that ``train`` refers to.
        val_prompt_hashes: Hashes of the prompts of the validation rows.

    Raises:
        UserError: If no row is left.
    """
    # In chunks, because with ten million rows the temporary arrays of np.isin would be the largest in the process. A
    # table of the hashes' last bits first excludes most rows from the binary search.
    val_hashes = np.unique(val_prompt_hashes)
    may_validate = np.zeros(_TABLE_SIZE, bool)
    may_validate[val_hashes % _TABLE_SIZE] = True
    kept = [train[:0]]
    for first in range(0, len(train), _CHUNK_ROWS):
        chunk = train[first : first + _CHUNK_ROWS]
        hashes = prompt_hashes[chunk]
        is_kept = np.ones(len(chunk), bool)
        candidates = np.flatnonzero(may_validate[hashes % _TABLE_SIZE])
        nearest = np.searchsorted(val_hashes, hashes[candidates]).clip(max=len(val_hashes) - 1)
        is_kept[candidates] = val_hashes[nearest] != hashes[candidates]
        kept.append(chunk[is_kept])
    rows = np.concatenate(kept)
    if len(rows) == 0:
        raise UserError(
            "no training rows left: every prompt is also in the validation rows. Set data.val_path or data.train_path "
            "to other rows."
        )
    return rows
