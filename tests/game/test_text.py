import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snake_lora_pl.game import (
    STYLES,
    Board,
    BoardReader,
    Move,
    PromptState,
    get_style,
    get_teacher,
    read_announced_move,
    read_board,
    read_grid_size,
    read_move,
    read_state,
    register_style,
    starts_new_game,
)
from snake_lora_pl.game.text.ascii_board import read_ascii_board
from tests.game.board_strategies import boards

REPOSITORY_DIR = Path(__file__).parents[2]
SAMPLE_DIR = REPOSITORY_DIR / "tests" / "data" / "heuristics_v0.04"
SHARED_DIR = REPOSITORY_DIR.parent / "shared" / "data" / "heuristics_v0.04"
BFS_512 = get_style("bfs-512")
COMPACT = get_style("compact")
BARE_STYLES = ["compact", "features", "cycle"]
ASCII_STYLES = ["bfs-1024", "bfs-2048", "bfs-4096", "bfs-safe-greedy-4096"]

upstream_files = pytest.mark.parametrize("root", [SAMPLE_DIR, SHARED_DIR], ids=["sample", "shared"])


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


@upstream_files
def test_every_upstream_bfs_512_row_is_reproduced_byte_for_byte(root):
    teacher = get_teacher("bfs")
    for path in paths_under(root, "*/bfs-512/*.jsonl"):
        lines = path.read_bytes().split(b"\n")
        assert lines.pop() == b""
        for number, line in enumerate(lines, start=1):
            board = BFS_512.read_prompt(json.loads(line)["prompt"])
            move = teacher(board)
            row = {"prompt": BFS_512.write_prompt(board), "completion": BFS_512.write_completion(board, move)}
            assert json.dumps(row).encode() == line, f"{path}:{number}"


@upstream_files
@pytest.mark.parametrize("name", ASCII_STYLES)
def test_every_upstream_row_with_an_ascii_board_is_reproduced_byte_for_byte(root, name):
    # The order of the body, which ASCII boards lack, follows from the preceding rows.
    teacher, style = get_teacher("bfs"), get_style(name)
    for path in paths_under(root, f"*/{name}/*.jsonl"):
        lines = path.read_bytes().split(b"\n")
        assert lines.pop() == b""
        reader = BoardReader()
        for number, line in enumerate(lines, start=1):
            board = reader.read(json.loads(line)["prompt"])
            row = {
                "prompt": style.write_prompt(board),
                "completion": style.write_completion(board, teacher(board)),
            }
            assert json.dumps(row).encode() == line, f"{path}:{number}"


@upstream_files
def test_the_upstream_files_cover_every_style(root):
    names = {path.parent.name for path in paths_under(root, "*/*/*.jsonl")}
    assert names == {"bfs-512", *ASCII_STYLES}


@upstream_files
def test_most_ascii_boards_are_unambiguous_without_the_preceding_row(root):
    num_parsed, num_rows = 0, 0
    for path in (path for path in paths_under(root, "*/*/*.jsonl") if path.parent.name in ASCII_STYLES):
        reader = BoardReader()
        for line in path.read_text(encoding="utf-8").splitlines():
            prompt = json.loads(line)["prompt"]
            board, parsed = reader.read(prompt), read_board(prompt)
            num_rows += 1
            num_parsed += parsed is not None
            assert parsed in (board, None)
    assert num_parsed > 0.8 * num_rows


@given(boards(max_size=6))
def test_an_ascii_board_is_never_parsed_as_another_board(board):
    prompt = get_style("bfs-1024").write_prompt(board)
    ascii_board = read_ascii_board(prompt)
    assert (ascii_board.size, ascii_board.head, ascii_board.apple) == (board.size, board.head, board.apple)
    assert ascii_board.body == set(board.body)
    assert read_board(prompt) in (board, None)
    assert read_state(prompt) == PromptState(board.size, board.head, board.length)


def test_the_preceding_row_resolves_an_ambiguous_body():
    square = Board(3, ((0, 0), (1, 0), (1, 1), (0, 1)), (2, 2))
    prompt = get_style("bfs-4096").write_prompt(square)
    with pytest.raises(ValueError, match="several"):
        get_style("bfs-4096").read_prompt(prompt)
    assert read_board(prompt) is None
    before = Board(3, ((1, 0), (1, 1), (0, 1), (0, 2)), (2, 2))
    reader = BoardReader()
    assert reader.read(get_style("bfs-512").write_prompt(before)) == before
    assert reader.read(prompt) == square
    # A row without a board resets the reader.
    assert reader.read("Hello") is None
    assert reader.read(prompt) is None


def test_the_search_for_the_order_of_a_dense_body_is_bounded():
    rows = [(x, y) for y in range(13) for x in (range(13) if y % 2 == 0 else range(12, -1, -1))]
    prompt = get_style("bfs-1024").write_prompt(Board(14, tuple(rows[84:]), (13, 13)))
    with pytest.raises(ValueError, match="85 cells"):
        read_ascii_board(prompt).board()
    assert read_board(prompt) is None


@pytest.mark.parametrize("name", ASCII_STYLES)
def test_the_rationale_depends_on_whether_the_move_is_on_a_shortest_path(name):
    style = get_style(name)
    straight = Board(5, ((2, 2),), (2, 4))
    assert "hortest path to apple\n" in style.write_completion(straight, Move.UP)
    assert "Rationale: No step of a shortest path\n" in style.write_completion(straight, Move.LEFT)
    adjacent = Board(3, ((0, 1), (1, 1), (1, 0)), (0, 0))
    assert "(1 steps)" in style.write_completion(adjacent, Move.DOWN)
    blocked = Board(3, ((1, 2), (0, 2), (0, 1), (1, 1), (1, 0)), (0, 0))
    assert ": Found no path to apple\n" in style.write_completion(blocked, Move.RIGHT)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("S H .", "S H S", "contradicts"),
        ("Head: [1, 1]", "Head: [1, 2]", "contradicts"),
        ("Length: 3", "Length: 4", "contradicts"),
        ("S H .\n", "S H\n", "3x3"),
        ("Choose", ". . .\nChoose", "3x3"),
        ("Board", "Bored", "Snake on 3x3"),
        ("S H .\nS . .", "S H .\n. S .", "no order"),
    ],
)
def test_an_inconsistent_ascii_board_is_rejected(old, new, message):
    prompt = get_style("bfs-1024").write_prompt(Board(3, ((1, 1), (0, 1), (0, 0)), (2, 2)))
    assert old in prompt
    broken = prompt.replace(old, new)
    with pytest.raises(ValueError, match=message):
        get_style("bfs-1024").read_prompt(broken)
    assert read_board(broken) is None


def test_compact_describes_each_move():
    board = Board(4, ((1, 0), (1, 1), (0, 1), (0, 2), (1, 2), (2, 2), (3, 2)), (0, 0))
    assert COMPACT.write_prompt(board) == (
        "Snake4;1,0;0,0;ULURRR\nUP body\nRIGHT tail 2\nDOWN wall\nLEFT trap 0\napple LEFT 1"
    )
    assert COMPACT.write_completion(board, Move.RIGHT) == "RIGHT"


@upstream_files
def test_state_and_move_are_parsed_from_every_upstream_row(root):
    for path in paths_under(root, "*/*/*.jsonl"):
        size = int(path.parent.parent.name.removeprefix("grid-size-"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            row = json.loads(line)
            where = f"{path}:{number}"
            state = read_state(row["prompt"])
            assert state.grid_size == read_grid_size(row["prompt"]) == size, where
            assert read_move(row["completion"]).name == row["completion"].split()[-1], where
            # Every completion repeats the head, and ASCII boards show it.
            assert f" from [{state.head[0]}, {state.head[1]}]\n" in row["completion"], where
            if "Board:\n" in row["prompt"]:
                cells = row["prompt"].split("Board:\n")[1].splitlines()[:size][::-1]
                assert cells[state.head[1]].split()[state.head[0]] == "H", where
                assert " ".join(cells).count("S") + 1 == state.length, where


@upstream_files
def test_game_boundaries_are_found(root):
    (path,) = paths_under(root, "grid-size-10/bfs-512/*.jsonl")
    starts = find_game_starts(path)
    if root == SAMPLE_DIR:
        assert starts == [0, 37, 77, 246]
    else:
        assert len(starts) == 40
        assert starts[:10] == [0, 231, 415, 670, 707, 747, 916, 1024, 1248, 1419]


@given(boards(max_size=12), st.sampled_from(["bfs-512", "compact"]))
def test_a_written_board_is_parsed_from_any_surrounding_text(board, name):
    prompt = get_style(name).write_prompt(board)
    assert get_style(name).read_prompt(prompt) == board
    for text in (prompt, f"### Instruction:\n{prompt}\n\n### Response:\n", f"<|im_start|>user\n{prompt}<|im_end|>\n"):
        assert read_board(text) == board
        assert read_state(text) == PromptState(board.size, board.head, board.length)


@given(boards(), st.sampled_from(list(Move)))
def test_a_written_move_is_parsed(board, move):
    for style in STYLES.values():
        assert read_move(style.write_completion(board, move)) is move


def test_metrics_treat_the_tail_as_body():
    # The move is legal, but bfs-512 counts the tail as body, so the completion contradicts the move.
    board = Board(3, ((0, 0), (1, 0), (1, 1), (0, 1)), (2, 2))
    completion = BFS_512.write_completion(board, Move.UP)
    assert "- Valid moves: []\n" in completion
    assert "- Danger assessment: {'straight': 1, 'left': 1, 'right': 0}\n" in completion


def test_danger_to_the_sides_considers_walls_only():
    # The snake moves UP along the left wall, with its body on the right.
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
        ("UP", Move.UP),
        ("\nLEFT \n", Move.LEFT),
        ("UP DOWN", None),
        ("Up", None),
        ("", None),
        ("Conclusion: ", None),
        ("Conclusion: up", None),
        ("Conclusion: UPWARDS", None),
        ("Conclusion: UP or DOWN", None),
        ("In Conclusion: UP", None),
        ("Moving UP from [5, 5]\n\nMetrics:\n- Valid moves: ['UP']", None),
    ],
)
def test_a_move_is_parsed_from_the_last_conclusion_only(completion, move):
    assert read_move(completion) is move


@given(st.text())
def test_arbitrary_text_is_parsed_as_none(text):
    assert read_move(text) is None
    assert read_board(text) is None
    assert read_state(text) is None
    assert read_grid_size(text) is None


@pytest.mark.parametrize("name", sorted(STYLES))
def test_the_announced_move_is_the_concluded_move(name: str) -> None:
    board = Board(5, ((2, 0), (1, 0)), (2, 3))
    for move in (Move.UP, Move.RIGHT):
        completion = get_style(name).write_completion(board, move)
        assert read_announced_move(completion) is (None if name in BARE_STYLES else move)
        assert read_move(completion) is move


@pytest.mark.parametrize("text", ["", "UP", "Conclusion: UP", "I am Moving UP", "Moving UPWARDS", "moving UP"])
def test_other_text_is_not_an_announcement(text: str) -> None:
    assert read_announced_move(text) is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("length: 3", "length: 4", "4.*2"),
        ("[[1, 0], [0, 0]]", "[[1, 0], [0, 1]]", r"\(1, 0\) and \(0, 1\)"),
        ("Apple position: (2, 2)", "Apple position: (0, 0)", r"apple \(0, 0\)"),
        ("You are playing", "We are playing", "bfs-512.*'We are playing Snake"),
        ("(1, 1)", f"({'1' * 5000}, 1)", "bfs-512"),
    ],
)
def test_an_invalid_prompt_is_rejected_by_its_style_and_parsed_as_no_board(old, new, message):
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
def test_a_game_continues_at_the_target_of_the_last_move(move, state, expected):
    assert starts_new_game(PromptState(10, (5, 5), 3), move, state) is expected


@pytest.mark.parametrize(("length", "expected"), [(3, False), (4, False), (2, True), (5, True)])
def test_without_the_head_a_game_continues_while_the_length_stays_or_grows_by_one(length, expected):
    assert starts_new_game(PromptState(10, None, 3), Move.UP, PromptState(10, None, length)) is expected
    assert starts_new_game(PromptState(10, None, length), Move.UP, PromptState(12, None, length))


def test_the_first_row_starts_a_game():
    assert starts_new_game(None, None, PromptState(10, (5, 5), 1))


def test_a_board_without_an_apple_cannot_be_written():
    board = Board(2, ((0, 0), (0, 1), (1, 1), (1, 0)), None)
    for style in STYLES.values():
        with pytest.raises(ValueError, match="apple"):
            style.write_prompt(board)
    for name in ("bfs-512", *ASCII_STYLES):
        with pytest.raises(ValueError, match="apple"):
            get_style(name).write_completion(board, Move.RIGHT)


def test_an_unknown_style_is_rejected_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"'bfs512'.*compact.*'bfs-512'"):
        get_style("bfs512")


def test_a_style_name_can_be_registered_only_once():
    with pytest.raises(ValueError, match="'bfs-512'"):
        register_style(BFS_512)
