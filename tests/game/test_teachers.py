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
    """Breadth-first search as textbooks write it: whole body as walls, expanding UP, DOWN, LEFT, RIGHT."""
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
def test_bfs_takes_the_step_that_a_plain_queue_takes(board):
    expected = first_step_by_queue(board) or next(iter(board.legal_moves()), None)
    assert bfs(board) is expected


@given(boards())
def test_a_teacher_answers_a_legal_move_or_none_where_there_is_none(board):
    for name in TEACHERS:
        move = get_teacher(name)(board)
        assert move in board.legal_moves() if board.legal_moves() else move is None


def test_bfs_without_a_path_takes_the_first_legal_move_in_board_order():
    # The apple in the corner is walled off; UP is body, so RIGHT comes next.
    board = Board(4, ((1, 0), (0, 0), (0, 1), (0, 2), (1, 2), (1, 1)), (3, 3))
    assert bfs(board) is Move.RIGHT
    walled = Board(4, ((1, 1), (1, 0), (2, 0), (2, 1), (2, 2), (1, 2), (0, 2), (0, 3), (1, 3)), (3, 3))
    assert first_step_by_queue(walled) is None
    assert bfs(walled) is Move.LEFT


def test_bfs_goes_nowhere_special_where_no_apple_is():
    assert bfs(Board(3, ((1, 1),), None)) is Move.UP


@pytest.mark.parametrize("root", [SAMPLE_DIR, SHARED_DIR], ids=["sample", "shared"])
def test_bfs_makes_the_move_of_every_real_row(root):
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
        game.play(teacher(game.board) or game.board.doomed_move())
    return game


# Name, seeded games, mean and standard deviation of the apples as measured over 1,000 games. Of random_legal's games a
# third starve; without a limit it comes to 6.1 apples.
@pytest.mark.parametrize(
    ("name", "num_games", "mean", "deviation"),
    [
        ("bfs", 60, 28.6, 7.3),
        ("random_legal", 100, 4.4, 2.6),
        ("safe_greedy", 12, 98, 1.6),
    ],
)
def test_a_teacher_played_until_it_dies_scores_as_measured_before(name, num_games, mean, deviation):
    apples = [play(name, seed).num_apples for seed in range(num_games)]
    assert abs(sum(apples) / num_games - mean) < 3 * deviation / num_games**0.5


def test_bfs_under_upstreams_rules_scores_as_the_files_do():
    apples = [play("bfs", seed, upstream_rules=True).num_apples for seed in range(150)]
    # Reference: mean 19.6, standard deviation 8; three standard errors.
    assert abs(sum(apples) / 150 - 19.6) < 3 * 8 / 150**0.5


@given(boards())
def test_astar_takes_a_shortest_path_where_there_is_one(board):
    move = get_teacher("astar")(board)
    if apple_distance(board) is not None:
        assert move in shortest_moves(board)
    else:
        assert move is next(iter(board.legal_moves()), None)


def test_astar_goes_straight_on_where_bfs_prefers_up():
    board = Board(8, ((2, 2), (1, 2)), (5, 5))
    teacher = get_teacher("astar")
    moves = []
    while isinstance(board, Board) and board.apple is not None:
        moves.append(teacher(board))
        board = board.after(moves[-1])
    assert sum(a is not b for a, b in pairwise(moves)) == 1


@given(boards())
def test_greedy_never_goes_farther_off_than_it_must(board):
    def distance(move: Move) -> int:
        return sum(abs(a - b) for a, b in zip(board.target(move), board.apple, strict=True))

    move = get_teacher("greedy")(board)
    assert move is None or distance(move) == min(map(distance, board.legal_moves()))


def test_safe_greedy_leaves_an_apple_that_would_shut_it_in():
    # bfs eats in the pocket at the left and is caught there; the tail is far up the right.
    trap = Board(4, ((1, 0), (1, 1), (0, 1), (0, 2), (1, 2), (2, 2), (3, 2)), (0, 0))
    assert bfs(trap) is Move.LEFT
    assert get_teacher("safe_greedy")(trap) is Move.RIGHT


def test_safe_greedy_takes_the_last_apple():
    board = Board(2, ((1, 0), (1, 1), (0, 1)), (0, 0))
    assert get_teacher("safe_greedy")(board) is Move.LEFT


@pytest.mark.parametrize("size", range(2, 12))
def test_the_cycle_visits_every_place_and_steps_to_a_neighbour(size):
    cycle = cycle_of(size)
    assert len(cycle.order) == size**2
    assert cycle.num_places == size**2 - size % 2
    by_place = {}
    for cell, place in cycle.order.items():
        by_place.setdefault(place, []).append(cell)
    assert sorted(by_place) == list(range(cycle.num_places))
    for place, cells in by_place.items():
        for x, y in cells:
            assert all(
                abs(x - next_x) + abs(y - next_y) == 1 for next_x, next_y in by_place[(place + 1) % cycle.num_places]
            )


@pytest.mark.parametrize("name", ["hamiltonian", "hamiltonian_shortcuts"])
@pytest.mark.parametrize("size", [*range(2, 8), 10])
def test_players_on_the_cycle_win_on_grids_of_even_and_odd_size(name, size):
    for seed in range(2 if size == 10 else 6):
        assert play(name, seed, size).end is End.WIN


def test_shortcuts_save_steps():
    steps = [[play(name, seed).num_steps for seed in range(4)] for name in ("hamiltonian", "hamiltonian_shortcuts")]
    assert sum(steps[1]) < 0.7 * sum(steps[0])


@given(boards(max_size=6))
def test_the_cycles_player_goes_on_from_a_position_of_any_other(board):
    """It finds back to the cycle and wins, unless it is caught before: it never dies with its tail within reach."""
    teacher = get_teacher("hamiltonian")
    for _ in range(100):
        reachable = bool(tail_distances(board))
        board = board.after(teacher(board)) if board.legal_moves() else None
        if not isinstance(board, Board) or board.apple is None:
            break
        assert not reachable or board.legal_moves()


def test_random_legal_repeats_itself_for_a_seed_and_differs_between_seeds():
    assert play("random_legal", 3).board == play("random_legal", 3).board
    open_board = Board(5, ((2, 2),), (0, 0))
    walks = {tuple(get_teacher("random_legal", seed)(open_board) for _ in range(1)) for seed in range(60)}
    assert len(walks) == 4


def test_random_legal_does_not_draw_what_the_game_draws():
    # The two share a seed; were they to share draws, where the apple lies would tell the first move.
    moves = {}
    for seed in range(200):
        board = Game(10, seed).board
        moves.setdefault(board.apple[1], set()).add(get_teacher("random_legal", seed)(board))
    assert all(len(found) > 1 for found in moves.values())


def test_an_unknown_teacher_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown teacher 'dfs'; known teachers: .*bfs.* Did you mean 'bfs'\?"):
        get_teacher("dfs")


def test_a_teacher_is_registered_under_a_name_once(monkeypatch):
    monkeypatch.setattr("snake_lora_pl.game.teachers.registry.TEACHERS", {})
    first = register_teacher("first")(lambda board: None)
    assert get_teacher("first") is first
    with pytest.raises(ValueError, match="registered already"):
        register_teacher("first")(lambda board: None)


def test_a_teacher_that_draws_is_made_anew_for_each_seed(monkeypatch):
    monkeypatch.setattr("snake_lora_pl.game.teachers.registry.TEACHERS", {})
    moves = list(Move)
    register_seeded_teacher("drawn")(lambda seed: lambda board: moves[seed])
    assert [get_teacher("drawn", seed)(Game(10).board) for seed in range(4)] == moves
