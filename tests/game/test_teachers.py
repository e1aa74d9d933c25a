import json
from collections import deque
from pathlib import Path

import pytest
from hypothesis import given

from snake_lora_pl.game import TEACHERS, Board, Game, Move, get_teacher, read_board, register_teacher
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
    for teacher in TEACHERS.values():
        move = teacher(board)
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


def test_bfs_played_until_it_dies_scores_as_measured_before():
    apples = []
    for seed in range(60):
        game = Game(10, seed, max_steps_without_apple=1_000)
        while game.end is None:
            game.play(bfs(game.board))
        apples.append(game.num_apples)
    # Reference: mean 28.6, standard deviation 7.3; three standard errors.
    assert abs(sum(apples) / 60 - 28.6) < 3 * 7.3 / 60**0.5


def test_an_unknown_teacher_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown teacher 'dfs'; known teachers: .*bfs"):
        get_teacher("dfs")


def test_a_teacher_is_registered_under_a_name_once(monkeypatch):
    monkeypatch.setattr("snake_lora_pl.game.teachers.TEACHERS", {})
    first = register_teacher("first")(lambda board: None)
    assert get_teacher("first") is first
    with pytest.raises(ValueError, match="registered already"):
        register_teacher("first")(lambda board: None)
