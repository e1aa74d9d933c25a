"""The eight rotations and reflections of a square board, applied to cells, boards and moves."""

from __future__ import annotations

from dataclasses import dataclass

from snake_lora_pl.game.board import Board, Cell, Move

_MOVE_BY_STEP = {(move.dx, move.dy): move for move in Move}


@dataclass(frozen=True, slots=True)
class Symmetry:
    """A symmetry of the square: an optional swap of the axes, then an optional reflection of each axis.

    Attributes:
        swap: Whether to swap x and y.
        mirror_x: Whether to reflect left and right, after the swap.
        mirror_y: Whether to reflect up and down, after the swap.
    """

    swap: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    def cell(self, cell: Cell, size: int) -> Cell:
        """Transform a cell of a grid."""
        x, y = cell[::-1] if self.swap else cell
        return (size - 1 - x if self.mirror_x else x), (size - 1 - y if self.mirror_y else y)

    def board(self, board: Board) -> Board:
        """Transform a position."""
        size = board.size
        apple = None if board.apple is None else self.cell(board.apple, size)
        return Board(size, tuple(self.cell(cell, size) for cell in board.body), apple)

    def move(self, move: Move) -> Move:
        """Transform a move: moving and then transforming equals transforming and then moving."""
        dx, dy = (move.dy, move.dx) if self.swap else (move.dx, move.dy)
        return _MOVE_BY_STEP[-dx if self.mirror_x else dx, -dy if self.mirror_y else dy]

    @property
    def inverse(self) -> Symmetry:
        """The symmetry that reverts this one."""
        # Reflections come after the swap; to revert them before it, exchange their axes.
        return Symmetry(True, self.mirror_y, self.mirror_x) if self.swap else self


SYMMETRIES = tuple(
    Symmetry(swap, mirror_x, mirror_y)
    for swap in (False, True)
    for mirror_x in (False, True)
    for mirror_y in (False, True)
)
"""All eight symmetries; the first is the identity."""
