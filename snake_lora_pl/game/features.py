"""Features of the four moves: what lies ahead in each direction, for prompts that describe the moves."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

from snake_lora_pl.game.board import Board, Move
from snake_lora_pl.game.search import apple_distances, is_safe_to_eat, reachable_space, shortest_path, tail_distances

Obstacle: TypeAlias = Literal["wall", "body"]


class MoveFeatures(NamedTuple):
    """Features of one move. Distances and free cells refer to the board after the move.

    Attributes:
        obstacle: The reason why the move is not legal; the other fields are then unset.
        apple_distance: Steps to the apple through free cells; 0 if the move eats it, None if there is no path.
        is_bait: Whether the tail is unreachable after eating at the end of a shortest path that begins with this move.
        tail_distance: Steps to the tail's cell; None if it is unreachable.
        num_reachable: Free cells that can be reached.
    """

    obstacle: Obstacle | None = None
    apple_distance: int | None = None
    is_bait: bool = False
    tail_distance: int | None = None
    num_reachable: int = 0


def move_features(board: Board) -> dict[Move, MoveFeatures]:
    """Return the features of each move, in board order.

    Raises:
        ValueError: If the board has no apple.
    """
    if board.apple is None:
        raise ValueError("cannot compute the features of a board without an apple: the game has ended")
    apples, tails, spaces = apple_distances(board), tail_distances(board), reachable_space(board)
    features = {}
    for move in Move:
        if move not in spaces:
            features[move] = MoveFeatures("body" if board.contains(board.target(move)) else "wall")
            continue
        distance = apples.get(move)
        is_bait = distance is not None and not _is_safe_to_eat_after(board, move)
        features[move] = MoveFeatures(None, distance, is_bait, tails.get(move), spaces[move])
    return features


def _is_safe_to_eat_after(board: Board, move: Move) -> bool:
    """Return whether the tail is reachable after eating on a shortest path that begins with a move."""
    if board.target(move) == board.apple:
        return is_safe_to_eat(board, [board.target(move)])
    after = board.after(move)
    return isinstance(after, Board) and is_safe_to_eat(after, shortest_path(after))
