import random
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snake_lora_pl.game import Board, End, Game, Move, get_teacher
from snake_lora_pl.game.search import apple_distance
from tests.game.board_strategies import boards

# A cycle through the 2x2 grid from its start in the top-right corner.
CYCLE_2X2 = [Move.LEFT, Move.DOWN, Move.RIGHT, Move.UP]


def play_at_random(game: Game, rng: random.Random, num_moves: int) -> None:
    for _ in range(num_moves):
        moves = game.board.legal_moves()
        if game.end is not None or not moves:
            return
        game.play(rng.choice(moves))


@given(size=st.integers(2, 7), seed=st.integers(0, 2**40), num_moves=st.integers(0, 400))
def test_game_invariants_hold_after_every_move(size, seed, num_moves):
    game = Game(size, seed)
    num_apples = 0
    for _ in range(num_moves):
        moves = game.board.legal_moves()
        if not moves or game.end is not None:
            break
        move = game.rng.choice(moves)
        num_apples += game.board.target(move) == game.board.apple
        game.play(move)
        board = game.board
        assert board.length == 1 + num_apples == 1 + game.num_apples
        assert len(set(board.body)) == board.length
        assert board.apple not in board.body
        assert (board.apple is None) == (game.end is End.WIN)
        # The board also passes the validation of the constructor.
        assert Board(board.size, board.body, board.apple) == board


@given(boards())
def test_legal_moves_are_the_moves_that_do_not_end_the_game(board):
    expected = [m for m in (Move.UP, Move.RIGHT, Move.DOWN, Move.LEFT) if isinstance(board.after(m), Board)]
    assert board.legal_moves() == expected


@given(boards())
def test_every_move_follows_the_rules(board):
    for move in Move:
        target = (board.head[0] + move.dx, board.head[1] + move.dy)
        after = board.after(move)
        if board.length > 1 and target == board.body[1]:
            assert after is End.NO_VALID_ANSWER
        elif not all(0 <= coordinate < board.size for coordinate in target):
            assert after is End.WALL
        elif target in board.body and target != board.body[-1]:
            assert after is End.SELF
        else:
            eats = target == board.apple
            assert after.body == (target, *board.body)[: board.length + eats]
            assert after.apple == (None if eats else board.apple)


def test_x_grows_to_the_right_and_y_upward():
    assert [(m.name, m.dx, m.dy) for m in Move] == [("UP", 0, 1), ("RIGHT", 1, 0), ("DOWN", 0, -1), ("LEFT", -1, 0)]


def test_a_game_starts_in_the_middle_with_length_1_and_all_moves_legal():
    board = Game(10, seed=3).board
    assert board.body == ((5, 5),)
    assert board.legal_moves() == list(Move)


def test_the_tail_cell_is_free():
    square = Board(3, ((0, 0), (1, 0), (1, 1), (0, 1)), (2, 2))
    assert square.legal_moves() == [Move.UP]
    assert square.after(Move.UP).body == ((0, 1), (0, 0), (1, 0), (1, 1))


def test_a_snake_of_length_2_cannot_reverse():
    board = Board(3, ((1, 1), (1, 0)), (2, 2))
    assert board.legal_moves() == [Move.UP, Move.RIGHT, Move.LEFT]
    assert board.after(Move.DOWN) is End.NO_VALID_ANSWER


@given(size=st.integers(2, 8), seed=st.integers(0, 2**40))
def test_the_same_seed_and_moves_give_the_same_game(size, seed):
    games = [Game(size, seed), Game(size, seed)]
    for game in games:
        play_at_random(game, random.Random(seed), 200)
    assert games[0].board == games[1].board
    assert games[0].num_steps == games[1].num_steps


def test_different_seeds_give_different_games():
    assert len({Game(10, seed).board.apple for seed in range(40)}) > 20


def test_apples_of_a_seed_never_change():
    # Reported results refer to games by seed; a change here invalidates them.
    assert [Game(10, seed).board.apple for seed in range(5)] == [(4, 8), (3, 1), (5, 9), (3, 2), (3, 2)]


def test_apples_are_uniform_over_the_free_cells():
    num_games = 8_000
    counts = Counter(Game(3, seed).board.apple for seed in range(num_games))
    assert len(counts) == 8
    # Binomial with p = 1/8; the bound is five standard deviations.
    assert all(abs(count - num_games / 8) < 5 * (num_games * 7 / 64) ** 0.5 for count in counts.values())


@pytest.mark.parametrize("seed", range(5))
def test_filling_the_board_wins(seed):
    game = Game(2, seed)
    while game.end is None:
        game.play(CYCLE_2X2[game.num_steps % 4])
    assert game.end is End.WIN
    assert game.board.length == 4
    assert game.board.apple is None
    assert game.board.legal_moves() == [CYCLE_2X2[game.num_steps % 4]], "only the tail's cell is left"


def test_leaving_the_grid_ends_the_game_and_keeps_the_last_board():
    game = Game(2, seed=0)
    board = game.board
    assert game.play(Move.UP) is End.WALL
    assert game.board == board
    assert game.end is End.WALL


def test_colliding_with_the_body_ends_the_game():
    hook = Board(4, ((1, 1), (1, 2), (2, 2), (2, 1), (2, 0)), (0, 0))
    assert hook.after(Move.RIGHT) is End.SELF


def test_no_move_ends_the_game():
    assert Game(10).play(None) is End.NO_VALID_ANSWER


def test_limits_end_a_game_that_circles():
    game = Game(10, seed=0, max_steps_without_apple=6)
    circle = [Move.UP, Move.LEFT, Move.DOWN, Move.RIGHT]
    apples = {(5, 5), (5, 6), (4, 6), (4, 5)}
    assert game.board.apple not in apples
    while game.end is None:
        game.play(circle[game.num_steps % 4])
    assert (game.end, game.num_steps) == (End.STARVED, 6)

    game = Game(10, seed=0, max_steps=3)
    while game.end is None:
        game.play(circle[game.num_steps % 4])
    assert (game.end, game.num_steps) == (End.MAX_STEPS, 3)


def test_an_apple_resets_the_steps_without_an_apple():
    game = Game(2, seed=0, max_steps_without_apple=4)
    while game.end is None:
        before = game.num_apples
        game.play(CYCLE_2X2[game.num_steps % 4])
        assert (game.num_steps_without_apple == 0) == (game.num_apples > before)
    assert game.end is End.WIN


def test_upstream_rules_end_a_game_without_a_path_to_the_apple():
    reasons = Counter()
    for seed in range(80):
        game = Game(6, seed, upstream_rules=True)
        bfs = get_teacher("bfs")
        while game.end is None:
            assert apple_distance(game.board) is not None
            game.play(bfs(game.board))
        assert game.end in (End.NO_PATH, End.WIN)
        reasons["apple under the head" if game.board.apple is None else "no path"] += 1
    assert min(reasons["apple under the head"], reasons["no path"]) >= 10


def test_the_first_apple_does_not_depend_on_the_rules():
    assert [Game(10, seed).board for seed in range(20)] == [
        Game(10, seed, upstream_rules=True).board for seed in range(20)
    ]


@given(boards())
def test_the_fallback_move_never_reverses(board):
    if not board.legal_moves():
        assert board.after(board.fallback_move()) in (End.WALL, End.SELF)
    else:
        assert board.after(board.fallback_move()) is not End.NO_VALID_ANSWER


def test_a_game_that_has_ended_accepts_no_more_moves():
    game = Game(10)
    game.play(None)
    with pytest.raises(ValueError, match="NO_VALID_ANSWER"):
        game.play(Move.UP)


@pytest.mark.parametrize(
    ("size", "body", "apple", "message"),
    [
        (1, ((0, 0),), None, "2.*1"),
        (257, ((0, 0),), None, "256.*257"),
        (3, (), (0, 0), "empty"),
        (3, ((3, 0),), (0, 0), r"\(3, 0\).*3x3"),
        (3, ((0, 0),), (0, -1), r"\(0, -1\).*3x3"),
        (3, ((0, 0), (0, 1), (0, 0)), (2, 2), r"overlap.*\(0, 0\), \(0, 1\), \(0, 0\)"),
        (3, ((0, 0), (0, 1)), (0, 1), r"apple \(0, 1\)"),
        (3, ((0, 0), (1, 1)), (2, 2), r"\(0, 0\) and \(1, 1\)"),
    ],
)
def test_an_impossible_position_is_rejected(size, body, apple, message):
    with pytest.raises(ValueError, match=message):
        Board(size, body, apple)


def test_a_negative_seed_is_rejected():
    with pytest.raises(ValueError, match="-1"):
        Game(10, seed=-1)


def test_the_game_imports_only_the_standard_library():
    code = "import sys; before = set(sys.modules); import snake_lora_pl.game; print(*(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    packages = {name.partition(".")[0] for name in result.stdout.split()}
    assert packages - sys.stdlib_module_names == {"snake_lora_pl"}


@given(boards())
def test_head_and_trail_determine_the_body(board):
    assert len(board.trail) == board.length - 1
    assert Board.from_trail(board.size, board.head, board.trail, board.apple) == board


@pytest.mark.parametrize(
    ("trail", "message"),
    [("UX", "'X'"), ("UD", "overlap"), ("LLL", r"\(-1, 1\).*4x4"), ("U", r"apple \(1, 2\)")],
)
def test_an_invalid_trail_is_rejected(trail, message):
    with pytest.raises(ValueError, match=message):
        Board.from_trail(4, (1, 1), trail, (1, 2))
