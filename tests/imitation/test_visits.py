"""Games of a round: state types, seeds, the teacher's share, and independence of the number of ranks."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from snake_lora_pl.game import Board, Move, get_seeded_teacher, get_teacher
from snake_lora_pl.game.search import tail_distances
from snake_lora_pl.game.seeds import FIRST_PLAY_SEED, GAMES_PER_SEED
from snake_lora_pl.imitation.settings import ImitationSettings
from snake_lora_pl.imitation.visits import RoundCounts, VisitedGame, play_round, start_game, state_types
from tests.evaluation.scripted import ScriptedPolicy, like_bfs, nonsense

COLD = ImitationSettings(num_games=3, max_states=60, warm_starts=0.0, teacher_share=0.0)

# The head at (1, 0) can go to its tail's side (RIGHT) or into the pocket of one cell (LEFT).
DECISIVE = Board(4, ((1, 0), (1, 1), (0, 1), (0, 2), (1, 2), (2, 2), (3, 2), (3, 1)), (3, 3))

safe_greedy = get_teacher("safe_greedy")


def in_circles(board: Board) -> str:
    """Return a move on a cycle of four cells around the start, whatever the apple."""
    moves = {(2, 2): Move.UP, (2, 3): Move.RIGHT, (3, 3): Move.DOWN, (3, 2): Move.LEFT}
    return moves[board.head].name


def like_safe_greedy(board: Board) -> str:
    return (safe_greedy(board) or board.fallback_move()).name


def play(complete, settings=COLD, number=0, slots=None, grid_size=5) -> list[list[VisitedGame]]:
    chosen = range(settings.num_games) if slots is None else slots
    return play_round(ScriptedPolicy(complete), settings, "safe_greedy", grid_size, number, chosen)


def test_state_types_by_the_move_of_the_player() -> None:
    assert tail_distances(DECISIVE).keys() == {Move.RIGHT}
    assert set(DECISIVE.legal_moves()) == {Move.RIGHT, Move.LEFT}
    assert state_types(DECISIVE, Move.RIGHT, Move.RIGHT) == {"agreement", "decisive"}
    assert state_types(DECISIVE, Move.LEFT, Move.RIGHT) == {"disagreement", "decisive", "trap"}
    assert state_types(DECISIVE, Move.DOWN, Move.RIGHT) == {"disagreement", "decisive", "fatal"}
    assert state_types(DECISIVE, None, Move.RIGHT) == {"disagreement", "decisive", "fatal"}
    start = Board(4, ((2, 2),), (0, 0))
    assert state_types(start, Move.UP, Move.UP) == {"agreement"}
    assert state_types(start, Move.UP, Move.LEFT) == {"disagreement"}


def test_each_slot_plays_its_share_of_the_states() -> None:
    for played in play(like_safe_greedy):
        assert sum(len(game.states) for game in played) <= 60 // 3
    policy = ScriptedPolicy(like_safe_greedy)
    play_round(policy, COLD, "safe_greedy", 5, 0, range(3))
    assert policy.batch_sizes == [3] * 20


def test_rows_do_not_depend_on_the_ranks_that_share_the_slots() -> None:
    settings = dataclasses.replace(COLD, warm_starts=0.5, teacher_share=0.3)
    whole = play(like_bfs, settings)
    for size in (2, 3):
        for rank in range(size):
            slots = range(3)[rank::size]
            for played, expected in zip(play(like_bfs, settings, slots=slots), whole[rank::size], strict=True):
                assert [game.seed for game in played] == [game.seed for game in expected]
                assert [game.states for game in played] == [game.states for game in expected]


def test_fatal_answer_ends_the_game_and_the_slot_starts_another() -> None:
    games = [game for played in play(nonsense) for game in played]
    assert len(games) == 60
    assert all(game.states[0].types >= {"fatal", "ending", "disagreement"} for game in games)


def test_seeds_of_all_rounds_differ_and_are_for_data() -> None:
    seeds = [game.seed for number in range(3) for played in play(nonsense, number=number) for game in played]
    assert len(set(seeds)) == len(seeds) == 180
    assert all(seed < FIRST_PLAY_SEED for seed in seeds)
    assert all(seed // GAMES_PER_SEED == COLD.seed for seed in seeds)


def test_seeds_continue_below_when_a_million_games_are_used_up() -> None:
    teacher = get_seeded_teacher("safe_greedy")
    last, after = (start_game(GAMES_PER_SEED + offset, COLD, teacher, 5).seed for offset in (-1, 0))
    assert last == COLD.seed * GAMES_PER_SEED + GAMES_PER_SEED - 1
    assert after == (COLD.seed - 1) * GAMES_PER_SEED


def test_last_states_before_a_collision_are_ending() -> None:
    settings = dataclasses.replace(COLD, num_games=1, max_states=6, num_ending_states=2)
    (played,) = play(lambda board: "UP", settings)
    first = played[0]
    # From the middle row of five, two moves reach the wall and the third one hits it.
    assert ["ending" in state.types for state in first.states] == [False, True, True]
    assert len(played) == 2


def test_loop_ends_the_game_and_its_states_are_starving() -> None:
    settings = dataclasses.replace(COLD, num_games=1, max_states=40)
    (played,) = play(in_circles, settings)
    loops = [game for game in played if game.is_over]
    assert loops
    for game in loops:
        assert [state.board.head for state in game.states[-4:]].count(game.states[-1].board.head) == 1
        assert ["starving" in state.types for state in game.states[-4:]] == [True] * 4
        assert not any("starving" in state.types for state in game.states[:-4] if state.board.length == 1)
        boards = [state.board for state in game.states]
        assert len(set(boards)) == len(boards)


def test_moves_of_the_teacher_break_a_loop() -> None:
    settings = dataclasses.replace(COLD, num_games=1, max_states=40, teacher_share=1.0, teacher_share_rounds=9)
    (played,) = play(like_bfs, settings)
    assert not any("starving" in state.types for game in played for state in game.states)


def test_share_of_moves_follows_the_teacher() -> None:
    settings = ImitationSettings(num_games=8, max_states=800, warm_starts=0.0, teacher_share=1.0)
    games = [game for played in play(nonsense, settings) for game in played]
    # The player's answer would end every game at once.
    assert all(len(game.states) > 1 for game in games)
    assert all("fatal" in state.types for game in games for state in game.states)
    half = [game for played in play(nonsense, settings, number=1) for game in played]
    lengths = [len(game.states) for game in half if game.is_over]
    # With half of the moves, a game has two states on average.
    assert 1.6 < sum(lengths) / len(lengths) < 2.4


def test_warm_starts_begin_at_all_lengths() -> None:
    settings = dataclasses.replace(COLD, warm_starts=1.0)
    teacher = get_seeded_teacher("safe_greedy")
    lengths = [start_game(index, settings, teacher, 5).game.board.length for index in range(60)]
    quarters = Counter(min(3, 4 * length // 25) for length in lengths)
    assert min(quarters[i] for i in range(4)) >= 5
    assert all(start_game(index, COLD, teacher, 5).game.board.length == 1 for index in range(9))


def test_warm_start_of_a_weak_teacher_is_a_running_game() -> None:
    settings = dataclasses.replace(COLD, warm_starts=1.0)
    teacher = get_seeded_teacher("random_legal")
    games = [start_game(index, settings, teacher, 5) for index in range(40)]
    assert all(game.game.end is None for game in games)
    assert len({game.game.board.length for game in games}) > 1


def test_counts_of_a_round() -> None:
    counts = RoundCounts.of([game for played in play(nonsense) for game in played])
    assert (counts.num_games, counts.num_states, counts.num_fatal, counts.num_disagreements) == (60, 60, 60, 60)
    assert counts.metrics() == {"apples_mean": 0.0, "fatal_move_rate": 1.0, "disagreement_rate": 1.0}
    agreeing = RoundCounts.of([game for played in play(like_safe_greedy) for game in played])
    assert agreeing.metrics()["disagreement_rate"] == 0.0
    assert agreeing.metrics()["apples_mean"] > 0
    assert RoundCounts.total([counts, agreeing]).num_states == 60 + agreeing.num_states


@pytest.mark.parametrize("warm_starts", [0.0, 1.0])
def test_apples_of_the_warm_start_do_not_count(warm_starts: float) -> None:
    settings = dataclasses.replace(COLD, warm_starts=warm_starts)
    counts = RoundCounts.of([game for played in play(nonsense, settings) for game in played])
    assert counts.num_apples == 0


def test_rank_without_slots_plays_nothing() -> None:
    policy = ScriptedPolicy(nonsense)
    assert play_round(policy, COLD, "safe_greedy", 5, 0, []) == []
    assert policy.batch_sizes == []
    assert RoundCounts.of([]) == RoundCounts()
