"""A running game: successive boards, apples drawn from a seed, and the end.

The rules of a single move are in ``board``.
"""

from __future__ import annotations

import random

from snake_lora_pl.game.board import Board, Cell, End, Move
from snake_lora_pl.game.search import apple_distance

_STARVATION_BOARDS = 4


def starvation_cap(size: int) -> int:
    """Return the default limit of steps without an apple: four times the number of cells.

    A cycle through the whole board reaches any apple within as many steps as there are cells, so a player that exceeds
    this limit moves in circles.
    """
    return _STARVATION_BOARDS * size**2


class Game:
    """A running game: the board, the generator that draws its apples, and its counters.

    The same size, seed and moves give the same game. A player that draws random numbers can use ``rng``, so that the
    seed covers the whole game.
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
            seed: Seed of the game's generator. Must not be negative: Python seeds with the absolute value.
            max_steps: Steps after which the game ends with MAX_STEPS; None for no limit.
            max_steps_without_apple: Steps without an apple after which the game ends with STARVED; None for no limit.
                Without either limit, a game of a player that circles never ends.
            upstream_rules: Follow the program that wrote the ``heuristics-v0.04`` files. It ends the game with NO_PATH
                as soon as no path leads to the apple, with the whole body including the tail as walls. It also draws
                the apple before the head moves, so the apple can be under the head; this counts as no path, and the
                board has no apple.

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
        """Number of apples that the snake ate so far."""
        return self.board.length - 1

    def play(self, move: Move | None) -> End | None:
        """Play one move; None means that the player named no move.

        A move that ends the game by a collision leaves the board unchanged, so the last position can be shown.

        Returns:
            The reason why the game ended, or None if it continues.

        Raises:
            ValueError: If the game had already ended.
        """
        if self.end is not None:
            raise ValueError(f"the game has ended ({self.end.value}); start a new one")
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
            self.end = self._reached_limit()
        return self.end

    def _reached_limit(self) -> End | None:
        if self.upstream_rules and apple_distance(self.board) is None:
            return End.NO_PATH
        if self.max_steps is not None and self.num_steps >= self.max_steps:
            return End.MAX_STEPS
        if self.max_steps_without_apple is not None and self.num_steps_without_apple >= self.max_steps_without_apple:
            return End.STARVED
        return None

    def _draw_apple(self, board: Board) -> Cell:
        """Draw a free cell uniformly; under upstream's rules also the head's cell, once the head has moved.

        Of all methods of ``random.Random``, Python guarantees a stable sequence across versions for ``random()`` only:
        https://docs.python.org/3/library/random.html#notes-on-reproducibility
        """
        free = board.free_cells()
        if self.upstream_rules and board.length > 1:
            free.append(board.head)
        return free[int(self.rng.random() * len(free))]
