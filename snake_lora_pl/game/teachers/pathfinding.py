"""Teachers that move toward the apple and do not look beyond it: BFS, A* and a greedy one."""

from __future__ import annotations

import heapq

from snake_lora_pl.game.board import Board, Cell, Move
from snake_lora_pl.game.search import shortest_moves
from snake_lora_pl.game.teachers.registry import register_teacher


@register_teacher("bfs")
def bfs(board: Board) -> Move | None:
    """Return the first step of a shortest path to the apple, with the whole body, including the tail, as walls.

    Of several shortest paths, it takes the first when their moves are compared in the order UP, DOWN, LEFT, RIGHT, as
    in the ``heuristics-v0.04`` files: this is the path that a queue finds which starts at the head and expands cells in
    this order. If there is no path, it returns the first legal move in board order.
    """
    return next(iter(shortest_moves(board) or board.legal_moves()), None)


@register_teacher("astar")
def astar(board: Board) -> Move | None:
    """Return the first step of the path to the apple that A* finds, with the Manhattan distance as heuristic.

    The path is a shortest one, with the whole body as walls. Of cells with equal estimated path lengths, the nearest to
    the apple is expanded first, and of these the one found last, so the path goes straight where that of ``bfs``
    zigzags. If there is no path, it returns the first legal move in board order.
    """
    return _astar_first_step(board) or next(iter(board.legal_moves()), None)


def _astar_first_step(board: Board) -> Move | None:
    if board.apple is None:
        return None
    apple_x, apple_y = board.apple
    size = board.size
    closed = set(board.body)
    # (estimated path length, estimated rest, negated order of discovery, steps so far, cell, first step)
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
                entry = (num_steps + 1 + estimate, estimate, -num_found, num_steps + 1, (x, y), first or move)
                heapq.heappush(heap, entry)
    return None


@register_teacher("greedy")
def greedy(board: Board) -> Move | None:
    """Return the legal move with the least Manhattan distance to the apple; ties are broken by board order."""
    if board.apple is None:
        return next(iter(board.legal_moves()), None)
    apple_x, apple_y = board.apple

    def distance(move: Move) -> int:
        x, y = board.target(move)
        return abs(apple_x - x) + abs(apple_y - y)

    return min(board.legal_moves(), key=distance, default=None)
