"""Metrics of a position and a move, as defined by the completions of the ``heuristics-v0.04`` files.

The definitions follow the upstream program, including its peculiarities.
"""

from __future__ import annotations

from typing import NamedTuple

from snake_lora_pl.game.board import Board, Move
from snake_lora_pl.game.text.style import apple_of

# The order in which the files list directions, except for valid moves.
FILE_ORDER = (Move.UP, Move.DOWN, Move.LEFT, Move.RIGHT)


class Danger(NamedTuple):
    """Flags of the cells ahead, to the left and to the right of a chosen move that end the game."""

    straight: bool
    left: bool
    right: bool


class Metrics(NamedTuple):
    """Metrics of a position and a move.

    Attributes:
        valid_moves: Moves to cells of the grid without body, in board order. The tail's cell counts as body. Reversal
            needs no check, because the neck is body.
        manhattan_distance: Manhattan distance from the head to the apple.
        apple_direction: Directions of the apple from the head: at most one for each axis.
        danger: ``straight`` is whether the chosen move's cell is wall or body; ``left`` and ``right`` consider walls
            only.
        free_space: For each direction, the cells straight ahead of the head up to the edge or the body.
    """

    valid_moves: tuple[Move, ...]
    manhattan_distance: int
    apple_direction: frozenset[Move]
    danger: Danger
    free_space: dict[Move, int]


def measure(board: Board, move: Move) -> Metrics:
    """Return the metrics of a position and a chosen move.

    Raises:
        ValueError: If the board has no apple.
    """
    apple_x, apple_y = apple_of(board)
    x, y = board.head
    free_space = {direction: straight_run(board, direction) for direction in Move}
    is_toward = {Move.UP: apple_y > y, Move.RIGHT: apple_x > x, Move.DOWN: apple_y < y, Move.LEFT: apple_x < x}
    return Metrics(
        valid_moves=tuple(direction for direction, num_cells in free_space.items() if num_cells),
        manhattan_distance=abs(apple_x - x) + abs(apple_y - y),
        apple_direction=frozenset(direction for direction in Move if is_toward[direction]),
        danger=Danger(
            straight=free_space[move] == 0,
            left=not board.contains((x - move.dy, y + move.dx)),
            right=not board.contains((x + move.dy, y - move.dx)),
        ),
        free_space=free_space,
    )


def straight_run(board: Board, direction: Move) -> int:
    """Return the number of cells straight ahead of the head up to the edge or the body."""
    dx, dy = direction.dx, direction.dy
    x, y = board.head
    run = 0
    while True:
        x += dx
        y += dy
        if not (0 <= x < board.size and 0 <= y < board.size) or (x, y) in board.body:
            return run
        run += 1


def write_metrics(metrics: Metrics, manhattan_label: str, free_space: str) -> str:
    """Return the lines that state the metrics.

    Args:
        metrics: The metrics.
        manhattan_label: The style's label of the Manhattan distance.
        free_space: The free space in the style's notation.
    """
    direction = ", ".join(f"{move.name.lower()!r}: {move in metrics.apple_direction:d}" for move in FILE_ORDER)
    danger = ", ".join(f"{side!r}: {is_danger:d}" for side, is_danger in metrics.danger._asdict().items())
    return (
        "Metrics:\n"
        f"- Valid moves: {[move.name for move in metrics.valid_moves]}\n"
        f"- {manhattan_label}: {metrics.manhattan_distance}\n"
        f"- Apple direction: {{{direction}}}\n"
        f"- Danger assessment: {{{danger}}}\n"
        f"- Free space: {free_space}\n"
    )
