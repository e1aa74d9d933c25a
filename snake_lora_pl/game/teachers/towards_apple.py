"""Players that go for the apple and think of nothing else."""

from __future__ import annotations

import heapq

from snake_lora_pl.game.board import Board, Cell, Move
from snake_lora_pl.game.search import shortest_moves
from snake_lora_pl.game.teachers.registry import register_teacher


@register_teacher("bfs")
def bfs(board: Board) -> Move | None:
    """The first step of a shortest path to the apple, with the whole body, tail included, taken as walls.

    Ties go to the path that comes first when moves are compared in the order UP, DOWN, LEFT, RIGHT, as in the
    ``heuristics-v0.04`` files: a queue that starts at the head and expands in this order meets cells in the order of
    their least shortest path. Where no path exists: the first legal move in board order.
    """
    return next(iter(shortest_moves(board) or board.legal_moves()), None)


@register_teacher("astar")
def astar(board: Board) -> Move | None:
    """The first step of the path to the apple that A* finds, with the Manhattan distance as its estimate.

    The path is a shortest one, with the whole body as walls. Of cells that promise paths of one length, the nearest to
    the apple is expanded first, and of these the one found last, in board order: so it goes straight on where ``bfs``
    zigzags. Where no path exists: the first legal move in board order.
    """
    first = _astar_first_step(board)
    return first or next(iter(board.legal_moves()), None)


def _astar_first_step(board: Board) -> Move | None:
    if board.apple is None:
        return None
    apple_x, apple_y = board.apple
    size = board.size
    closed = set(board.body)
    # (promised length, estimate, order of finding, steps so far, cell, first step)
    heap: list[tuple[int, int, int, int, Cell, Move | None]] = [(0, 0, 0, 0, board.head, None)]
    num_found = 0
    while heap:
        _, _, _, num_steps, cell, first = heapq.heappop(heap)
        if cell == board.apple:
            return first
        if cell in closed and cell != board.head:
            continue
        closed.add(cell)
        for move in Move:
            x, y = cell[0] + move.dx, cell[1] + move.dy
            if 0 <= x < size and 0 <= y < size and (x, y) not in closed:
                estimate = abs(apple_x - x) + abs(apple_y - y)
                num_found += 1
                promised = num_steps + 1 + estimate
                heapq.heappush(heap, (promised, estimate, -num_found, num_steps + 1, (x, y), first or move))
    return None


@register_teacher("greedy")
def greedy(board: Board) -> Move | None:
    """The legal move that brings the head nearest to the apple as the crow flies; ties go by board order."""
    if board.apple is None:
        return next(iter(board.legal_moves()), None)
    apple_x, apple_y = board.apple

    def distance(move: Move) -> int:
        x, y = board.target(move)
        return abs(apple_x - x) + abs(apple_y - y)

    return min(board.legal_moves(), key=distance, default=None)
