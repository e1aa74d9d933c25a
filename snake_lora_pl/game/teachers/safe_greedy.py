"""A teacher that eats the apple only if it can still reach its tail afterwards."""

from __future__ import annotations

from snake_lora_pl.game.board import Board, Move
from snake_lora_pl.game.search import is_safe_to_eat, reachable_space, shortest_path, tail_distances
from snake_lora_pl.game.teachers.registry import register_teacher


@register_teacher("safe_greedy")
def safe_greedy(board: Board) -> Move | None:
    """Return the first step of the path that ``bfs`` takes, if the tail is reachable after eating at its end.

    Otherwise return the move after which the tail is farthest away but reachable, or, if no move keeps the tail
    reachable, the move into the largest space. Ties are broken by board order.
    """
    path = shortest_path(board)
    if path and is_safe_to_eat(board, path):
        return next(move for move in Move if board.target(move) == path[0])
    scores = tail_distances(board) or reachable_space(board)
    return max(scores, key=scores.__getitem__, default=None)
