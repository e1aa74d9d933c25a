import functools
import hashlib
import json
import re
from itertools import pairwise

import pytest

from snake_lora_pl.data.game_counter import GameCounter
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
    PromptMoves,
    apple_distance,
    get_teacher,
    read_board,
    read_move,
    read_moves,
    read_state,
    starts_new_game,
)
from snake_lora_pl.game.game import starvation_cap
from snake_lora_pl.game.seeds import GAMES_PER_SEED, NUM_DATA_SEEDS, data_seed


def test_rows_cover_each_game_and_its_seed_repeats_it():
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
        # The game ended, or no legal move was left.
        assert game.end is not None or game.board.legal_moves() == []


def test_games_are_detected_in_generated_rows():
    previous, move, num_found = None, None, 0
    for row in generate_rows(num_games=20, seed=1):
        state = read_state(row["prompt"])
        begins = starts_new_game(previous, move, state)
        assert begins == (row["step"] == 0)
        num_found += begins
        previous, move = state, read_move(row["completion"])
    assert num_found == 20


def test_game_does_not_depend_on_the_number_of_games():
    few = list(generate_rows(num_games=2, grid_size=5))
    many = list(generate_rows(num_games=4, grid_size=5))
    assert many[: len(few)] == few
    assert many[len(few)]["game"] == 2


def test_data_sets_of_different_seeds_share_no_game():
    assert data_seed(0, GAMES_PER_SEED - 1) < data_seed(1, 0)
    first, second = (list(generate_rows(num_games=1, seed=seed)) for seed in (0, 1))
    assert [row["prompt"] for row in first] != [row["prompt"] for row in second]


def test_game_of_a_circling_teacher_ends_by_starvation(monkeypatch):
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


def test_same_arguments_write_the_same_bytes(tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "new" / "b.jsonl"]
    num_rows = [write_dataset(path, num_games=3, grid_size=6) for path in paths]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    lines = paths[0].read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == list(generate_rows(num_games=3, grid_size=6))
    assert num_rows == [len(lines)] * 2


def test_progress_is_reported_after_each_game(tmp_path):
    calls = []
    write_dataset(tmp_path / "a.jsonl", num_games=3, grid_size=4, progress=lambda *call: calls.append(call))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_interruption_keeps_the_previous_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("previous\n")

    def interrupt(num_played, num_games):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(path, num_games=3, grid_size=4, progress=interrupt)
    assert path.read_text() == "previous\n"
    assert list(tmp_path.iterdir()) == [path]


def boards_of(rows: list[GeneratedRow]) -> list[Board]:
    return [read_board(row["prompt"]) for row in rows]


def moves_of(rows: list[GeneratedRow]) -> list[Move]:
    return [read_move(row["completion"]) for row in rows]


@pytest.mark.parametrize("style", sorted(STYLES))
@pytest.mark.parametrize("teacher", sorted(TEACHERS))
def test_every_teacher_and_style_gives_legal_moves(teacher, style):
    rows = list(generate_rows(num_games=1, grid_size=4, teacher=teacher, style=style, seed=2))
    reader = BoardReader()
    for row in rows:
        board = reader.read(row["prompt"])
        legal = read_moves(row["prompt"]).legal if board is None else board.legal_moves()
        assert read_move(row["completion"]) in legal


def test_noise_changes_the_moves_played_and_not_the_moves_written():
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
    # Sometimes the random legal move is the teacher's move.
    assert 0.1 < num_others / num_steps < 0.3


def num_into_traps(rows: list[GeneratedRow]) -> int:
    """Count the steps into a trap that are not the teacher's, from positions with a safe move."""
    num_traps = 0
    for row, following in pairwise(rows):
        if following["step"] > 0:
            board, after = boards_of([row, following])
            moves = PromptMoves.of(board)
            is_random = after.head != board.target(read_move(row["completion"]))
            is_trap = any(board.target(move) == after.head for move in moves.traps)
            num_traps += is_random and is_trap and moves.is_decisive
    return num_traps


@pytest.mark.e2e
def test_safe_noise_moves_keep_the_tail_reachable():
    def played(**settings) -> list[GeneratedRow]:
        return list(generate_rows(6, 6, "safe_greedy", seed=3, noise=0.3, **settings))

    legal, safe, mixed = (played(noise_moves=name) for name in ("legal", "safe", "mixed"))
    assert num_into_traps(safe) == 0 < num_into_traps(mixed) < len(mixed)
    assert num_into_traps(legal) > 0
    assert len(legal) < len(safe)
    assert legal == played()
    teacher = get_teacher("safe_greedy")
    for rows in (safe, mixed):
        assert moves_of(rows) == [teacher(board) for board in boards_of(rows)]
        assert any(
            after.head != board.target(teacher(board))
            for board, after in pairwise(boards_of(rows))
            if after.length >= board.length
        )


def test_noise_among_legal_moves_writes_the_bytes_of_version_0_1(tmp_path):
    write_dataset(tmp_path / "rows.jsonl", 3, 6, "safe_greedy", "compact", 5, noise=0.2)
    digest = hashlib.sha256((tmp_path / "rows.jsonl").read_bytes()).hexdigest()
    assert digest == "d185ca0647013006980901bc2b8232ff848b95e637dac36645cc9b886e295ba8"


def test_noise_of_0_is_the_default_and_noise_of_1_is_random_play():
    assert list(generate_rows(num_games=2, noise=0.0)) == list(generate_rows(num_games=2))
    rows = list(generate_rows(num_games=10, noise=1.0))
    assert max(board.length for board in boards_of(rows)) < 20


def test_augmentation_writes_each_game_in_all_symmetries():
    plain = list(generate_rows(num_games=2, grid_size=5, seed=1))
    rows = list(generate_rows(num_games=2, grid_size=5, seed=1, augment="all"))
    assert len(rows) == 8 * len(plain)
    assert [{key: row[key] for key in plain[0]} for row in rows if row["symmetry"] == 0] == plain
    bfs = get_teacher("bfs")
    for number, symmetry in enumerate(SYMMETRIES):
        transformed = [row for row in rows if row["symmetry"] == number]
        assert [(row["game"], row["step"], row["seed"]) for row in transformed] == [
            (row["game"], row["step"], row["seed"]) for row in plain
        ]
        assert boards_of(transformed) == [symmetry.board(board) for board in boards_of(plain)]
        assert moves_of(transformed) == [bfs(board) for board in boards_of(transformed)]


def test_random_augmentation_writes_each_position_in_one_symmetry():
    everything = {
        (row["game"], row["step"], row["symmetry"]): row
        for row in generate_rows(num_games=2, grid_size=5, style="compact", augment="all")
    }
    rows = list(generate_rows(num_games=2, grid_size=5, style="compact", augment="random"))
    assert 8 * len(rows) == len(everything)
    assert rows == [everything[row["game"], row["step"], row["symmetry"]] for row in rows]
    assert {row["symmetry"] for row in rows} == set(range(8))


def test_style_of_a_fixed_cycle_is_transformed_with_its_cycle():
    settings = {"num_games": 1, "grid_size": 6, "teacher": "hamiltonian_shortcuts", "style": "cycle"}
    plain = list(generate_rows(**settings))
    transformed = list(generate_rows(**settings, augment="random"))
    for before, after in zip(plain, transformed, strict=True):
        symmetry = SYMMETRIES[after["symmetry"]]
        first, *lines = before["prompt"].splitlines()
        descriptions = {symmetry.move(Move[name]): text for name, text in (line.split(" ", 1) for line in lines)}
        assert after["prompt"].splitlines() == [first, *(f"{move.name} {descriptions[move]}" for move in Move)]
        assert after["completion"] == symmetry.move(Move[before["completion"]]).name


def test_teacher_chooses_again_in_each_symmetry():
    rows = list(generate_rows(num_games=3, augment="all"))
    by_position = {}
    for row in rows:
        by_position.setdefault((row["game"], row["step"]), []).append(row)
    num_transformed = num_equal = 0
    for group in by_position.values():
        first = moves_of(group[:1])[0]
        for row in group[1:]:
            num_transformed += 1
            num_equal += SYMMETRIES[row["symmetry"]].move(first) is moves_of([row])[0]
    # The choice between equally good moves is not symmetric.
    assert 0.05 < 1 - num_equal / num_transformed < 0.4


def test_game_counter_counts_all_symmetries_as_one_game():
    counter = GameCounter()
    games = {}
    for row in generate_rows(num_games=3, grid_size=4, augment="all"):
        named = Row(row["prompt"], row["completion"], f"{row['seed']}/{row['game']}", "a.jsonl", 1)
        games.setdefault(row["game"], set()).add(counter.game_of(named))
    assert [len(found) for found in games.values()] == [1, 1, 1]
    assert counter.num_games == 3


def test_upstream_rules_drop_the_last_move_of_each_game():
    num_apples_under_head = 0
    for number in range(30):
        game = Game(10, data_seed(0, number), upstream_rules=True)
        bfs = get_teacher("bfs")
        boards = []
        while game.end is None:
            boards.append(game.board)
            game.play(bfs(game.board))
        rows = [row for row in upstream_rows() if row["game"] == number]
        # The last move is kept only if the next apple was placed under the head.
        under_head = game.board.apple is None
        assert boards_of(rows) == (boards if under_head else boards[:-1])
        num_apples_under_head += under_head
    assert 0 < num_apples_under_head < 30


@functools.cache
def upstream_rows() -> list[GeneratedRow]:
    return list(generate_rows(num_games=30, upstream_rules=True))


def test_every_position_under_upstream_rules_has_a_path_to_the_apple():
    assert all(apple_distance(board) is not None for board in boards_of(upstream_rows()))


@pytest.mark.parametrize("options", [{"teacher": "random_legal"}, {"noise": 0.2, "augment": "all", "style": "compact"}])
@pytest.mark.e2e
def test_any_number_of_workers_writes_the_same_bytes(tmp_path, options):
    paths = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    calls = []
    for num_workers, path in enumerate(paths, start=1):
        write_dataset(path, 20, 4, **options, num_workers=num_workers, progress=lambda *call: calls.append(call))
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert calls == [(number, 20) for number in range(1, 21)] * 2


def test_teacher_that_cannot_be_pickled_is_an_error_with_workers(tmp_path, monkeypatch):
    monkeypatch.setitem(TEACHERS, "here", lambda seed: lambda board: Move.UP)
    with pytest.raises(UserError, match="num_workers=2"):
        write_dataset(tmp_path / "a.jsonl", 2, teacher="here", num_workers=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_games": 0}, r"num_games .*1,000,000.*found: 0"),
        ({"num_games": GAMES_PER_SEED + 1}, r"num_games .*1,000,000.*found: 1000001"),
        ({"num_games": 1, "seed": -1}, r"seed .*999,999,999.*found: -1"),
        ({"num_games": 1, "seed": NUM_DATA_SEEDS}, r"seed .*999,999,999.*found: 1000000000"),
        ({"num_games": 1, "grid_size": 1}, r"grid.*2.*1"),
        ({"num_games": 1, "teacher": "dfs"}, "teacher 'dfs'.*bfs"),
        ({"num_games": 1, "style": "bfs"}, "style 'bfs'.*bfs-512"),
        ({"num_games": 1, "noise": 1.5}, r"noise .*1\.5"),
        ({"num_games": 1, "noise": float("nan")}, "noise .*nan"),
    ],
)
def test_invalid_argument_is_an_error_before_a_file_is_written(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        generate_rows(**arguments)
    with pytest.raises(UserError, match=message):
        write_dataset(tmp_path / "new" / "a.jsonl", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_directory_as_output_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        write_dataset(tmp_path, num_games=1)


def test_no_workers_are_an_error(tmp_path):
    with pytest.raises(UserError, match="num_workers .*0"):
        write_dataset(tmp_path / "a.jsonl", num_games=1, num_workers=0)
