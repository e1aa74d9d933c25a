"""The metrics that completions of the ``heuristics-v0.04`` files reason with.

What they mean is what the upstream program wrote, its peculiarities included.
"""

from __future__ import annotations

from typing import NamedTuple

from snake_lora_pl.game.board import Board, Move
from snake_lora_pl.game.text.style import apple_of

# The order in which the files name directions, but for valid moves and drawn boards' free space.
_NAMED_ORDER = (Move.UP, Move.DOWN, Move.LEFT, Move.RIGHT)


class Danger(NamedTuple):
    """Whether the cells around the head are deadly, relative to a chosen move."""

    straight: bool
    left: bool
    right: bool


class Metrics(NamedTuple):
    """What the files say of a position and a move.

    Attributes:
        valid_moves: Moves onto cells of the grid without body. The tail's cell counts as body; reversal is not looked
            at, for the neck is body anyway. In the order UP, RIGHT, DOWN, LEFT.
        manhattan_distance: Steps from head to apple as the crow flies.
        apple_direction: Where the apple lies: at most one direction of each axis.
        danger: Straight is the chosen move's own cell, wall or body; left and right look at walls only.
        free_space: Cells from the head straight on until edge or body, for each direction.
    """

    valid_moves: tuple[Move, ...]
    manhattan_distance: int
    apple_direction: frozenset[Move]
    danger: Danger
    free_space: dict[Move, int]


def measure(board: Board, move: Move) -> Metrics:
    """The metrics of a position and a chosen move.

    Raises:
        ValueError: If the board has no apple.
    """
    apple_x, apple_y = apple_of(board)
    x, y = board.head
    runs = {direction: straight_run(board, direction) for direction in Move}
    signs = {Move.UP: apple_y > y, Move.RIGHT: apple_x > x, Move.DOWN: apple_y < y, Move.LEFT: apple_x < x}
    return Metrics(
        valid_moves=tuple(direction for direction, run in runs.items() if run),
        manhattan_distance=abs(apple_x - x) + abs(apple_y - y),
        apple_direction=frozenset(direction for direction, lies_there in signs.items() if lies_there),
        danger=Danger(
            straight=runs[move] == 0,
            left=not board.contains((x - move.dy, y + move.dx)),
            right=not board.contains((x + move.dy, y - move.dx)),
        ),
        free_space=runs,
    )


def straight_run(board: Board, direction: Move) -> int:
    """Cells from the head, straight on, until the edge or the body."""
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
    """The lines that name the metrics, which are alike in all styles but for two of them.

    Args:
        metrics: What to write.
        manhattan_label: What the style calls the distance.
        free_space: The free space as the style writes it.
    """
    direction = ", ".join(f"{move.name.lower()!r}: {move in metrics.apple_direction:d}" for move in _NAMED_ORDER)
    danger = ", ".join(f"{side!r}: {deadly:d}" for side, deadly in metrics.danger._asdict().items())
    return (
        "Metrics:\n"
        f"- Valid moves: {[move.name for move in metrics.valid_moves]}\n"
        f"- {manhattan_label}: {metrics.manhattan_distance}\n"
        f"- Apple direction: {{{direction}}}\n"
        f"- Danger assessment: {{{danger}}}\n"
        f"- Free space: {free_space}\n"
    )
