"""A game that runs: positions in turn, apples drawn by a seed, and an end. Knows nothing of players, text or models."""

from __future__ import annotations

import random

from snake_lora_pl.game.board import Board, Cell, End, Move
from snake_lora_pl.game.search import apple_distance

_STARVATION_BOARDS = 4


def starvation_cap(size: int) -> int:
    """Steps without an apple after which a player is taken to walk in circles: four times the cells of the board.

    A cycle through the whole board reaches any apple within as many steps as there are cells.
    """
    return _STARVATION_BOARDS * size**2


class Game:
    """A running game: a board, the generator that draws its apples, and the counts that may end it.

    The same size, seed and moves give the same game. Whoever plays with chance draws from ``rng`` too, so that the seed
    covers the whole game.
    """

    def __init__(
        self,
        size: int = 10,
        seed: int = 0,
        max_steps: int | None = None,
        max_steps_without_apple: int | None = None,
        *,
        upstream_rules: bool = False,
    ) -> None:
        """Start a game: a snake of length 1 in the middle, without a direction, and the first apple.

        Args:
            size: Cells along one side of the grid.
            seed: Seed of the game's generator; not negative, because Python seeds with the absolute value.
            max_steps: Steps after which the game ends with MAX_STEPS; None for no limit.
            max_steps_without_apple: Steps without an apple after which the game ends with STARVED; None for no limit.
                A player that circles would never end without either limit.
            upstream_rules: Play as the program that wrote the ``heuristics-v0.04`` files. It gives up, here with
                NO_PATH, as soon as no path leads to the apple with the whole body, tail included, as walls; and it
                draws the apple before the head has moved, so that it can come to lie under the head, which counts as no
                path. The board then has no apple.

        Raises:
            ValueError: If the size or the seed is out of range.
        """
        if seed < 0:
            raise ValueError(f"the seed of a game must not be negative (found: {seed})")
        self.rng = random.Random(seed)
        self.max_steps = max_steps
        self.max_steps_without_apple = max_steps_without_apple
        self.upstream_rules = upstream_rules
        self.num_steps = 0
        self.num_steps_without_apple = 0
        self.end: End | None = None
        start = Board(size, ((size // 2, size // 2),), None)
        self.board = start.with_apple(self._draw_apple(start))

    @property
    def num_apples(self) -> int:
        """Apples eaten so far."""
        return self.board.length - 1

    def play(self, move: Move | None) -> End | None:
        """Play one move; None stands for a player that named none.

        The board stays as it was before a move that ends the game in death, so it can be shown.

        Returns:
            Why the game is over now, or None while it goes on.

        Raises:
            ValueError: If the game was over before.
        """
        if self.end is not None:
            raise ValueError(f"the game is over ({self.end.value}); start a new one")
        outcome = End.NO_VALID_ANSWER if move is None else self.board.after(move)
        if isinstance(outcome, End):
            self.end = outcome
            return outcome
        self.num_steps += 1
        self.num_steps_without_apple += 1
        if outcome.length > self.board.length:
            self.num_steps_without_apple = 0
            if outcome.length == outcome.size**2:
                self.end = End.WIN
            else:
                apple = self._draw_apple(outcome)
                if apple != outcome.head:
                    outcome = outcome.with_apple(apple)
        self.board = outcome
        if self.end is None:
            if self.upstream_rules and apple_distance(outcome) is None:
                self.end = End.NO_PATH
            elif self.max_steps is not None and self.num_steps >= self.max_steps:
                self.end = End.MAX_STEPS
            elif (
                self.max_steps_without_apple is not None
                and self.num_steps_without_apple >= self.max_steps_without_apple
            ):
                self.end = End.STARVED
        return self.end

    def _draw_apple(self, board: Board) -> Cell:
        """A free cell, drawn uniformly; under upstream's rules it may be the head's, once the head has moved.

        Python promises the same ``random()`` in every version, and promises that of no other method.
        """
        free = board.free_cells()
        if self.upstream_rules and board.length > 1:
            free.append(board.head)
        return free[int(self.rng.random() * len(free))]
