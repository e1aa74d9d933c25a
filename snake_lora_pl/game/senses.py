"""What a snake could know of its four ways before it chooses one. Knows nothing of players or text."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

from snake_lora_pl.game.board import Board, Move
from snake_lora_pl.game.search import apple_distances, rooms, shortest_path, survives_eating, tail_distances

Obstacle: TypeAlias = Literal["wall", "body"]


class Sense(NamedTuple):
    """What lies one way from the head.

    Distances and room are those after the move, the body lying as it does then.

    Attributes:
        obstacle: What makes the move deadly or no move at all; the rest then says nothing.
        apple_distance: Steps to the apple through free cells; 0 where the move eats, None where there is no path.
        is_bait: Whether the snake could not reach its tail any more once it had eaten at the end of a shortest path
            that begins with this move.
        tail_distance: Steps to the tail's cell; None where it is cut off.
        room: Free cells that can be reached.
    """

    obstacle: Obstacle | None = None
    apple_distance: int | None = None
    is_bait: bool = False
    tail_distance: int | None = None
    room: int = 0


def sense(board: Board) -> dict[Move, Sense]:
    """What lies in each direction, in board order.

    Raises:
        ValueError: If the board has no apple.
    """
    if board.apple is None:
        raise ValueError("a board without an apple has nothing to be sensed: the game is over")
    apples, tails, spaces = apple_distances(board), tail_distances(board), rooms(board)
    senses = {}
    for move in Move:
        if move not in spaces:
            senses[move] = Sense("body" if board.contains(board.target(move)) else "wall")
            continue
        distance = apples.get(move)
        is_bait = distance is not None and not _survives_eating_by(board, move)
        senses[move] = Sense(None, distance, is_bait, tails.get(move), spaces[move])
    return senses


def _survives_eating_by(board: Board, move: Move) -> bool:
    """Whether the tail is within reach after eating at the end of a shortest path that begins with a move."""
    after = board.after(move)
    if board.target(move) == board.apple:
        return survives_eating(board, [board.target(move)])
    return isinstance(after, Board) and survives_eating(after, shortest_path(after))
