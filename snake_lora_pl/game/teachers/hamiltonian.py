"""Players that follow a cycle through the whole board, so that they never die and always win."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from snake_lora_pl.game.board import Board, Cell, Move
from snake_lora_pl.game.search import tail_distances
from snake_lora_pl.game.teachers.registry import register_teacher
from snake_lora_pl.game.teachers.safe_greedy import safe_greedy


class Cycle(NamedTuple):
    """A closed walk over a grid.

    A grid of odd size has no cycle through all of its cells, for neighbors alternate in color like a chessboard's.
    There the corner (0, 0) and the cell (1, 1) share a place: both lie between the same two cells of the walk, and each
    lap goes through the one or the other.

    Attributes:
        order: A cell's place on the walk, from 0.
        num_places: Steps of a whole lap.
    """

    order: dict[Cell, int]
    num_places: int

    def steps_ahead(self, start: Cell, end: Cell) -> int:
        """Steps along the walk from one cell to another: a whole lap for cells at the same place."""
        return (self.order[end] - self.order[start]) % self.num_places or self.num_places

    def shares_place(self, cell: Cell, other: Cell | None) -> bool:
        """Whether two different cells are at the same place."""
        return cell != other and other is not None and self.order[cell] == self.order[other]


@lru_cache(maxsize=16)
def cycle_of(size: int) -> Cycle:
    """The walk that the teachers of this module follow on a grid."""
    even = size % 2 == 0
    # Along the bottom row to the right, then back above it, column by column, the first of them upwards.
    bottom = [(x, 0) for x in range(0 if even else 1, size)]
    columns = [
        (x, y)
        for num, x in enumerate(range(size - 1, -1 if even else 1, -1))
        for y in (range(1, size) if num % 2 == 0 else range(size - 1, 0, -1))
    ]
    # With odd size that ends on top, with two columns left: down, row by row.
    rows = [] if even else [(x, y) for y in range(size - 1, 1, -1) for x in ((1, 0) if y % 2 == 0 else (0, 1))]
    walk = [*bottom, *columns, *rows] if even else [*bottom, *columns, *rows, (0, 1), (1, 1)]
    order = {cell: place for place, cell in enumerate(walk)}
    if not even:
        order[0, 0] = order[1, 1]
    return Cycle(order, len(walk))


# Cells that a shortcut leaves between the head and the tail: a snake of two that stops right behind its tail, which is
# also its neck, could not go on.
_TAIL_MARGIN = 1


@register_teacher("hamiltonian")
def hamiltonian(board: Board) -> Move | None:
    """The next step of a cycle through the whole board.

    A snake that does not lie in the order of the cycle, as other players leave it, steps along the cycle where that is
    legal and keeps the tail within reach, and plays ``safe_greedy`` elsewhere, until it does.
    """
    return _along_cycle(board, max_steps=1)


@register_teacher("hamiltonian_shortcuts")
def hamiltonian_shortcuts(board: Board) -> Move | None:
    """The step that goes farthest along the cycle without passing the apple or the tail.

    The body then still lies in the order of the cycle, so going on along the cycle stays safe. A snake that covers half
    of the board takes no shortcuts: they leave gaps in which apples appear that only another lap reaches. A snake that
    does not lie in the order of the cycle plays as ``hamiltonian`` does.
    """
    max_steps = 1
    if board.apple is not None and 2 * board.length <= board.size**2:
        ahead = cycle_of(board.size).steps_ahead
        max_steps = min(ahead(board.head, board.apple), ahead(board.head, board.body[-1]) - 1 - _TAIL_MARGIN)
    return _along_cycle(board, max(1, max_steps))


def _along_cycle(board: Board, max_steps: int) -> Move | None:
    """The legal move that goes farthest along the cycle, yet no farther than some steps."""
    cycle = cycle_of(board.size)
    steps = {move: cycle.steps_ahead(board.head, board.target(move)) for move in board.legal_moves()}
    if not _lies_along(cycle, board):
        kept = tail_distances(board)
        return next((move for move in kept if steps[move] == 1), None) or safe_greedy(board)
    # Where two cells share a place and the apple lies on one, the other one passes it.
    passes = {move: cycle.shares_place(board.target(move), board.apple) for move in steps}
    allowed = [
        move for move, num_steps in steps.items() if num_steps == 1 or (num_steps <= max_steps and not passes[move])
    ]
    return max(allowed, key=lambda move: (steps[move], not passes[move])) if allowed else safe_greedy(board)


def _lies_along(cycle: Cycle, board: Board) -> bool:
    """Whether the body, from tail to head, goes along the cycle without overtaking itself."""
    num_places = cycle.num_places
    places = [cycle.order[cell] for cell in board.body]
    return sum((place - behind) % num_places for place, behind in pairwise(places)) < num_places
