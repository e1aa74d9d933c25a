from collections import deque

from hypothesis import given

from snake_lora_pl.game import Board, Cell, Move
from snake_lora_pl.game.search import (
    apple_distance,
    apple_distances,
    is_safe_to_eat,
    reachable_space,
    shortest_moves,
    shortest_path,
    tail_distances,
)
from tests.game.board_strategies import boards


def distances_by_queue(board: Board, walls: set[Cell]) -> dict[Cell, int]:
    """Return the steps from the head to every reachable cell, by a textbook BFS."""
    distances = {board.head: 0}
    queue = deque(distances)
    while queue:
        x, y = queue.popleft()
        for move in Move:
            cell = (x + move.dx, y + move.dy)
            if board.contains(cell) and cell not in walls and cell not in distances:
                distances[cell] = distances[x, y] + 1
                queue.append(cell)
    return distances


def boards_after(board: Board) -> dict[Move, Board]:
    """Return the board after each legal move."""
    return {move: after for move in Move if isinstance(after := board.after(move), Board)}


@given(boards())
def test_apple_distance_agrees_with_a_textbook_queue(board):
    distances = distances_by_queue(board, set(board.body))
    assert apple_distance(board) == distances.get(board.apple)


@given(boards())
def test_a_shortest_path_leads_through_free_cells_to_the_apple(board):
    path = shortest_path(board)
    assert len(path) == (apple_distance(board) or 0)
    if not path:
        assert shortest_moves(board) == []
        return
    assert path[-1] == board.apple
    assert not set(path) & set(board.body)
    # The constructor validates that the cells of the path are adjacent.
    Board(board.size, (*reversed(path), *board.body)[: board.length + 1], None)
    assert board.target(shortest_moves(board)[0]) == path[0]


@given(boards())
def test_shortest_moves_are_the_moves_that_reduce_the_distance(board):
    walls = set(board.body)
    expected = set()
    for move in Move:
        target = board.target(move)
        if board.contains(target) and target not in walls:
            moved = Board(board.size, (target,), None)
            distances = distances_by_queue(moved, walls)
            if board.apple in distances and distances[board.apple] + 1 == apple_distance(board):
                expected.add(move)
    assert set(shortest_moves(board)) == expected


@given(boards())
def test_reachability_after_each_move_agrees_with_a_textbook_queue(board):
    tails, apples, spaces = tail_distances(board), apple_distances(board), reachable_space(board)
    after = boards_after(board)
    assert list(spaces) == list(after) == board.legal_moves()
    for move, moved in after.items():
        walls = set(moved.body)
        distances = distances_by_queue(moved, walls)
        assert spaces[move] == len(distances) - 1
        assert apples.get(move) == distances.get(board.apple)
        to_tail = distances_by_queue(moved, walls - {moved.body[-1]})
        assert tails.get(move) == to_tail.get(moved.body[-1])


def test_eating_is_safe_only_if_the_tail_stays_reachable():
    # The body encloses the corner with the apple; after eating, the tail is next to the head.
    board = Board(3, ((1, 0), (1, 1), (0, 1)), (0, 0))
    assert is_safe_to_eat(board, shortest_path(board))
    # With one more cell, the tail is behind the body.
    board = Board(3, ((1, 0), (1, 1), (0, 1), (0, 2)), (0, 0))
    assert not is_safe_to_eat(board, shortest_path(board))


def test_eating_the_last_apple_is_safe():
    board = Board(2, ((1, 0), (1, 1), (0, 1)), (0, 0))
    assert is_safe_to_eat(board, shortest_path(board))
