import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snake_lora_pl.game import (
    STYLES,
    Board,
    Game,
    Move,
    PromptMoves,
    PromptState,
    find_style,
    get_style,
    get_teacher,
    read_board,
    read_moves,
    read_state,
)
from snake_lora_pl.game.features import move_features
from snake_lora_pl.game.search import tail_distances
from snake_lora_pl.game.teachers.hamiltonian import cycle_of
from tests.game.board_strategies import boards

NAMES = ["features", "cycle"]
# LEFT eats the apple in a dead end; the only safe move is RIGHT.
BOARD = Board(4, ((1, 0), (1, 1), (0, 1), (0, 2), (1, 2), (2, 2), (3, 2)), (0, 0))

names = st.sampled_from(NAMES)


def described(name: str, board: Board) -> dict[Move, str]:
    """Return the description of each move in a prompt."""
    lines = get_style(name).write_prompt(board).splitlines()[1:5]
    return {Move[word]: rest for word, _, rest in (line.partition(" ") for line in lines)}


def test_features_describe_each_move():
    assert get_style("features").write_prompt(BOARD) == (
        "Snake4 length 7\nUP body\nRIGHT tail 2\nDOWN wall\nLEFT trap 0\napple LEFT 1"
    )
    assert get_style("features").write_completion(BOARD, Move.RIGHT) == "RIGHT"


def test_bait_is_an_apple_that_shuts_the_snake_in():
    # Before eating, the tail can still be reached: it leaves its cell.
    board = next(board for board in played_boards() if "bait" in get_style("features").write_prompt(board))
    text = next(text for text in described("features", board).values() if text.startswith("bait"))
    _, to_apple, _, to_tail = text.split()
    assert int(to_apple) > 0
    assert int(to_tail) > 0


def played_boards():
    """Yield the boards of games of a teacher that does not look beyond the apple."""
    for seed in range(20):
        game = Game(6, seed, max_steps_without_apple=200)
        while game.end is None:
            yield game.board
            game.play(get_teacher("bfs")(game.board) or game.board.fallback_move())


@given(boards())
def test_features_state_the_distances_after_each_move(board):
    for move, text in described("features", board).items():
        feature = move_features(board)[move]
        if feature.obstacle is not None:
            expected = feature.obstacle
        elif len(board.body) + 1 == board.size**2 and feature.apple_distance == 0:
            expected = "apple 0 tail 0"
        elif feature.tail_distance is None:
            expected = f"trap {feature.num_reachable}"
        else:
            apple = "bait" if feature.is_bait else "apple"
            to_apple = "" if feature.apple_distance is None else f"{apple} {feature.apple_distance} "
            expected = f"{to_apple}tail {feature.tail_distance}"
        assert text == expected


def test_cycle_describes_each_move():
    # The cycle goes down the column of the head and up the one on its left.
    assert get_style("cycle").write_prompt(Board(4, ((2, 2), (2, 3)), (1, 3))) == (
        "Snake4 length 2\nUP body\nRIGHT past\nDOWN next 3\nLEFT skip 1"
    )


def test_move_that_wins_is_not_a_trap():
    # The apple is on the last free cell, which is not next to the tail.
    board = Board(3, ((1, 0), (0, 0), (0, 1), (1, 1), (2, 1), (2, 2), (1, 2), (0, 2)), (2, 0))
    assert board.after(Move.RIGHT).length == 9
    assert Move.RIGHT not in tail_distances(board)
    assert described("features", board)[Move.RIGHT] == "apple 0 tail 0"
    assert described("cycle", board)[Move.RIGHT] == "next 0"
    assert PromptMoves.of(board) == PromptMoves(frozenset([Move.RIGHT]), frozenset())


def walk(board: Board, move: Move) -> list[tuple[int, int]]:
    """Return the cells of the cycle that a move advances over, its own cell last, on a grid of even size."""
    cells = {index: cell for cell, index in cycle_of(board.size).indices.items()}
    index, passed = cycle_of(board.size).indices[board.head], []
    while not passed or passed[-1] != board.target(move):
        index = (index + 1) % len(cells)
        passed.append(cells[index])
    return passed


@given(boards())
def test_moves_that_pass_the_apple_or_the_tail_are_marked(board):
    if board.size % 2:
        return  # two cells of an odd grid share an index
    for move, text in described("cycle", board).items():
        word, _, distance = text.partition(" ")
        if word in ("next", "skip"):
            passed = walk(board, move)
            assert (word == "next") == (len(passed) == 1)
            assert board.apple not in passed[:-1]
            assert move in tail_distances(board) or board.after(move).length == board.size**2
            assert int(distance) == (
                0 if passed[-1] == board.apple else cycle_of(board.size).steps_ahead(passed[-1], board.apple)
            )
            if word == "skip" and board.length > 1:
                assert board.body[-1] not in passed
        elif word == "trap":
            assert move in board.legal_moves()
            assert move not in tail_distances(board)


@pytest.mark.parametrize("size", [6, 7])
def test_teacher_with_shortcuts_takes_only_unmarked_moves(size):
    for seed in range(3):
        game = Game(size, seed)
        teacher = get_teacher("hamiltonian_shortcuts")
        while game.end is None:
            move = teacher(game.board)
            texts = described("cycle", game.board)
            assert texts[move].startswith(("next", "skip"))
            distances = {m: int(text.split()[1]) for m, text in texts.items() if " " in text}
            if 2 * game.board.length <= size**2 and size % 2 == 0:
                assert distances[move] == min(distances.values())
            game.play(move)
        assert game.num_apples == size**2 - 1


@pytest.mark.parametrize("size", [4, 6])
def test_any_player_that_takes_only_unmarked_moves_wins(size):
    for seed in range(8):
        game = Game(size, seed, max_steps_without_apple=size**2)
        while game.end is None:
            unmarked = [m for m, t in described("cycle", game.board).items() if t.startswith(("next", "skip"))]
            game.play(unmarked[int(game.rng.random() * len(unmarked))])
        assert game.num_apples == size**2 - 1


@given(boards(max_size=12), names)
def test_state_and_moves_are_read_from_any_surrounding_text(board, name):
    prompt = get_style(name).write_prompt(board)
    expected = PromptMoves.of(board)
    assert expected.legal == set(board.legal_moves())
    for text in (
        prompt,
        f"### Instruction:\n{prompt}\n\n### Response:\n",
        f"<|im_start|>user\n{prompt}<|im_end|>\n",
        f"user\n{prompt}\nassistant\n",
        f"user{prompt}assistant",
        f"[INST] {prompt} [/INST]",
    ):
        assert read_moves(text) == expected
        assert read_state(text) == PromptState(board.size, None, board.length)
        assert find_style(text) is get_style(name)
        assert read_board(text) is None


@given(boards(), names)
def test_number_of_lines_is_constant(board, name):
    prompt = get_style(name).write_prompt(board)
    assert len(prompt.splitlines()) == (6 if name == "features" else 5)


@given(boards(), st.sampled_from(sorted(set(STYLES) - set(NAMES))), names)
def test_moves_are_equal_whether_stated_or_computed_from_the_board(board, other, name):
    text = get_style(other).write_prompt(board)
    if read_board(text) is not None:
        assert read_moves(text) == read_moves(get_style(name).write_prompt(board))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("old", "new"), [("UP body", "UP bode"), ("DOWN wall\n", ""), ("RIGHT", "LEFT"), ("length 7", "")]
)
def test_incomplete_prompt_is_not_read(name, old, new):
    text = get_style(name).write_prompt(BOARD)
    assert old in text
    broken = text.replace(old, new, 1)
    assert (read_moves(broken), read_state(broken), find_style(broken)) == (None, None, None)


@pytest.mark.parametrize("name", NAMES)
def test_no_other_style_reads_the_prompt(name):
    shut_in = Board(3, ((0, 0), (0, 1), (1, 1), (1, 0)), (2, 2))
    for board in (BOARD, shut_in):
        text = get_style(name).write_prompt(board)
        assert [other for other in STYLES if STYLES[other].read_state(text) is not None] == [name]


@pytest.mark.parametrize("name", NAMES)
def test_style_is_sent_to_other_processes(name):
    assert pickle.loads(pickle.dumps(get_style(name))).write_prompt(BOARD) == get_style(name).write_prompt(BOARD)
