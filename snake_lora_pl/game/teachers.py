"""Players that search: each is a function from a board to a move. Knows nothing of text or models.

A teacher looks at the board alone, so any position can be put to it, also one that it would not have reached itself.
It answers None where no legal move is left.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeAlias

from snake_lora_pl.game.board import Board, Move

Teacher: TypeAlias = Callable[[Board], "Move | None"]

TEACHERS: dict[str, Teacher] = {}


def register_teacher(name: str) -> Callable[[Teacher], Teacher]:
    """Decorator that makes a teacher known by a name.

    Raises:
        ValueError: If the name is taken.
    """

    def register(teacher: Teacher) -> Teacher:
        if name in TEACHERS:
            raise ValueError(f"a teacher named {name!r} is registered already; choose another name")
        TEACHERS[name] = teacher
        return teacher

    return register


def get_teacher(name: str) -> Teacher:
    """The teacher of a name.

    Raises:
        ValueError: If there is none; the message lists those there are.
    """
    if name not in TEACHERS:
        raise ValueError(f"unknown teacher {name!r}; known teachers: {', '.join(sorted(TEACHERS))}")
    return TEACHERS[name]


@register_teacher("bfs")
def bfs(board: Board) -> Move | None:
    """The first step of a shortest path to the apple, with the whole body, tail included, taken as walls.

    Ties go to the path that comes first when moves are compared in the order UP, DOWN, LEFT, RIGHT, as in the
    ``heuristics-v0.04`` files. Where no path exists: the first legal move in board order.
    """
    move = _first_step_to_apple(board)
    if move is None:
        move = next(iter(board.legal_moves()), None)
    return move


def _first_step_to_apple(board: Board) -> Move | None:
    """Breadth-first search from the apple to the head, on sets of cells kept as the bits of one integer.

    A queue that starts at the head and expands UP, DOWN, LEFT, RIGHT meets cells in the order of their least shortest
    path, so its first step is the first move in that order onto a cell that is one step nearer to the apple. Those
    cells are where the wave from the apple first touches the head's surroundings.

    Bit ``y * (size + 1) + x`` is cell (x, y). The column ``x == size`` is always wall, so that nothing spills over from
    one row into the next.
    """
    if board.apple is None:
        return None
    stride = board.size + 1
    free = _all_cells(board.size)
    for x, y in board.body:
        free ^= 1 << (y * stride + x)
    head_x, head_y = board.head
    head = 1 << (head_y * stride + head_x)
    up, down, left, right = head << stride, head >> stride, head >> 1, head << 1
    goal = (up | down | left | right) & free
    apple_x, apple_y = board.apple
    wave = 1 << (apple_y * stride + apple_x)
    while wave:
        if wave & goal:
            if wave & up:
                return Move.UP
            if wave & down:
                return Move.DOWN
            return Move.LEFT if wave & left else Move.RIGHT
        free &= ~wave
        wave = (wave << stride | wave >> stride | wave >> 1 | wave << 1) & free
    return None


@lru_cache(maxsize=16)
def _all_cells(size: int) -> int:
    row = (1 << size) - 1
    return sum(row << (y * (size + 1)) for y in range(size))
