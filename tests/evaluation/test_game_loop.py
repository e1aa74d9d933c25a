from __future__ import annotations

import pickle

import pytest

from snake_lora_pl.evaluation.game_loop import play_games
from snake_lora_pl.evaluation.policy import Answer, TeacherPolicy
from snake_lora_pl.game import TEACHERS, Board, End, Game, Move, get_style, get_teacher
from snake_lora_pl.game.game import starvation_cap
from snake_lora_pl.game.seeds import play_seeds
from tests.evaluation.scripted import ScriptedPolicy, like_bfs, nonsense

SEEDS = play_seeds(12)


def plain_game(teacher_name: str, seed: int, size: int) -> Game:
    """Play one game in a plain loop."""
    game = Game(size, seed, max_steps_without_apple=starvation_cap(size))
    teacher = get_teacher(teacher_name, seed)
    while game.end is None:
        game.play(teacher(game.board) or game.board.fallback_move())
    return game


@pytest.mark.parametrize("name", sorted(TEACHERS))
def test_teacher_policy_plays_like_a_plain_loop(name: str) -> None:
    played = play_games(TeacherPolicy(name), SEEDS[:4], grid_size=6, teacher=name)
    for game, seed in zip(played, SEEDS, strict=False):
        plain = plain_game(name, seed, 6)
        assert (game.seed, game.end, game.num_apples) == (seed, plain.end, plain.num_apples)
        assert game.num_steps == plain.num_steps
        assert game.recording.frames[-1].board == plain.board
        assert all(move is judgment.teacher_move for move, judgment in zip(game.moves, game.judgments, strict=True))


def test_nonsense_ends_every_game_at_once() -> None:
    for game in play_games(ScriptedPolicy(nonsense), SEEDS):
        assert (game.end, game.num_steps, game.moves) == (End.NO_VALID_ANSWER, 0, [None])
        assert game.judgments[0].is_unparseable
        assert game.judgments[0].is_fatal
        assert game.recording.frames[0].completion == "42"


def test_each_round_asks_once_for_all_running_games() -> None:
    policy = ScriptedPolicy(like_bfs)
    games = play_games(policy, SEEDS, grid_size=6)
    assert policy.batch_sizes[0] == len(SEEDS)
    assert len(policy.batch_sizes) == max(len(game.moves) for game in games)
    for step, size in enumerate(policy.batch_sizes):
        assert size == sum(len(game.moves) > step for game in games)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_batch_size_does_not_change_games(batch_size: int) -> None:
    policy = ScriptedPolicy(like_bfs)
    few = play_games(policy, SEEDS, grid_size=6, batch_size=batch_size)
    many = play_games(ScriptedPolicy(like_bfs), SEEDS, grid_size=6)
    assert max(policy.batch_sizes) == batch_size
    assert [game.recording for game in few] == [game.recording for game in many]
    assert [game.judgments for game in few] == [game.judgments for game in many]


def test_replaying_the_moves_reproduces_the_recording() -> None:
    for game in play_games(TeacherPolicy("random_legal"), SEEDS, grid_size=5):
        again = Game(5, game.seed, max_steps_without_apple=starvation_cap(5))
        boards = [again.board]
        for move in game.moves:
            again.play(move)
            boards.append(again.board)
        assert again.end is game.end
        assert [frame.board for frame in game.recording.frames] == boards[: len(game.recording.frames)]


def test_last_move_is_fatal_only_if_there_was_a_legal_move() -> None:
    def up(board: Board) -> str:
        return "UP"

    for game in play_games(ScriptedPolicy(up), SEEDS):
        assert game.end is End.WALL
        assert [judgment.is_fatal for judgment in game.judgments] == [False] * game.num_steps + [True]
    trapped = [game for game in play_games(TeacherPolicy("bfs"), SEEDS) if game.end in (End.WALL, End.SELF)]
    assert trapped
    assert not any(judgment.is_fatal for game in trapped for judgment in game.judgments)


def test_reversal_is_readable_and_fatal() -> None:
    def back(board: Board) -> str:
        x, y = board.head
        if board.length == 1:
            return like_bfs(board)
        neck_x, neck_y = board.body[1]
        return Move((neck_x - x, neck_y - y)).name

    for game in play_games(ScriptedPolicy(back), SEEDS):
        assert (game.end, game.num_apples) == (End.NO_VALID_ANSWER, 1)
        assert game.judgments[-1].is_fatal
        assert not game.judgments[-1].is_unparseable


def test_circling_player_starves_at_the_cap_or_ends_at_max_steps() -> None:
    def circle(board: Board) -> str:
        x, y = board.head
        corner = (x % 2, y % 2)
        return {(0, 0): "UP", (0, 1): "RIGHT", (1, 1): "DOWN", (1, 0): "LEFT"}[corner]

    seeds = [seed for seed in SEEDS if Game(10, seed).board.apple not in [(4, 4), (4, 5), (5, 4)]]
    (starved,) = play_games(ScriptedPolicy(circle), seeds[:1])
    assert (starved.end, starved.num_steps) == (End.STARVED, starvation_cap(10))
    (starved,) = play_games(ScriptedPolicy(circle), seeds[:1], max_steps_without_apple=9)
    assert (starved.end, starved.num_steps) == (End.STARVED, 9)
    (cut,) = play_games(ScriptedPolicy(circle), seeds[:1], max_steps=7)
    assert (cut.end, cut.num_steps, len(cut.judgments)) == (End.MAX_STEPS, 7, 7)


def test_claims_of_completions_are_checked() -> None:
    style = get_style("bfs-512")

    def off_by_one(board: Board) -> str:
        completion = style.write_completion(board, bfs_move(board))
        return completion.replace(f"from [{board.head[0]},", f"from [{board.head[0] + 1},")

    def bfs_move(board: Board) -> Move:
        return Move[like_bfs(board)]

    (game,) = play_games(ScriptedPolicy(off_by_one), SEEDS[:1], max_steps=3)
    for judgment in game.judgments:
        assert judgment.claims["manhattan_distance"]
        assert not judgment.claims["head"]


def test_progress_counts_finished_games() -> None:
    calls: list[tuple[int, int]] = []
    play_games(ScriptedPolicy(like_bfs), SEEDS, grid_size=5, progress=lambda *call: calls.append(call))
    assert calls[-1] == (len(SEEDS), len(SEEDS))
    assert calls == sorted(calls)


def test_games_can_be_pickled() -> None:
    games = play_games(ScriptedPolicy(like_bfs), SEEDS[:2], grid_size=5)
    assert pickle.loads(pickle.dumps(games)) == games


@pytest.mark.parametrize("name", ["max_steps", "max_steps_without_apple", "batch_size"])
def test_limits_below_one_are_rejected(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*0"):
        play_games(ScriptedPolicy(nonsense), SEEDS, **{name: 0})


def test_unknown_teacher_is_rejected_before_the_first_game() -> None:
    policy = ScriptedPolicy(nonsense)
    with pytest.raises(ValueError, match="'bsf'.*'bfs'"):
        play_games(policy, SEEDS, teacher="bsf")
    assert not policy.batch_sizes


def test_policy_that_skips_boards_is_rejected() -> None:
    class SkipsFirstBoard(ScriptedPolicy):
        def answer(self, boards, seeds) -> list[Answer]:
            return super().answer(boards, seeds)[1:]

    with pytest.raises(ValueError, match="'scripted'.*11.*12"):
        play_games(SkipsFirstBoard(like_bfs), SEEDS)
