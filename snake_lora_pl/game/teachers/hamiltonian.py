"""Teachers that follow a Hamiltonian cycle through the whole board, so that they never collide and always win."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from snake_lora_pl.game.board import Board, Cell, Move
from snake_lora_pl.game.search import tail_distances
from snake_lora_pl.game.teachers.registry import register_teacher
from snake_lora_pl.game.teachers.safe_greedy import safe_greedy


class Cycle(NamedTuple):
    """A cycle through all cells of a grid.

    A grid of odd size has no Hamiltonian cycle, because neighbors alternate in color as on a chessboard. There, the
    corner (0, 0) and the cell (1, 1) share an index: both are adjacent to the same two cells of the cycle, and each lap
    passes through one of them.

    Attributes:
        indices: Index of each cell on the cycle, from 0.
        num_steps: Number of steps of a lap.
    """

    indices: dict[Cell, int]
    num_steps: int

    def steps_ahead(self, start: Cell, end: Cell) -> int:
        """Return the steps along the cycle from one cell to another: a whole lap for cells with the same index."""
        return (self.indices[end] - self.indices[start]) % self.num_steps or self.num_steps

    def shares_index(self, cell: Cell, other: Cell | None) -> bool:
        """Return whether two different cells have the same index."""
        return cell != other and other is not None and self.indices[cell] == self.indices[other]


@lru_cache(maxsize=16)
def cycle_of(size: int) -> Cycle:
    """Return the cycle that the teachers of this module follow on a grid."""
    even = size % 2 == 0
    # To the right along the bottom row, then back to the left above it, alternately up and down the columns.
    bottom = [(x, 0) for x in range(0 if even else 1, size)]
    columns = [
        (x, y)
        for num, x in enumerate(range(size - 1, -1 if even else 1, -1))
        for y in (range(1, size) if num % 2 == 0 else range(size - 1, 0, -1))
    ]
    if even:
        cells = [*bottom, *columns]
    else:
        # For an odd size the columns end at the top, with two columns remaining: go down them row by row.
        rows = [(x, y) for y in range(size - 1, 1, -1) for x in ((1, 0) if y % 2 == 0 else (0, 1))]
        cells = [*bottom, *columns, *rows, (0, 1), (1, 1)]
    indices = {cell: i for i, cell in enumerate(cells)}
    if not even:
        indices[0, 0] = indices[1, 1]
    return Cycle(indices, len(cells))


# Cells that a shortcut keeps between the head and the tail. Without one, a snake of length 2 could stop directly behind
# its tail, which is also its neck, and have no move along the cycle.
_TAIL_MARGIN = 1


@register_teacher("hamiltonian")
def hamiltonian(board: Board) -> Move | None:
    """Return the next step along the cycle.

    While the body is not in the order of the cycle, as in positions of other players, it steps along the cycle if that
    is legal and keeps the tail reachable, and plays as ``safe_greedy`` otherwise.
    """
    return _along_cycle(board, max_steps=1)


@register_teacher("hamiltonian_shortcuts")
def hamiltonian_shortcuts(board: Board) -> Move | None:
    """Return the move that advances farthest along the cycle without passing the apple or the tail.

    This keeps the body in the order of the cycle, so following the cycle remains safe. A snake that covers half of the
    board takes no shortcuts, because apples would appear in the gaps that they leave, where only another lap reaches
    them. While the body is not in the order of the cycle, it plays as ``hamiltonian``.
    """
    return _along_cycle(board, _steps_before_passing(board) if 2 * board.length <= board.size**2 else 1)


def cycle_advances(board: Board) -> dict[Move, int]:
    """Return the steps along the cycle of each legal move that passes neither the apple nor the tail, in board order.

    The next cell of the cycle is always included. While the body is not in the order of the cycle, any other move might
    pass the tail, so only that one is.
    """
    return _advances(board, _steps_before_passing(board) if _is_in_order(cycle_of(board.size), board) else 1)


def _steps_before_passing(board: Board) -> int:
    """Return the steps along the cycle that a move may advance without passing the apple or the tail."""
    if board.apple is None:
        return 1
    ahead = cycle_of(board.size).steps_ahead
    return max(1, min(ahead(board.head, board.apple), ahead(board.head, board.body[-1]) - 1 - _TAIL_MARGIN))


def _advances(board: Board, max_steps: int) -> dict[Move, int]:
    """Return the steps along the cycle of each legal move, without those that advance farther or pass the apple."""
    cycle = cycle_of(board.size)
    steps = {move: cycle.steps_ahead(board.head, board.target(move)) for move in board.legal_moves()}
    return {
        move: num_steps
        for move, num_steps in steps.items()
        if num_steps == 1 or (num_steps <= max_steps and not _shares_index_with_apple(board, move))
    }


def _shares_index_with_apple(board: Board, move: Move) -> bool:
    """Return whether the apple is on the other cell with the index of the move's cell: the move then passes it."""
    return cycle_of(board.size).shares_index(board.target(move), board.apple)


def _along_cycle(board: Board, max_steps: int) -> Move | None:
    """Return the legal move that advances farthest along the cycle, up to a number of steps."""
    if not _is_in_order(cycle_of(board.size), board):
        along = _advances(board, 1)
        return next((move for move in tail_distances(board) if move in along), None) or safe_greedy(board)
    steps = _advances(board, max_steps)
    if not steps:
        return safe_greedy(board)
    return max(steps, key=lambda move: (steps[move], not _shares_index_with_apple(board, move)))


def _is_in_order(cycle: Cycle, board: Board) -> bool:
    """Return whether the body, from tail to head, follows the cycle within one lap."""
    indices = [cycle.indices[cell] for cell in board.body]
    return sum((ahead - behind) % cycle.num_steps for ahead, behind in pairwise(indices)) < cycle.num_steps
