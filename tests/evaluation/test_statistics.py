from __future__ import annotations

import statistics

import numpy as np
import pytest

from snake_lora_pl.evaluation.game_loop import decision_frames, play_games
from snake_lora_pl.evaluation.policy import Policy, TeacherPolicy
from snake_lora_pl.evaluation.statistics import (
    ROW_WIDTH,
    GameSummary,
    bootstrap_interval,
    compute_statistics,
    paired_difference,
    wilson_interval,
)
from snake_lora_pl.game import Board, Move, get_style
from snake_lora_pl.game.seeds import play_seeds
from tests.evaluation.scripted import ScriptedPolicy, like_bfs, nonsense

SEEDS = play_seeds(20)


def summaries(policy: Policy, **settings) -> list[GameSummary]:
    return [GameSummary.of(game) for game in play_games(policy, SEEDS, **{"grid_size": 6, **settings})]


def untimed(games: list[GameSummary]) -> dict[str, float]:
    return {name: value for name, value in compute_statistics(games).items() if name != "moves_per_second"}


def test_teacher_agrees_with_itself_and_makes_no_fatal_move() -> None:
    games = summaries(TeacherPolicy("bfs"))
    values = compute_statistics(games)
    assert values["apples_mean"] == pytest.approx(statistics.fmean(game.num_apples for game in games))
    assert values["steps_mean"] == pytest.approx(statistics.fmean(game.num_steps for game in games))
    assert values["teacher_agreement"] == values["optimal_agreement"] == 1
    assert values["fatal_move_rate"] == values["unparseable_rate"] == 0
    assert values["trapped_rate"] == 1
    assert values["fill_mean"] == pytest.approx((values["apples_mean"] + 1) / 36)
    assert values["apples_p5"] <= values["apples_median"] <= values["apples_p95"]
    assert values["moves_per_second"] > 0


def test_trap_rate_counts_avoidable_traps_among_decisions_that_offer_one() -> None:
    num_offered = num_taken = 0
    games = play_games(TeacherPolicy("bfs"), SEEDS, grid_size=6)
    for game in games:
        for frame in decision_frames(game.recording):
            safe = [move for move in frame.board.legal_moves() if keeps_tail_reachable(frame.board, move)]
            if safe and len(safe) < len(frame.board.legal_moves()):
                num_offered += 1
                num_taken += frame.move not in safe
    assert 0 < num_taken < num_offered
    values = compute_statistics([GameSummary.of(game) for game in games])
    assert values["trap_rate"] == num_taken / num_offered
    assert compute_statistics(summaries(TeacherPolicy("safe_greedy")))["trap_rate"] < values["trap_rate"]
    assert "trap_rate" not in compute_statistics(summaries(ScriptedPolicy(nonsense)))


def keeps_tail_reachable(board: Board, move: Move) -> bool:
    """Search from the head cell by cell, the slow way."""
    after = board.after(move)
    assert isinstance(after, Board)
    if after.length == after.size**2:
        return True
    seen = [after.head]
    for x, y in seen:
        for cell in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)):
            if cell not in seen and after.contains(cell) and (cell not in after.body or cell == after.body[-1]):
                seen.append(cell)
    return after.body[-1] in seen


def test_nonsense_scores_nothing() -> None:
    values = untimed(summaries(ScriptedPolicy(nonsense)))
    assert values["unparseable_rate"] == values["fatal_move_rate"] == 1
    assert values["apples_mean"] == values["apples_low"] == values["apples_high"] == values["steps_mean"] == 0
    assert values["teacher_agreement"] == values["optimal_agreement"] == values["win_rate"] == 0
    assert values["ends/NO_VALID_ANSWER"] == len(SEEDS)
    assert "path_gap" not in values


def test_statistics_are_reproducible() -> None:
    first, second = (untimed(summaries(TeacherPolicy("random_legal"))) for _ in range(2))
    assert first == second


def test_player_that_always_wins_has_win_rate_one() -> None:
    values = compute_statistics(summaries(TeacherPolicy("hamiltonian")))
    assert values["win_rate"] == values["fill_mean"] == values["win_high"] == 1
    assert values["win_low"] == pytest.approx(0.8389, abs=1e-4)
    assert values["ends/WIN"] == len(SEEDS)
    assert values["path_gap"] > 1  # the cycle takes detours


def test_path_gap_counts_the_steps_of_a_detour() -> None:
    # Nothing blocks a snake of length 1: around a square, then straight to the first apple.
    turns = iter([Move.UP, Move.RIGHT, Move.DOWN, Move.LEFT])

    def detour(board: Board) -> str:
        return next(turns, Move[like_bfs(board)]).name

    seed = next(seed for seed in SEEDS if play_games(TeacherPolicy("bfs"), [seed], max_steps=9)[0].num_apples == 1)
    board = play_games(TeacherPolicy("bfs"), [seed])[0].recording.frames[0].board
    assert board.apple not in [(5, 6), (6, 6), (6, 5)]
    (game,) = play_games(ScriptedPolicy(detour), [seed], max_steps=13)
    summary = GameSummary.of(game)
    assert (summary.num_direct_apples, summary.path_gap) == (1, 4)
    assert compute_statistics([summary])["path_gap"] == 4


def test_each_claim_has_a_rate() -> None:
    style = get_style("bfs-512")

    def half_true(board: Board) -> str:
        completion = style.write_completion(board, Move[like_bfs(board)])
        return completion.replace("- Manhattan distance to apple: ", "- Manhattan distance to apple: 1")

    values = compute_statistics(summaries(ScriptedPolicy(half_true), max_steps=4))
    assert values["claims/manhattan_distance"] == 0
    assert values["claims/head"] == values["claims/valid_moves"] == values["claims/conclusion"] == 1
    assert "claims/path_length" not in values


def test_summary_is_a_fixed_number_of_integers() -> None:
    for game in summaries(TeacherPolicy("bfs")) + summaries(ScriptedPolicy(nonsense)):
        row = game.to_row()
        assert len(row) == ROW_WIDTH
        assert all(type(number) is int for number in row)
        assert GameSummary.from_row(row) == game


def test_wilson_intervals_equal_published_values() -> None:
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    for successes, trials, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(20, 20) == pytest.approx((1 - 0.1611, 1), abs=5e-5)
    with pytest.raises(ValueError, match="3 of 2"):
        wilson_interval(3, 2)


def test_bootstrap_interval_of_normal_values_equals_the_analytic_interval() -> None:
    values = np.random.default_rng(1).normal(20, 5, 400)
    low, high = bootstrap_interval(values)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.05)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.05)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval([7.0]) == (7, 7)
    with pytest.raises(ValueError, match="value"):
        bootstrap_interval([])


def test_players_are_compared_by_game() -> None:
    better, worse = summaries(TeacherPolicy("bfs")), summaries(TeacherPolicy("random_legal"))
    difference = paired_difference(better, worse)
    assert difference.mean == pytest.approx(
        compute_statistics(better)["apples_mean"] - compute_statistics(worse)["apples_mean"]
    )
    assert 0 < difference.low < difference.mean < difference.high
    assert paired_difference(better, better) == (0, 0, 0)
    with pytest.raises(ValueError, match="seeds"):
        paired_difference(better, worse[1:])


def test_statistics_without_games_are_rejected() -> None:
    with pytest.raises(ValueError, match="game"):
        compute_statistics([])
