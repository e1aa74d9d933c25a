"""Which rows train and which validate: whole games apart, and no prompt on both sides.

Neighboring positions of one game are near copies of each other, so a split by row would measure memory.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from snake_lora_pl.errors import UserError

logger = logging.getLogger(__name__)

_ROWS_AT_A_TIME = 2**17
_TABLE_SIZE = np.uint64(2**24)


class Split(NamedTuple):
    """Indices of rows, ascending.

    Attributes:
        train: Rows to train on.
        val: Rows to validate on.
        num_duplicates: Rows that are in neither, since their prompt is also one of ``val``.
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
    """Set games aside for validation, in a seeded order, until they make up a share of the rows.

    At least one game validates and at least one trains. With a share of 0, and where there is only one game, all rows
    train; the latter is warned of, since nothing can stop such a run early.

    Args:
        games: The game of each row.
        prompt_hashes: A hash of each row's prompt; training rows whose prompt also validates are left out.
        val_fraction: Share of the rows that is to validate, from 0 to below 1.
        seed: Seed of the order.

    Raises:
        UserError: If the share is out of range, or removing duplicates leaves no row to train on.
    """
    if not 0 <= val_fraction < 1:
        raise UserError(f"data.val_fraction must be at least 0 and below 1 (found: {val_fraction})")
    all_train = Split(np.arange(len(games)), np.arange(0), 0)
    if val_fraction == 0:
        return all_train
    rows_per_game = np.bincount(games)
    shuffled = np.random.default_rng(seed).permutation(np.flatnonzero(rows_per_game))
    if len(shuffled) < 2:
        logger.warning(
            "The rows are all of one game, so none can be set aside: training without validation. "
            "Give more games, or name other rows in data.val_path."
        )
        return all_train
    wanted = val_fraction * len(games)
    num_val_games = int(np.searchsorted(np.cumsum(rows_per_game[shuffled]), wanted)) + 1
    is_val_game = np.zeros(len(rows_per_game), bool)
    is_val_game[shuffled[: min(num_val_games, len(shuffled) - 1)]] = True
    is_val = is_val_game[games]
    val, train = np.flatnonzero(is_val), np.flatnonzero(~is_val)
    kept = leave_out_duplicates(train, prompt_hashes, prompt_hashes[val])
    return Split(kept, val, len(train) - len(kept))


def leave_out_duplicates(
    train: npt.NDArray[np.integer[Any]],
    prompt_hashes: npt.NDArray[np.uint64],
    val_prompt_hashes: npt.NDArray[np.uint64],
) -> npt.NDArray[np.integer[Any]]:
    """Those of the training rows whose prompt does not validate.

    Raises:
        UserError: If none are left.
    """
    # In parts: at ten million rows the temporary arrays of one np.isin would be the largest thing in the process. And
    # by a table of their last bits first: few rows are left to be looked for among the sorted hashes.
    val_hashes = np.unique(val_prompt_hashes)
    may_validate = np.zeros(_TABLE_SIZE, bool)
    may_validate[val_hashes % _TABLE_SIZE] = True
    parts = [train[:0]]
    for first in range(0, len(train), _ROWS_AT_A_TIME):
        part = train[first : first + _ROWS_AT_A_TIME]
        hashes = prompt_hashes[part]
        is_kept = np.ones(len(part), bool)
        candidates = np.flatnonzero(may_validate[hashes % _TABLE_SIZE])
        nearest = np.searchsorted(val_hashes, hashes[candidates]).clip(max=len(val_hashes) - 1)
        is_kept[candidates] = val_hashes[nearest] != hashes[candidates]
        parts.append(part[is_kept])
    kept = np.concatenate(parts)
    if len(kept) == 0:
        raise UserError(
            "no training row is left: every prompt is also one of the validation rows, and those are removed from "
            "training. Name other rows in data.val_path or data.train_path."
        )
    return kept
