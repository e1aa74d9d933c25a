import json
from collections import deque
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given

from snake_lora_pl.game import (
    TEACHERS,
    Board,
    End,
    Game,
    Move,
    get_teacher,
    read_board,
    register_seeded_teacher,
    register_teacher,
)
from snake_lora_pl.game.search import apple_distance, shortest_moves, tail_distances
from snake_lora_pl.game.teachers.hamiltonian import cycle_of
from tests.game.board_strategies import boards

REPOSITORY_DIR = Path(__file__).parents[2]
SAMPLE_DIR = REPOSITORY_DIR / "tests" / "data" / "heuristics_v0.04"
SHARED_DIR = REPOSITORY_DIR.parent / "shared" / "data" / "heuristics_v0.04"

bfs = get_teacher("bfs")


def first_step_by_queue(board: Board) -> Move | None:
    """Return the first step of a textbook BFS: whole body as walls, cells expanded UP, DOWN, LEFT, RIGHT."""
    queue = deque([(board.head, None)])
    seen = {board.head}
    while queue:
        (x, y), first = queue.popleft()
        if (x, y) == board.apple:
            return first
        for move in (Move.UP, Move.DOWN, Move.LEFT, Move.RIGHT):
            cell = (x + move.dx, y + move.dy)
            if board.contains(cell) and cell not in board.body and cell not in seen:
                seen.add(cell)
                queue.append((cell, first or move))
    return None


@given(boards())
def test_bfs_agrees_with_a_textbook_queue(board):
    expected = first_step_by_queue(board) or next(iter(board.legal_moves()), None)
    assert bfs(board) is expected


@given(boards())
def test_every_teacher_returns_a_legal_move_or_none_if_there_is_none(board):
    for name in TEACHERS:
        move = get_teacher(name)(board)
        assert move in board.legal_moves() if board.legal_moves() else move is None


def test_bfs_without_a_path_takes_the_first_legal_move_in_board_order():
    # No path leads to the corner; UP is body, so RIGHT comes next.
    board = Board(4, ((1, 0), (0, 0), (0, 1), (0, 2), (1, 2), (1, 1)), (3, 3))
    assert bfs(board) is Move.RIGHT
    walled = Board(4, ((1, 1), (1, 0), (2, 0), (2, 1), (2, 2), (1, 2), (0, 2), (0, 3), (1, 3)), (3, 3))
    assert first_step_by_queue(walled) is None
    assert bfs(walled) is Move.LEFT


def test_bfs_without_an_apple_takes_the_first_legal_move():
    assert bfs(Board(3, ((1, 1),), None)) is Move.UP


@pytest.mark.parametrize("root", [SAMPLE_DIR, SHARED_DIR], ids=["sample", "shared"])
def test_bfs_reproduces_the_move_of_every_upstream_row(root):
    paths = sorted(root.glob("*/bfs-512/*.jsonl"))
    if not paths:
        pytest.skip(f"the upstream files are not at {root}")
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            row = json.loads(line)
            move = bfs(read_board(row["prompt"]))
            assert row["completion"].endswith(f": {move.name}"), f"{path}:{number}"


def play(name: str, seed: int, size: int = 10, **rules: bool) -> Game:
    game = Game(size, seed, max_steps_without_apple=4 * size**2, **rules)
    teacher = get_teacher(name, seed)
    while game.end is None:
        game.play(teacher(game.board) or game.board.fallback_move())
    return game


# Name, number of games, mean and standard deviation of apples, measured over 1,000 games (benchmarks.players). A third
# of random_legal's games end with STARVED; without that limit its mean is 6.1 apples.
@pytest.mark.parametrize(
    ("name", "num_games", "mean", "deviation"),
    [
        ("bfs", 60, 28.6, 7.3),
        ("random_legal", 100, 4.4, 2.6),
        ("safe_greedy", 8, 98, 1.6),
    ],
)
def test_mean_apples_are_within_three_standard_errors_of_the_measured_mean(name, num_games, mean, deviation):
    apples = [play(name, seed).num_apples for seed in range(num_games)]
    assert abs(sum(apples) / num_games - mean) < 3 * deviation / num_games**0.5


def test_bfs_under_upstream_rules_scores_like_the_upstream_files():
    apples = [play("bfs", seed, upstream_rules=True).num_apples for seed in range(150)]
    # Reference: mean 19.6, standard deviation 8. The bound is three standard errors.
    assert abs(sum(apples) / 150 - 19.6) < 3 * 8 / 150**0.5


@given(boards())
def test_astar_takes_a_shortest_path_if_there_is_one(board):
    move = get_teacher("astar")(board)
    if apple_distance(board) is not None:
        assert move in shortest_moves(board)
    else:
        assert move is next(iter(board.legal_moves()), None)


def test_astar_turns_only_once_on_an_open_board():
    board = Board(8, ((2, 2), (1, 2)), (5, 5))
    teacher = get_teacher("astar")
    moves = []
    while isinstance(board, Board) and board.apple is not None:
        moves.append(teacher(board))
        board = board.after(moves[-1])
    assert sum(a is not b for a, b in pairwise(moves)) == 1


@given(boards())
def test_greedy_minimizes_the_distance_to_the_apple(board):
    def distance(move: Move) -> int:
        return sum(abs(a - b) for a, b in zip(board.target(move), board.apple, strict=True))

    move = get_teacher("greedy")(board)
    assert move is None or distance(move) == min(map(distance, board.legal_moves()))


def test_safe_greedy_avoids_an_apple_in_a_dead_end():
    # bfs eats the apple in the dead end on the left; the tail is far away at the upper right.
    trap = Board(4, ((1, 0), (1, 1), (0, 1), (0, 2), (1, 2), (2, 2), (3, 2)), (0, 0))
    assert bfs(trap) is Move.LEFT
    assert get_teacher("safe_greedy")(trap) is Move.RIGHT


def test_safe_greedy_eats_the_apple_that_fills_the_board():
    board = Board(2, ((1, 0), (1, 1), (0, 1)), (0, 0))
    assert get_teacher("safe_greedy")(board) is Move.LEFT


@pytest.mark.parametrize("size", range(2, 12))
def test_the_cycle_contains_every_cell_and_steps_to_neighbors(size):
    cycle = cycle_of(size)
    assert len(cycle.indices) == size**2
    assert cycle.num_steps == size**2 - size % 2
    by_index = {}
    for cell, index in cycle.indices.items():
        by_index.setdefault(index, []).append(cell)
    assert sorted(by_index) == list(range(cycle.num_steps))
    for index, cells in by_index.items():
        for x, y in cells:
            assert all(
                abs(x - next_x) + abs(y - next_y) == 1 for next_x, next_y in by_index[(index + 1) % cycle.num_steps]
            )


@pytest.mark.parametrize("name", ["hamiltonian", "hamiltonian_shortcuts"])
@pytest.mark.parametrize("size", [*range(2, 8), 10])
def test_cycle_teachers_win_on_every_grid_size(name, size):
    for seed in range(2 if size == 10 else 6):
        assert play(name, seed, size).end is End.WIN


def test_shortcuts_save_a_third_of_the_steps():
    steps = [[play(name, seed).num_steps for seed in range(4)] for name in ("hamiltonian", "hamiltonian_shortcuts")]
    assert sum(steps[1]) < 0.7 * sum(steps[0])


@given(boards(max_size=6))
def test_hamiltonian_keeps_the_tail_reachable_from_any_position(board):
    teacher = get_teacher("hamiltonian")
    for _ in range(100):
        reachable = bool(tail_distances(board))
        board = board.after(teacher(board)) if board.legal_moves() else None
        if not isinstance(board, Board) or board.apple is None:
            break
        assert not reachable or board.legal_moves(), "no legal move although the tail was reachable before"


def test_random_legal_is_reproducible_and_depends_on_the_seed():
    assert play("random_legal", 3).board == play("random_legal", 3).board
    open_board = Board(5, ((2, 2),), (0, 0))
    assert {get_teacher("random_legal", seed)(open_board) for seed in range(60)} == set(Move)


def test_random_legal_is_independent_of_the_game_of_the_same_seed():
    # If teacher and game shared random numbers, the apple's cell would determine the first move.
    moves = {}
    for seed in range(200):
        board = Game(10, seed).board
        moves.setdefault(board.apple[1], set()).add(get_teacher("random_legal", seed)(board))
    assert all(len(found) > 1 for found in moves.values())


def test_an_unknown_teacher_is_rejected_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"'dfs'.*safe_greedy.*'bfs'"):
        get_teacher("dfs")


def test_a_teacher_name_can_be_registered_only_once(monkeypatch):
    monkeypatch.setattr("snake_lora_pl.game.teachers.registry.TEACHERS", {})
    first = register_teacher("first")(lambda board: None)
    assert get_teacher("first") is first
    with pytest.raises(ValueError, match="'first'"):
        register_teacher("first")(lambda board: None)


def test_a_seeded_teacher_is_made_for_each_seed(monkeypatch):
    monkeypatch.setattr("snake_lora_pl.game.teachers.registry.TEACHERS", {})
    moves = list(Move)
    register_seeded_teacher("random")(lambda seed: lambda board: moves[seed])
    assert [get_teacher("random", seed)(Game(10).board) for seed in range(4)] == moves
