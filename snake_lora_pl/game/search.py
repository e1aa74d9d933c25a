"""Breadth-first search on a board: distances, shortest paths and reachable cells.

A set of cells is a bitboard: one integer with a bit for each cell, so that one step of a breadth-first search over all
cells is a few shifts. Bit ``y * (size + 1) + x`` is cell (x, y). The column ``x == size`` is always a wall, so that a
shift never carries a cell from one row into the next.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TypeAlias

from snake_lora_pl.game.board import Board, Cell, Move

Cells: TypeAlias = int
"""A set of cells as a bitboard."""

# The order in which the program behind the ``heuristics-v0.04`` files expands a cell. It breaks ties between paths.
SEARCH_ORDER = (Move.UP, Move.DOWN, Move.LEFT, Move.RIGHT)


def cells_of(size: int, cells: Iterable[Cell]) -> Cells:
    """Return the set of the given distinct cells of a grid."""
    return sum(map(_bits(size).__getitem__, cells))


@lru_cache(maxsize=16)
def all_cells(size: int) -> Cells:
    """Return the set of all cells of a grid."""
    return sum(_bits(size).values())


def free_cells(board: Board) -> Cells:
    """Return the cells without snake, including the apple's."""
    return all_cells(board.size) ^ cells_of(board.size, board.body)


def step(cells: Cells, move: Move, size: int) -> Cells:
    """Shift a set of cells by one step; cells that leave the grid are outside ``all_cells``."""
    by = move.dy * (size + 1) + move.dx
    return cells << by if by > 0 else cells >> -by


def waves_from(start: Cells, goal: Cells, free: Cells, size: int) -> list[Cells]:
    """Run a breadth-first search and return its wavefronts up to the first that touches the goal.

    Args:
        start: Cells that the search starts from, free or not; wave 0.
        goal: Cells to reach; only those that are free or in ``start`` can be.
        free: Cells that may be entered.
        size: Cells along one side of the grid.

    Returns:
        The waves: wave k holds the cells at distance k, and only the last one touches the goal. Empty if the goal
        cannot be reached.
    """
    stride = size + 1
    waves = []
    wave = start
    while wave:
        waves.append(wave)
        if wave & goal:
            return waves
        free &= ~wave
        wave = (wave << stride | wave >> stride | wave >> 1 | wave << 1) & free
    return []


def is_reachable(start: Cells, goal: Cells, free: Cells, size: int) -> bool:
    """Return whether ``waves_from`` would find the goal. Faster, because it does not separate the waves."""
    stride = size + 1
    while not start & goal:
        grown = start | (start << stride | start >> stride | start >> 1 | start << 1) & free
        if grown == start:
            return False
        start = grown
    return True


def flood(start: Cells, free: Cells, size: int) -> Cells:
    """Flood fill: return ``start`` and all free cells that are connected to it."""
    stride = size + 1
    while True:
        grown = start | (start << stride | start >> stride | start >> 1 | start << 1) & free
        if grown == start:
            return start
        start = grown


def waves_to_head(board: Board) -> list[Cells]:
    """Return the waves from the apple up to the first that touches a neighbor of the head.

    The whole body, including the tail, is a wall.

    Returns:
        As many waves as a shortest path has steps. Empty if there is no apple or no path.
    """
    if board.apple is None:
        return []
    size = board.size
    bits = _bits(size)
    free = free_cells(board)
    stride = size + 1
    head = bits[board.head]
    around_head = head << stride | head >> stride | head >> 1 | head << 1
    return waves_from(bits[board.apple], around_head & free, free, size)


def apple_distance(board: Board) -> int | None:
    """Return the length of a shortest path to the apple with the whole body as walls; None if there is no path."""
    return len(waves_to_head(board)) or None


def shortest_moves(board: Board) -> list[Move]:
    """Return every first move of a shortest path to the apple with the body as walls, in ``SEARCH_ORDER``."""
    waves = waves_to_head(board)
    if not waves:
        return []
    size = board.size
    head = _bits(size)[board.head]
    return [move for move in SEARCH_ORDER if step(head, move, size) & waves[-1]]


def shortest_path(board: Board) -> list[Cell]:
    """Return the cells of a shortest path to the apple, excluding the head, with the whole body as walls.

    Of several shortest paths, this is the first when their moves are compared in ``SEARCH_ORDER``. Empty if there is no
    path.
    """
    size = board.size
    bit = _bits(size)[board.head]
    x, y = board.head
    path = []
    stride = size + 1
    for wave in reversed(waves_to_head(board)):
        # SEARCH_ORDER, unrolled: this is the inner loop of every teacher that looks ahead.
        if bit << stride & wave:
            bit, y = bit << stride, y + 1
        elif bit >> stride & wave:
            bit, y = bit >> stride, y - 1
        elif bit >> 1 & wave:
            bit, x = bit >> 1, x - 1
        else:
            bit, x = bit << 1, x + 1
        path.append((x, y))
    return path


def is_safe_to_eat(board: Board, path: list[Cell]) -> bool:
    """Return whether the snake can reach its tail, or fills the board, after following a path and eating at its end.

    A snake that reaches its tail can follow it indefinitely, because the tail advances at every step without an apple.

    Args:
        board: The position.
        path: Cells that lead from the head to the apple, as ``shortest_path`` returns them.
    """
    size = board.size
    body = (*reversed(path), *board.body)[: board.length + 1]
    if len(body) == size**2:
        return True
    bits = _bits(size)
    head, tail = bits[body[0]], bits[body[-1]]
    free = all_cells(size) ^ cells_of(size, body)
    return is_reachable(head, tail, free | tail, size)


def tail_distances(board: Board) -> dict[Move, int]:
    """Return the steps from the head to the tail after each legal move that keeps it reachable, in board order."""
    distances = {}
    size = board.size
    for move, (head, tail, free) in _after_moves(board).items():
        waves = waves_from(head, tail, free | tail, size)
        if waves:
            distances[move] = len(waves) - 1
    return distances


def reachable_space(board: Board) -> dict[Move, int]:
    """Return the number of free cells, including the apple's, reachable after each legal move, in board order."""
    size = board.size
    return {move: (flood(head, free, size) ^ head).bit_count() for move, (head, _, free) in _after_moves(board).items()}


def apple_distances(board: Board) -> dict[Move, int]:
    """Return the steps to the apple after each legal move that keeps it reachable, in board order.

    0 for the move that eats the apple. The whole body after the move is a wall.
    """
    if board.apple is None:
        return {}
    size = board.size
    apple = _bits(size)[board.apple]
    distances = {}
    for move, (head, _, free) in _after_moves(board).items():
        waves = waves_from(head, apple, free, size)
        if waves:
            distances[move] = len(waves) - 1
    return distances


def _after_moves(board: Board) -> dict[Move, tuple[Cells, Cells, Cells]]:
    """Return head, tail and free cells after each legal move, in board order."""
    size = board.size
    bits = _bits(size)
    body = board.body
    head, tail = bits[body[0]], bits[body[-1]]
    before_tail = bits[body[-2]] if len(body) > 1 else None
    apple = 0 if board.apple is None else bits[board.apple]
    free = free_cells(board)
    # For a snake of length 2, the tail is also the neck.
    enterable = free if len(body) == 2 else free | tail
    after = {}
    for move in Move:
        target = step(head, move, size) & enterable
        if not target:
            continue
        if target == apple:
            after[move] = (target, tail, free ^ target)
        else:
            after[move] = (target, target if before_tail is None else before_tail, (free | tail) & ~target)
    return after


@lru_cache(maxsize=16)
def _bits(size: int) -> dict[Cell, Cells]:
    return {(x, y): 1 << (y * (size + 1) + x) for y in range(size) for x in range(size)}
