import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snake_lora_pl.game import (
    STYLES,
    Board,
    Move,
    PromptState,
    get_style,
    get_teacher,
    read_board,
    read_grid_size,
    read_move,
    read_state,
    register_style,
    starts_new_game,
)
from tests.game.board_strategies import boards

REPOSITORY_DIR = Path(__file__).parents[2]
SAMPLE_DIR = REPOSITORY_DIR / "tests" / "data" / "heuristics_v0.04"
SHARED_DIR = REPOSITORY_DIR.parent / "shared" / "data" / "heuristics_v0.04"
BFS_512 = get_style("bfs-512")

real_files = pytest.mark.parametrize("root", [SAMPLE_DIR, SHARED_DIR], ids=["sample", "shared"])


def paths_under(root: Path, pattern: str) -> list[Path]:
    paths = sorted(root.glob(pattern))
    if not paths:
        pytest.skip(f"the upstream files are not at {root}")
    return paths


def find_game_starts(path: Path) -> list[int]:
    starts, previous, move = [], None, None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        state = read_state(row["prompt"])
        if starts_new_game(previous, move, state):
            starts.append(number)
        previous, move = state, read_move(row["completion"])
    return starts


@real_files
def test_every_real_bfs_512_row_is_written_again_byte_for_byte(root):
    teacher = get_teacher("bfs")
    for path in paths_under(root, "*/bfs-512/*.jsonl"):
        lines = path.read_bytes().split(b"\n")
        assert lines.pop() == b""
        for number, line in enumerate(lines, start=1):
            board = BFS_512.read_prompt(json.loads(line)["prompt"])
            move = teacher(board)
            row = {"prompt": BFS_512.write_prompt(board), "completion": BFS_512.write_completion(board, move)}
            assert json.dumps(row).encode() == line, f"{path}:{number}"


@real_files
def test_state_and_move_are_read_from_every_row_of_every_real_style(root):
    for path in paths_under(root, "*/*/*.jsonl"):
        size = int(path.parent.parent.name.removeprefix("grid-size-"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            row = json.loads(line)
            where = f"{path}:{number}"
            state = read_state(row["prompt"])
            assert state.grid_size == read_grid_size(row["prompt"]) == size, where
            assert read_move(row["completion"]).name == row["completion"].split()[-1], where
            # The words of every style name the head again, and the drawn boards show it.
            assert f" from [{state.head[0]}, {state.head[1]}]\n" in row["completion"], where
            if "Board:\n" in row["prompt"]:
                drawn = row["prompt"].split("Board:\n")[1].splitlines()[:size][::-1]
                assert drawn[state.head[1]].split()[state.head[0]] == "H", where
                assert " ".join(drawn).count("S") + 1 == state.length, where


@real_files
def test_games_are_found_where_they_begin(root):
    (path,) = paths_under(root, "grid-size-10/bfs-512/*.jsonl")
    starts = find_game_starts(path)
    if root == SAMPLE_DIR:
        assert starts == [0, 37, 77, 246]
    else:
        assert len(starts) == 40
        assert starts[:10] == [0, 231, 415, 670, 707, 747, 916, 1024, 1248, 1419]


@given(boards(max_size=12))
def test_a_written_board_is_read_back_wherever_it_stands(board):
    prompt = BFS_512.write_prompt(board)
    assert BFS_512.read_prompt(prompt) == board
    for text in (prompt, f"### Instruction:\n{prompt}\n\n### Response:\n", f"<|im_start|>user\n{prompt}<|im_end|>\n"):
        assert read_board(text) == board
        assert read_state(text) == PromptState(board.size, board.head, board.length)


@given(boards(), st.sampled_from(list(Move)))
def test_a_written_move_is_read_back_whatever_it_is(board, move):
    for style in STYLES.values():
        assert read_move(style.write_completion(board, move)) is move


def test_a_move_onto_the_tail_is_told_as_the_format_sees_it():
    # Legal, though bfs-512 takes the tail for a wall: the words then contradict the move.
    board = Board(3, ((0, 0), (1, 0), (1, 1), (0, 1)), (2, 2))
    completion = BFS_512.write_completion(board, Move.UP)
    assert "- Valid moves: []\n" in completion
    assert "- Danger assessment: {'straight': 1, 'left': 1, 'right': 0}\n" in completion


def test_danger_on_either_side_means_walls_and_not_the_body():
    # Going UP along the left wall, with its own body on the right.
    board = Board(4, ((0, 1), (0, 0), (1, 0), (1, 1), (1, 2)), (3, 3))
    completion = BFS_512.write_completion(board, Move.UP)
    assert "- Danger assessment: {'straight': 0, 'left': 1, 'right': 0}\n" in completion


@pytest.mark.parametrize(
    ("completion", "move"),
    [
        ("Conclusion: UP", Move.UP),
        ("Moving\n\nConclusion: The move is: LEFT", Move.LEFT),
        ("Conclusion: RIGHT\n", Move.RIGHT),
        ("Conclusion: RIGHT \r\nand more words", Move.RIGHT),
        ("Conclusion: UP\nConclusion: DOWN", Move.DOWN),
        ("Conclusion: UP\nConclusion: The move is: NORTH", Move.UP),
        ("", None),
        ("Conclusion: ", None),
        ("Conclusion: up", None),
        ("Conclusion: UPWARDS", None),
        ("Conclusion: UP or DOWN", None),
        ("In Conclusion: UP", None),
        ("Moving UP from [5, 5]\n\nMetrics:\n- Valid moves: ['UP']", None),
    ],
)
def test_a_move_is_read_from_the_last_conclusion_alone(completion, move):
    assert read_move(completion) is move


@given(st.text())
def test_garbage_is_read_as_nothing(text):
    assert read_move(text) is None
    assert read_board(text) is None
    assert read_state(text) is None
    assert read_grid_size(text) is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("length: 3", "length: 4", "says length 4 but lists 2 cells"),
        ("[[1, 0], [0, 0]]", "[[1, 0], [0, 1]]", "is torn between"),
        ("Apple position: (2, 2)", "Apple position: (0, 0)", "lies under the snake"),
        ("You are playing", "We are playing", "no bfs-512 prompt in the text: 'We are playing Snake"),
        ("(1, 1)", f"({'1' * 5000}, 1)", "no bfs-512 prompt"),
    ],
)
def test_a_prompt_that_describes_no_position_is_refused_by_its_style_and_read_as_no_board(old, new, message):
    prompt = BFS_512.write_prompt(Board(3, ((1, 1), (1, 0), (0, 0)), (2, 2)))
    assert old in prompt
    broken = prompt.replace(old, new)
    with pytest.raises(ValueError, match=message):
        BFS_512.read_prompt(broken)
    assert read_board(broken) is None


@pytest.mark.parametrize(
    ("move", "state", "expected"),
    [
        (Move.UP, PromptState(10, (5, 6), 3), False),
        (Move.UP, PromptState(10, (5, 6), 4), False),
        (Move.DOWN, PromptState(10, (5, 6), 3), True),
        (Move.UP, PromptState(10, (5, 6), 2), True),
        (Move.UP, PromptState(12, (5, 6), 3), True),
        (None, PromptState(10, (5, 6), 3), False),
        (None, PromptState(10, (7, 6), 3), True),
    ],
)
def test_a_game_goes_on_where_the_last_move_led(move, state, expected):
    assert starts_new_game(PromptState(10, (5, 5), 3), move, state) is expected


def test_the_first_row_begins_a_game():
    assert starts_new_game(None, None, PromptState(10, (5, 5), 1))


def test_a_full_board_cannot_be_written():
    board = Board(2, ((0, 0), (0, 1), (1, 1), (1, 0)), None)
    with pytest.raises(ValueError, match="without an apple"):
        BFS_512.write_prompt(board)
    with pytest.raises(ValueError, match="without an apple"):
        BFS_512.write_completion(board, Move.RIGHT)


def test_an_unknown_style_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown style 'bfs512'; known styles: .*bfs-512"):
        get_style("bfs512")


def test_a_style_is_registered_under_its_name_once():
    with pytest.raises(ValueError, match="'bfs-512' is registered already"):
        register_style(BFS_512)
