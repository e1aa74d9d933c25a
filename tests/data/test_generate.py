import json

import pytest

from snake_lora_pl.data.generate import GAMES_PER_SEED, STARVATION_BOARDS, game_seed, generate_rows, write_dataset
from snake_lora_pl.errors import UserError
from snake_lora_pl.game import (
    TEACHERS,
    Board,
    Game,
    Move,
    get_teacher,
    read_board,
    read_move,
    read_state,
    starts_new_game,
)


def test_rows_are_the_whole_of_each_game_and_their_seed_plays_it_again():
    rows = list(generate_rows(num_games=5, grid_size=6, seed=4))
    for number in range(5):
        game = Game(6, game_seed(4, number))
        for step, row in enumerate(row for row in rows if row["game"] == number):
            assert list(row) == ["prompt", "completion", "game", "step", "seed"]
            assert (row["step"], row["seed"]) == (step, game_seed(4, number))
            assert read_board(row["prompt"]) == game.board
            move = read_move(row["completion"])
            assert move is get_teacher("bfs")(game.board)
            game.play(move)
        # A row for every position that has a legal move: the game stopped for no other reason.
        assert game.end is not None or game.board.legal_moves() == []


def test_games_written_are_the_games_found_again():
    previous, move, num_found = None, None, 0
    for row in generate_rows(num_games=20, seed=1):
        state = read_state(row["prompt"])
        begins = starts_new_game(previous, move, state)
        assert begins == (row["step"] == 0)
        num_found += begins
        previous, move = state, read_move(row["completion"])
    assert num_found == 20


def test_a_game_does_not_depend_on_how_many_are_played():
    few = list(generate_rows(num_games=2, grid_size=5))
    many = list(generate_rows(num_games=4, grid_size=5))
    assert many[: len(few)] == few
    assert many[len(few)]["game"] == 2


def test_no_two_data_sets_share_a_game():
    assert game_seed(0, GAMES_PER_SEED - 1) < game_seed(1, 0)
    first, second = (list(generate_rows(num_games=1, seed=seed)) for seed in (0, 1))
    assert [row["prompt"] for row in first] != [row["prompt"] for row in second]


def test_a_teacher_that_walks_in_circles_starves(monkeypatch):
    clockwise = {Move.UP: Move.RIGHT, Move.RIGHT: Move.DOWN, Move.DOWN: Move.LEFT, Move.LEFT: Move.UP}
    last = Move.UP

    def circle(board: Board) -> Move:
        nonlocal last
        last = clockwise[last]
        return last

    monkeypatch.setitem(TEACHERS, "circle", lambda seed: circle)
    rows = list(generate_rows(num_games=1, grid_size=6, teacher="circle"))
    assert read_state(rows[-1]["prompt"]).length == 1
    assert len(rows) == STARVATION_BOARDS * 36


def test_the_same_arguments_write_the_same_bytes(tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "new" / "b.jsonl"]
    num_rows = [write_dataset(path, num_games=3, grid_size=6) for path in paths]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    lines = paths[0].read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == list(generate_rows(num_games=3, grid_size=6))
    assert num_rows == [len(lines)] * 2


def test_progress_is_told_after_each_game(tmp_path):
    calls = []
    write_dataset(tmp_path / "a.jsonl", num_games=3, grid_size=4, progress=lambda *call: calls.append(call))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_an_interrupted_run_leaves_the_file_of_before_and_nothing_else(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("of before\n")

    def interrupt(num_played, num_games):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(path, num_games=3, grid_size=4, progress=interrupt)
    assert path.read_text() == "of before\n"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_games": 0}, "num_games must lie between 1 and 1,000,000"),
        ({"num_games": GAMES_PER_SEED + 1}, "num_games must lie between 1 and 1,000,000"),
        ({"num_games": 1, "seed": -1}, "seed must not be negative"),
        ({"num_games": 1, "grid_size": 1}, "at least 2 cells a side"),
        ({"num_games": 1, "teacher": "dfs"}, "unknown teacher 'dfs'; known teachers"),
        ({"num_games": 1, "style": "bfs"}, "unknown style 'bfs'; known styles"),
    ],
)
def test_a_mistake_is_told_at_the_call_and_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        generate_rows(**arguments)
    with pytest.raises(UserError, match=message):
        write_dataset(tmp_path / "new" / "a.jsonl", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_not_a_file_to_write(tmp_path):
    with pytest.raises(UserError, match="is a directory"):
        write_dataset(tmp_path, num_games=1)
