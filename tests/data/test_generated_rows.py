import functools
import json
import time
from itertools import pairwise

import pytest

from snake_lora_pl.data.example_cache import GameCounter
from snake_lora_pl.data.generated_rows import GeneratedRow, generate_rows, write_dataset
from snake_lora_pl.data.jsonl import Row
from snake_lora_pl.errors import UserError
from snake_lora_pl.game import (
    STYLES,
    SYMMETRIES,
    TEACHERS,
    Board,
    BoardReader,
    Game,
    Move,
    apple_distance,
    get_teacher,
    read_board,
    read_move,
    read_state,
    starts_new_game,
)
from snake_lora_pl.game.game import starvation_cap
from snake_lora_pl.game.seeds import GAMES_PER_SEED, NUM_DATA_SEEDS, data_seed


def test_rows_are_the_whole_of_each_game_and_their_seed_plays_it_again():
    rows = list(generate_rows(num_games=5, grid_size=6, seed=4))
    for number in range(5):
        game = Game(6, data_seed(4, number))
        for step, row in enumerate(row for row in rows if row["game"] == number):
            assert list(row) == ["prompt", "completion", "game", "step", "seed"]
            assert (row["step"], row["seed"]) == (step, data_seed(4, number))
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
    assert data_seed(0, GAMES_PER_SEED - 1) < data_seed(1, 0)
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
    assert len(rows) == starvation_cap(6)


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


def boards_of(rows: list[GeneratedRow]) -> list[Board]:
    return [read_board(row["prompt"]) for row in rows]


def moves_of(rows: list[GeneratedRow]) -> list[Move]:
    return [read_move(row["completion"]) for row in rows]


@pytest.mark.parametrize("style", sorted(STYLES))
@pytest.mark.parametrize("teacher", sorted(TEACHERS))
def test_every_teacher_can_be_written_in_every_style(teacher, style):
    rows = list(generate_rows(num_games=1, grid_size=4, teacher=teacher, style=style, seed=2))
    reader = BoardReader()
    for row in rows:
        board = reader.read(row["prompt"])
        assert read_move(row["completion"]) in board.legal_moves()


def test_noise_plays_other_moves_than_it_writes():
    rows = list(generate_rows(num_games=4, grid_size=8, seed=3, noise=0.3))
    bfs = get_teacher("bfs")
    assert moves_of(rows) == [bfs(board) for board in boards_of(rows)]
    num_others = num_steps = 0
    for row, following in pairwise(rows):
        if following["step"] > 0:
            board, after = boards_of([row, following])
            assert after.head in [board.target(move) for move in board.legal_moves()]
            num_steps += 1
            num_others += after.head != board.target(bfs(board))
    # A random legal move is the teacher's own now and then.
    assert 0.1 < num_others / num_steps < 0.3


def test_noise_of_0_changes_nothing_and_noise_of_1_is_random_play():
    assert list(generate_rows(num_games=2, noise=0.0)) == list(generate_rows(num_games=2))
    rows = list(generate_rows(num_games=40, noise=1.0))
    assert max(board.length for board in boards_of(rows)) < 20


def test_every_game_stands_in_all_symmetries_under_one_number():
    plain = list(generate_rows(num_games=2, grid_size=5, seed=1))
    rows = list(generate_rows(num_games=2, grid_size=5, seed=1, augment=True))
    assert len(rows) == 8 * len(plain)
    assert [{key: row[key] for key in plain[0]} for row in rows if row["symmetry"] == 0] == plain
    bfs = get_teacher("bfs")
    for number, symmetry in enumerate(SYMMETRIES):
        turned = [row for row in rows if row["symmetry"] == number]
        assert [(row["game"], row["step"], row["seed"]) for row in turned] == [
            (row["game"], row["step"], row["seed"]) for row in plain
        ]
        assert boards_of(turned) == [symmetry.board(board) for board in boards_of(plain)]
        assert moves_of(turned) == [bfs(board) for board in boards_of(turned)]


def test_the_teacher_is_asked_again_because_its_choice_among_equals_does_not_turn():
    rows = list(generate_rows(num_games=10, augment=True))
    by_position = {}
    for row in rows:
        by_position.setdefault((row["game"], row["step"]), []).append(row)
    turned_labels = same = 0
    for group in by_position.values():
        first = moves_of(group[:1])[0]
        for row in group[1:]:
            turned_labels += 1
            same += SYMMETRIES[row["symmetry"]].move(first) is moves_of([row])[0]
    assert 0.05 < 1 - same / turned_labels < 0.4


def test_a_split_by_game_keeps_the_symmetries_of_a_game_together():
    counter = GameCounter()
    games = {}
    for row in generate_rows(num_games=3, grid_size=4, augment=True):
        named = Row(row["prompt"], row["completion"], f"{row['seed']}/{row['game']}", "a.jsonl", 1)
        games.setdefault(row["game"], set()).add(counter.game_of(named))
    assert [len(found) for found in games.values()] == [1, 1, 1]
    assert counter.num_games == 3


def test_upstreams_rules_leave_out_the_last_move_of_each_game():
    num_apples_under_head = 0
    for number in range(30):
        game = Game(10, data_seed(0, number), upstream_rules=True)
        bfs = get_teacher("bfs")
        boards = []
        while game.end is None:
            boards.append(game.board)
            game.play(bfs(game.board))
        rows = [row for row in upstream_rows() if row["game"] == number]
        # The files end with the step that eats only where the next apple came to lie under the head.
        under_head = game.board.apple is None
        assert boards_of(rows) == (boards if under_head else boards[:-1])
        num_apples_under_head += under_head
    assert 0 < num_apples_under_head < 30


@functools.cache
def upstream_rows() -> list[GeneratedRow]:
    return list(generate_rows(num_games=30, upstream_rules=True))


def test_no_position_under_upstreams_rules_is_without_a_path_to_the_apple():
    assert all(apple_distance(board) is not None for board in boards_of(upstream_rows()))


@pytest.mark.parametrize("options", [{"teacher": "random_legal"}, {"noise": 0.2, "augment": True, "style": "compact"}])
def test_any_number_of_workers_writes_the_same_bytes(tmp_path, options):
    paths = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    calls = []
    for num_workers, path in enumerate(paths, start=1):
        write_dataset(path, 20, 4, **options, num_workers=num_workers, progress=lambda *call: calls.append(call))
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert calls == [(number, 20) for number in range(1, 21)] * 2


def test_a_teacher_that_cannot_be_sent_to_another_process_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(TEACHERS, "here", lambda seed: lambda board: Move.UP)
    with pytest.raises(UserError, match="cannot be sent to another process .* or use one worker"):
        write_dataset(tmp_path / "a.jsonl", 2, teacher="here", num_workers=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_thousand_games_take_less_than_a_minute_on_two_cores(tmp_path):
    start = time.perf_counter()
    write_dataset(tmp_path / "a.jsonl", 1_000, num_workers=2)
    assert time.perf_counter() - start < 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_games": 0}, "num_games must lie between 1 and 1,000,000"),
        ({"num_games": GAMES_PER_SEED + 1}, "num_games must lie between 1 and 1,000,000"),
        ({"num_games": 1, "seed": -1}, "seed must lie between 0 and 999,999,999"),
        ({"num_games": 1, "seed": NUM_DATA_SEEDS}, "seed must lie between 0 and 999,999,999"),
        ({"num_games": 1, "grid_size": 1}, "at least 2 cells a side"),
        ({"num_games": 1, "teacher": "dfs"}, "unknown teacher 'dfs'; known teachers"),
        ({"num_games": 1, "style": "bfs"}, "unknown style 'bfs'; known styles"),
        ({"num_games": 1, "noise": 1.5}, "noise is a probability, from 0 to 1"),
        ({"num_games": 1, "noise": float("nan")}, "noise is a probability, from 0 to 1"),
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


def test_fewer_than_one_worker_is_refused(tmp_path):
    with pytest.raises(UserError, match="num_workers must be at least 1"):
        write_dataset(tmp_path / "a.jsonl", num_games=1, num_workers=0)
