from collections import deque

from hypothesis import given

from snake_lora_pl.game import Board, Cell, Move
from snake_lora_pl.game.search import (
    apple_distance,
    apple_distances,
    rooms,
    shortest_moves,
    shortest_path,
    survives_eating,
    tail_distances,
)
from tests.game.board_strategies import boards


def distances_by_queue(board: Board, walls: set[Cell]) -> dict[Cell, int]:
    """Steps from the head to every cell within reach, by a queue."""
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
    """The board after each legal move, the apple's cell kept as a cell to reach also where it is eaten."""
    return {move: after for move in Move if isinstance(after := board.after(move), Board)}


@given(boards())
def test_the_distance_to_the_apple_is_what_a_queue_finds(board):
    distances = distances_by_queue(board, set(board.body))
    assert apple_distance(board) == distances.get(board.apple)


@given(boards())
def test_a_shortest_path_leads_over_free_cells_to_the_apple(board):
    path = shortest_path(board)
    assert len(path) == (apple_distance(board) or 0)
    if not path:
        assert shortest_moves(board) == []
        return
    assert path[-1] == board.apple
    assert not set(path) & set(board.body)
    # Building the snake that has gone the path checks that no cell is torn from the next.
    Board(board.size, (*reversed(path), *board.body)[: board.length + 1], None)
    assert board.target(shortest_moves(board)[0]) == path[0]


@given(boards())
def test_shortest_moves_are_those_that_come_one_step_nearer(board):
    walls = set(board.body)
    wanted = set()
    for move in Move:
        target = board.target(move)
        if board.contains(target) and target not in walls:
            moved = Board(board.size, (target,), None)
            distances = distances_by_queue(moved, walls)
            if board.apple in distances and distances[board.apple] + 1 == apple_distance(board):
                wanted.add(move)
    assert set(shortest_moves(board)) == wanted


@given(boards())
def test_what_lies_within_reach_after_each_legal_move_is_what_a_queue_finds(board):
    tails, apples, spaces = tail_distances(board), apple_distances(board), rooms(board)
    after = boards_after(board)
    assert list(spaces) == list(after) == board.legal_moves()
    for move, moved in after.items():
        walls = set(moved.body)
        distances = distances_by_queue(moved, walls)
        assert spaces[move] == len(distances) - 1
        assert apples.get(move) == distances.get(board.apple)
        to_tail = distances_by_queue(moved, walls - {moved.body[-1]})
        assert tails.get(move) == to_tail.get(moved.body[-1])


def test_a_snake_survives_eating_where_its_tail_stays_within_reach():
    # The apple lies in a corner that the body closes off, tail last: eating there leaves the tail beside the head.
    board = Board(3, ((1, 0), (1, 1), (0, 1)), (0, 0))
    assert survives_eating(board, shortest_path(board))
    # One cell longer, the tail lies behind the wall that the body is.
    board = Board(3, ((1, 0), (1, 1), (0, 1), (0, 2)), (0, 0))
    assert not survives_eating(board, shortest_path(board))


def test_filling_the_board_is_survival():
    board = Board(2, ((1, 0), (1, 1), (0, 1)), (0, 0))
    assert survives_eating(board, shortest_path(board))
