"""Probabilities with which rows are drawn: weights of rows and files, and balance over features of the position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from snake_lora_pl.game.text import BoardReader, PromptMoves, read_moves, read_state

Balance: TypeAlias = Literal["length", "decisive", "length+decisive"]

UNKNOWN = -1
"""Stratum of a row whose prompt states no position."""


class StratumReader:
    """Reader of the features that ``data.balance`` draws evenly over, for the rows of one file in order."""

    def __init__(self) -> None:
        self._boards = BoardReader()

    def read(self, prompt: str) -> int:
        """Return the stratum of the next row: twice the snake's length, plus 1 if there are a trap and a safe move."""
        state, board = read_state(prompt), self._boards.read(prompt)
        if state is None:
            return UNKNOWN
        moves = read_moves(prompt) if board is None else PromptMoves.of(board)
        return 2 * state.length + (moves is not None and moves.is_decisive)


def balanced_levels(strata: npt.NDArray[np.int64], balance: Balance) -> list[npt.NDArray[np.int64]]:
    """Return the group of each row at each level of the hierarchy that ``balance`` names."""
    levels = {"length": strata >> 1, "decisive": np.where(strata == UNKNOWN, UNKNOWN, strata & 1)}
    return [levels[name] for name in balance.split("+")]


def draw_probabilities(
    weights: npt.NDArray[np.float64], levels: Sequence[npt.NDArray[Any]] = ()
) -> npt.NDArray[np.float64]:
    """Return the probability of each row.

    The groups of the first level have equal probability, within each of them the groups of the second level, and so on.
    Within a group of the last level, probabilities are proportional to the weights.

    Args:
        weights: Positive weight of each row, shape (num_rows,).
        levels: Group of each row at each level, at least -1, shape (num_rows,) each.
    """
    group = np.zeros(len(weights), np.int64)
    share = np.ones(len(weights))
    for level in levels:
        num_labels = int(level.max(initial=UNKNOWN)) + 2
        labels, children = np.unique(group * num_labels + (level + 1), return_inverse=True)
        share /= np.bincount(labels // num_labels)[group]
        group = children
    scaled = weights / weights.max(initial=0)
    probabilities: npt.NDArray[np.float64] = share * scaled / np.bincount(group, weights=scaled)[group]
    return probabilities
