"""Board positions and the rules of one move.

``Board`` is an immutable position; ``Board.after`` applies a move. A running game, with apples, limits and an end, is
``game.Game``.

Coordinates: a cell is ``(x, y)`` on a square grid of ``size`` cells a side. ``(0, 0)`` is the bottom-left corner and
``(size - 1, size - 1)`` the top-right one; x grows to the right and y grows upwards, so UP is ``y + 1`` and RIGHT is
``x + 1``. A body lists its cells from head to tail.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from itertools import pairwise
from typing import TypeAlias

Cell: TypeAlias = tuple[int, int]

MIN_GRID_SIZE = 2
# Searches visit every cell. The bound keeps a prompt that claims a grid of a million cells a side from stalling them.
MAX_GRID_SIZE = 256


class Move(Enum):
    """One step of the head. The members are in board order: UP, RIGHT, DOWN, LEFT."""

    UP = (0, 1)
    RIGHT = (1, 0)
    DOWN = (0, -1)
    LEFT = (-1, 0)

    def __init__(self, dx: int, dy: int) -> None:
        """Name the parts of the value."""
        self.dx = dx
        self.dy = dy


class End(Enum):
    """Reason why a game ended."""

    WALL = "WALL"
    """The head left the grid."""
    SELF = "SELF"
    """The head collided with the body."""
    WIN = "WIN"
    """The snake fills the board."""
    STARVED = "STARVED"
    """The limit of steps without an apple was reached."""
    MAX_STEPS = "MAX_STEPS"
    """The limit of steps was reached."""
    NO_VALID_ANSWER = "NO_VALID_ANSWER"
    """The player named no move, or reversed into the neck, which is not a move."""
    NO_PATH = "NO_PATH"
    """No path leads to the apple. Only under upstream's rules."""


# Unpacked once: attribute access on an Enum costs more than the rest of the inner loop.
_MOVES_IN_BOARD_ORDER = tuple((move, move.dx, move.dy) for move in Move)
_MOVE_BY_LETTER = {move.name[0]: move for move in Move}
_LETTER_BY_STEP = {(move.dx, move.dy): move.name[0] for move in Move}
_set_field = object.__setattr__


@dataclass(frozen=True, slots=True)
class Board:
    """One position: a snake and an apple on a grid. Immutable and hashable.

    Attributes:
        size: Cells along one side of the grid.
        body: The snake's cells from head to tail, each adjacent to the one before it.
        apple: The apple's cell, or None if there is none, as on a full board.
    """

    size: int
    body: tuple[Cell, ...]
    apple: Cell | None

    def __post_init__(self) -> None:
        """Validate the position.

        Raises:
            ValueError: If the position cannot occur in a game.
        """
        if self.size < MIN_GRID_SIZE:
            raise ValueError(f"a grid must have at least {MIN_GRID_SIZE} cells a side (found: {self.size})")
        if self.size > MAX_GRID_SIZE:
            raise ValueError(f"a grid must have at most {MAX_GRID_SIZE} cells a side (found: {self.size})")
        if not self.body:
            raise ValueError("a snake must have at least a head (found: an empty body)")
        for cell in self.body if self.apple is None else (*self.body, self.apple):
            if not self.contains(cell):
                raise ValueError(f"cell {cell} is outside the {self.size}x{self.size} grid")
        if len(set(self.body)) != len(self.body):
            raise ValueError(f"the snake overlaps itself: {list(self.body)}")
        if self.apple in self.body:
            raise ValueError(f"the apple {self.apple} is on the snake: {list(self.body)}")
        for (x, y), (next_x, next_y) in pairwise(self.body):
            if abs(x - next_x) + abs(y - next_y) != 1:
                raise ValueError(f"the body has a gap between {(x, y)} and {(next_x, next_y)}: {list(self.body)}")

    @classmethod
    def _unchecked(cls, size: int, body: tuple[Cell, ...], apple: Cell | None) -> Board:
        """Return a board without validation, for positions that the rules make valid.

        Validation would halve the speed of a game.
        """
        board = object.__new__(cls)
        _set_field(board, "size", size)
        _set_field(board, "body", body)
        _set_field(board, "apple", apple)
        return board

    @classmethod
    def from_trail(cls, size: int, head: Cell, trail: str, apple: Cell | None) -> Board:
        """Return the board whose body follows ``trail`` from the head to the tail. Inverse of ``Board.trail``.

        Raises:
            ValueError: If a letter is not a move's initial, or the position cannot occur in a game.
        """
        x, y = head
        body = [head]
        for letter in trail:
            move = _MOVE_BY_LETTER.get(letter)
            if move is None:
                raise ValueError(f"unknown letter {letter!r} in a trail; use U, R, D or L")
            x, y = x + move.dx, y + move.dy
            body.append((x, y))
        return cls(size, tuple(body), apple)

    @property
    def trail(self) -> str:
        """The steps from the head to the tail, one letter each: ``U`` if the next cell is above."""
        return "".join([_LETTER_BY_STEP[x - prev_x, y - prev_y] for (prev_x, prev_y), (x, y) in pairwise(self.body)])

    @property
    def head(self) -> Cell:
        """The cell that moves."""
        return self.body[0]

    @property
    def length(self) -> int:
        """Number of the snake's cells, including the head: one more than the number of apples so far."""
        return len(self.body)

    def contains(self, cell: Cell) -> bool:
        """Return whether a cell is inside the grid."""
        return 0 <= cell[0] < self.size and 0 <= cell[1] < self.size

    def target(self, move: Move) -> Cell:
        """Return the cell that a move leads the head to, inside the grid or not."""
        x, y = self.body[0]
        return x + move.dx, y + move.dy

    def free_cells(self) -> list[Cell]:
        """Return the cells without snake, including the apple's, row by row from the bottom-left."""
        taken = set(self.body)
        return [cell for cell in _cells(self.size) if cell not in taken]

    def legal_moves(self) -> list[Move]:
        """Return the moves that neither end the game nor reverse into the neck, in board order.

        The tail's cell is free because the tail leaves it in the same step. The tail would stay only if the snake ate
        on that move, but the apple is never on the tail's cell.
        """
        body = self.body
        x, y = body[0]
        size = self.size
        # For a snake of length 2, the tail is also the neck.
        blocked = body if len(body) == 2 else body[:-1]
        return [
            move
            for move, dx, dy in _MOVES_IN_BOARD_ORDER
            if 0 <= x + dx < size and 0 <= y + dy < size and (x + dx, y + dy) not in blocked
        ]

    def fallback_move(self) -> Move:
        """Return the first move in board order that does not reverse: the choice of a player without a legal move."""
        return next(move for move in Move if self.after(move) is not End.NO_VALID_ANSWER)

    def after(self, move: Move) -> Board | End:
        """Apply a move.

        Returns:
            The next board, without an apple if the snake ate it; or ``End.NO_VALID_ANSWER`` for the reversal into the
            neck, ``End.WALL`` or ``End.SELF``.
        """
        body = self.body
        target = self.target(move)
        if len(body) > 1 and target == body[1]:
            return End.NO_VALID_ANSWER
        if not self.contains(target):
            return End.WALL
        if target == self.apple:
            return Board._unchecked(self.size, (target, *body), None)
        rest = body[:-1]
        if target in rest:
            return End.SELF
        return Board._unchecked(self.size, (target, *rest), self.apple)

    def fills_board(self, move: Move) -> bool:
        """Return whether a move eats the last apple and thereby wins."""
        return self.length + 1 == self.size**2 and self.target(move) == self.apple

    def with_apple(self, apple: Cell) -> Board:
        """Return the same snake with the apple at another cell.

        Raises:
            ValueError: If the cell is outside the grid or on the snake.
        """
        return Board(self.size, self.body, apple)


@lru_cache(maxsize=16)
def _cells(size: int) -> tuple[Cell, ...]:
    return tuple((x, y) for y in range(size) for x in range(size))
