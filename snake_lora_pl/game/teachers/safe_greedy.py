"""The player that eats only where it can leave again."""

from __future__ import annotations

from snake_lora_pl.game.board import Board, Move
from snake_lora_pl.game.search import rooms, shortest_path, survives_eating, tail_distances
from snake_lora_pl.game.teachers.registry import register_teacher


@register_teacher("safe_greedy")
def safe_greedy(board: Board) -> Move | None:
    """The first step of a shortest path to the apple if the tail is within reach once the apple is eaten.

    The path is the one that ``bfs`` sees, gone in thought to its end. Where it is not safe: the move that leaves the
    tail farthest off, yet within reach. Where no move does that: the move into the largest space. Ties go by board
    order.
    """
    path = shortest_path(board)
    if path and survives_eating(board, path):
        return next(move for move in Move if board.target(move) == path[0])
    distances = tail_distances(board) or rooms(board)
    return max(distances, key=distances.__getitem__, default=None)
