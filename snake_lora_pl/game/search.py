"""Distances and reachability on a board. Knows the rules and nothing of players.

A set of cells is one integer, a bit for each cell, so that a breadth-first wave over all of them is a few shifts. Bit
``y * (size + 1) + x`` is cell (x, y). The column ``x == size`` is always wall, so that nothing spills over from one row
into the next.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TypeAlias

from snake_lora_pl.game.board import Board, Cell, Move

Cells: TypeAlias = int
"""A set of cells as bits."""

# The order in which the program behind the ``heuristics-v0.04`` files expands a cell; it decides ties among paths.
SEARCH_ORDER = (Move.UP, Move.DOWN, Move.LEFT, Move.RIGHT)


def cells_of(size: int, cells: Iterable[Cell]) -> Cells:
    """The set of some different cells of a grid."""
    return sum(map(_bits(size).__getitem__, cells))


@lru_cache(maxsize=16)
def all_cells(size: int) -> Cells:
    """The set of every cell of a grid."""
    return sum(_bits(size).values())


def free_cells(board: Board) -> Cells:
    """Cells without snake, the apple's among them."""
    return all_cells(board.size) ^ cells_of(board.size, board.body)


def step(cells: Cells, move: Move, size: int) -> Cells:
    """A set of cells moved one step; what left the grid is outside ``all_cells``."""
    by = move.dy * (size + 1) + move.dx
    return cells << by if by > 0 else cells >> -by


def waves_from(start: Cells, goal: Cells, free: Cells, size: int) -> list[Cells]:
    """Breadth-first waves from a set of cells until one touches the goal.

    Args:
        start: Where the search starts, free or not; wave 0.
        goal: Cells to reach, of which those count that are free or where the search starts.
        free: Cells that may be entered.
        size: Cells along one side of the grid.

    Returns:
        The waves: wave k holds the cells at distance k, and the last one alone touches the goal. Empty where no goal
        can be reached.
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


def reaches(start: Cells, goal: Cells, free: Cells, size: int) -> bool:
    """Whether ``waves_from`` would find the goal; faster, as no waves are kept apart."""
    stride = size + 1
    while not start & goal:
        grown = start | (start << stride | start >> stride | start >> 1 | start << 1) & free
        if grown == start:
            return False
        start = grown
    return True


def flood(start: Cells, free: Cells, size: int) -> Cells:
    """Every free cell that a path through free cells joins to a set of cells, and that set itself."""
    stride = size + 1
    while True:
        grown = start | (start << stride | start >> stride | start >> 1 | start << 1) & free
        if grown == start:
            return start
        start = grown


def waves_to_head(board: Board) -> list[Cells]:
    """Waves from the apple until one touches a neighbor of the head; the whole body, tail included, is wall.

    Returns:
        As many waves as a shortest path has steps. Empty where there is no apple or no path.
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
    """Steps on a shortest path to the apple with the whole body as walls; None without a path."""
    return len(waves_to_head(board)) or None


def shortest_moves(board: Board) -> list[Move]:
    """Every first move of a shortest path to the apple with the whole body as walls, in ``SEARCH_ORDER``."""
    waves = waves_to_head(board)
    if not waves:
        return []
    size = board.size
    head = _bits(size)[board.head]
    return [move for move in SEARCH_ORDER if step(head, move, size) & waves[-1]]


def shortest_path(board: Board) -> list[Cell]:
    """The cells of a shortest path from the head, which is left out, to the apple, with the whole body as walls.

    Ties go to the path that comes first when moves are compared in ``SEARCH_ORDER``. Empty without a path.
    """
    size = board.size
    bit = _bits(size)[board.head]
    x, y = board.head
    path = []
    stride = size + 1
    for wave in reversed(waves_to_head(board)):
        # In SEARCH_ORDER, written out: this is the inner loop of every player that looks ahead.
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


def survives_eating(board: Board, path: list[Cell]) -> bool:
    """Whether the tail can be reached, or the board is full, once the snake has gone a path and eaten at its end.

    A snake that reaches its tail can follow it, for the tail makes way at every step that eats nothing.

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
    return reaches(head, tail, free | tail, size)


def tail_distances(board: Board) -> dict[Move, int]:
    """Steps from the head to the tail after each legal move that leaves the tail within reach, in board order."""
    distances = {}
    size = board.size
    for move, (head, tail, free) in _after_moves(board).items():
        waves = waves_from(head, tail, free | tail, size)
        if waves:
            distances[move] = len(waves) - 1
    return distances


def rooms(board: Board) -> dict[Move, int]:
    """How many free cells the head can reach after each legal move, in board order; the apple's cell counts."""
    size = board.size
    return {move: (flood(head, free, size) ^ head).bit_count() for move, (head, _, free) in _after_moves(board).items()}


def apple_distances(board: Board) -> dict[Move, int]:
    """Steps to the apple after each legal move that leaves it within reach, in board order; 0 for the move that eats.

    The body lies as it does after the move, and all of it is wall.
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
    """Head, tail and free cells after each legal move, in board order."""
    size = board.size
    bits = _bits(size)
    body = board.body
    head, tail = bits[body[0]], bits[body[-1]]
    before_tail = bits[body[-2]] if len(body) > 1 else None
    apple = 0 if board.apple is None else bits[board.apple]
    free = free_cells(board)
    # A snake of two reverses into its neck, which is also its tail.
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
