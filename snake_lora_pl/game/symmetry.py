"""The eight ways to turn and mirror a square board, and the moves with it."""

from __future__ import annotations

from dataclasses import dataclass

from snake_lora_pl.game.board import Board, Cell, Move

_MOVE_BY_STEP = {(move.dx, move.dy): move for move in Move}


@dataclass(frozen=True, slots=True)
class Symmetry:
    """One way to lay a square onto itself: swap the axes or not, then mirror each axis or not.

    Attributes:
        swap: Whether x and y change places.
        mirror_x: Whether left and right change places, after the swap.
        mirror_y: Whether up and down change places, after the swap.
    """

    swap: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    def cell(self, cell: Cell, size: int) -> Cell:
        """Where a cell of a grid comes to lie."""
        x, y = cell[::-1] if self.swap else cell
        return (size - 1 - x if self.mirror_x else x), (size - 1 - y if self.mirror_y else y)

    def board(self, board: Board) -> Board:
        """The position as it looks then."""
        size = board.size
        apple = None if board.apple is None else self.cell(board.apple, size)
        return Board(size, tuple(self.cell(cell, size) for cell in board.body), apple)

    def move(self, move: Move) -> Move:
        """The move that does on the turned board what a move does on the board."""
        dx, dy = (move.dy, move.dx) if self.swap else (move.dx, move.dy)
        return _MOVE_BY_STEP[-dx if self.mirror_x else dx, -dy if self.mirror_y else dy]

    @property
    def inverse(self) -> Symmetry:
        """The symmetry that brings everything back."""
        # Mirrors come after the swap; undone before it, they are those of the other axis.
        return Symmetry(True, self.mirror_y, self.mirror_x) if self.swap else self


SYMMETRIES = tuple(
    Symmetry(swap, mirror_x, mirror_y)
    for swap in (False, True)
    for mirror_x in (False, True)
    for mirror_y in (False, True)
)
"""All eight; the first leaves everything as it is."""
