"""Statistics of played games, computed from a few integers per game so that ranks can exchange them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from snake_lora_pl.evaluation.game_loop import PlayedGame
from snake_lora_pl.game import End, apple_distance
from snake_lora_pl.game.replay import Recording
from snake_lora_pl.game.text import CLAIM_NAMES

_NUM_RESAMPLES = 10_000
_NUM_RESAMPLE_BATCHES = 20
_Z = 1.959963984540054  # 97.5% quantile of the standard normal distribution

ENDS = tuple(end for end in End if end is not End.NO_PATH)
"""Ends of games that are played by the rules; NO_PATH ends games of data sets only."""


class Interval(NamedTuple):
    """A 95% confidence interval."""

    low: float
    high: float


class GameSummary(NamedTuple):
    """Counts of one game, from which statistics are computed.

    Attributes:
        seed: Seed of the game.
        grid_size: Cells along one side of the board.
        end: Why the game ended.
        num_apples: Apples that the snake ate.
        num_steps: Steps survived.
        num_moves: Decisions; one more than the steps if the last move was deadly.
        num_fatal: 1 if the last move was fatal (see ``Judgment.is_fatal``).
        num_offered_traps: Decisions with both a trap and a safe move (see ``Judgment.is_decisive``).
        num_taken_traps: Decisions among these for the trap.
        num_trapped: 1 if the game ended in death without a legal move left.
        num_unparseable: Decisions from which no move could be read.
        num_as_teacher: Moves equal to the teacher's.
        num_with_path: Decisions with a path to the apple.
        num_optimal: Moves that begin a shortest path.
        num_direct_apples: Apples that the snake ate and that had a path when they appeared.
        path_gap: Total number of steps beyond the shortest paths to these apples.
        answer_us: Microseconds that the policy took to answer.
        num_claims: Number of claims of each of ``CLAIM_NAMES``.
        num_true_claims: Number of true claims of each of ``CLAIM_NAMES``.
    """

    seed: int
    grid_size: int
    end: End
    num_apples: int
    num_steps: int
    num_moves: int
    num_fatal: int
    num_offered_traps: int
    num_taken_traps: int
    num_trapped: int
    num_unparseable: int
    num_as_teacher: int
    num_with_path: int
    num_optimal: int
    num_direct_apples: int
    path_gap: int
    answer_us: int
    num_claims: tuple[int, ...]
    num_true_claims: tuple[int, ...]

    @classmethod
    def of(cls, game: PlayedGame) -> GameSummary:
        """Summarize a game."""
        judged = list(zip(game.moves, game.judgments, strict=True))
        claims = [judgment.claims for judgment in game.judgments]
        num_fatal = sum(judgment.is_fatal for judgment in game.judgments)
        num_direct_apples, path_gap = _path_gap(game.recording)
        return cls(
            seed=game.seed,
            grid_size=game.recording.size,
            end=game.end,
            num_apples=game.num_apples,
            num_steps=game.num_steps,
            num_moves=len(judged),
            num_fatal=num_fatal,
            num_offered_traps=sum(judgment.is_decisive for judgment in game.judgments),
            num_taken_traps=sum(judgment.is_trap for judgment in game.judgments),
            num_trapped=int(game.recording.ended_by_illegal_move) - num_fatal,
            num_unparseable=sum(judgment.is_unparseable for judgment in game.judgments),
            num_as_teacher=sum(move is judgment.teacher_move for move, judgment in judged),
            num_with_path=sum(bool(judgment.optimal_moves) for judgment in game.judgments),
            num_optimal=sum(move in judgment.optimal_moves for move, judgment in judged),
            num_direct_apples=num_direct_apples,
            path_gap=path_gap,
            answer_us=round(game.answer_seconds * 1e6),
            num_claims=tuple(sum(name in checked for checked in claims) for name in CLAIM_NAMES),
            num_true_claims=tuple(sum(checked.get(name, False) for checked in claims) for name in CLAIM_NAMES),
        )

    def to_row(self) -> list[int]:
        """Return the summary as ``ROW_WIDTH`` integers."""
        values: list[int] = []
        for value in self:
            if isinstance(value, End):
                values.append(list(End).index(value))
            elif isinstance(value, tuple):
                values.extend(value)
            else:
                values.append(value)
        return values

    @classmethod
    def from_row(cls, row: Sequence[int]) -> GameSummary:
        """Return the summary of the integers from ``to_row``."""
        first_claim = len(row) - 2 * len(CLAIM_NAMES)
        seed, grid_size, end, *counts = row[:first_claim]
        claims = tuple(row[first_claim:])
        half = len(CLAIM_NAMES)
        return cls._make([seed, grid_size, list(End)[end], *counts, claims[:half], claims[half:]])


ROW_WIDTH = len(GameSummary._fields) - 2 + 2 * len(CLAIM_NAMES)
"""Number of integers in ``GameSummary.to_row``."""


def _path_gap(recording: Recording) -> tuple[int, int]:
    """Return the number of apples with a path when they appeared, and the steps beyond the shortest paths to them.

    The shortest path treats the whole body as walls, even cells that the tail leaves in time, so the gap of an apple
    can be negative.
    """
    frames = recording.frames
    num_apples, gap, start = 0, 0, 0
    for index in range(1, len(frames)):
        if frames[index].board.length > frames[index - 1].board.length:
            shortest = apple_distance(frames[start].board)
            if shortest is not None:
                num_apples += 1
                gap += index - start - shortest
            start = index
    return num_apples, gap


def compute_statistics(games: Sequence[GameSummary], num_ranks: int = 1) -> dict[str, float]:
    """Compute the statistics of one player's games.

    Args:
        games: At least one game.
        num_ranks: Number of ranks that played the games at the same time.

    Returns:
        The statistics, without those that are undefined for these games:

        - ``num_games``, ``apples_mean`` with its 95% bootstrap interval ``apples_low`` to ``apples_high``,
          ``apples_median``, ``apples_p5``, ``apples_p95``;
        - ``fill_mean``: share of the board that the snake covers at the end;
        - ``win_rate`` with its 95% Wilson interval ``win_low`` to ``win_high``; ``steps_mean``;
        - ``fatal_move_rate``: share of all moves that ended a game (wall, body, reversal or no valid answer) although
          there was a legal move; ``trap_rate``: share of moves into a trap, after which the tail is unreachable, among
          moves made while there were both a trap and a safe move; ``trapped_rate``: share of games that ended without a
          legal move;
        - ``unparseable_rate``: share of all answers from which no move could be read;
        - ``teacher_agreement``: share of all moves equal to the teacher's; ``optimal_agreement``: share of moves that
          begin a shortest path to the apple, among moves made while there was a path;
        - ``path_gap``: mean number of steps per apple beyond the shortest path;
        - ``moves_per_second``: moves divided by the time that the policy took to answer;
        - ``claims/NAME``: share of true claims; ``ends/NAME``: number of games with that end.

    Raises:
        ValueError: If there are no games.
    """
    if not games:
        raise ValueError("statistics need at least one game (found: 0)")
    apples = np.array([game.num_apples for game in games])
    num_games = len(games)
    num_moves = sum(game.num_moves for game in games)
    num_wins = sum(game.end is End.WIN for game in games)
    interval, wins = bootstrap_interval(apples), wilson_interval(num_wins, num_games)
    values = {
        "num_games": num_games,
        "apples_mean": float(apples.mean()),
        "apples_low": interval.low,
        "apples_high": interval.high,
        "apples_median": float(np.median(apples)),
        "apples_p5": float(np.percentile(apples, 5)),
        "apples_p95": float(np.percentile(apples, 95)),
        "fill_mean": float(np.mean([(game.num_apples + 1) / game.grid_size**2 for game in games])),
        "win_rate": num_wins / num_games,
        "win_low": wins.low,
        "win_high": wins.high,
        "steps_mean": sum(game.num_steps for game in games) / num_games,
        "fatal_move_rate": sum(game.num_fatal for game in games) / num_moves,
        "trap_rate": _ratio(sum(game.num_taken_traps for game in games), sum(game.num_offered_traps for game in games)),
        "trapped_rate": sum(game.num_trapped for game in games) / num_games,
        "unparseable_rate": sum(game.num_unparseable for game in games) / num_moves,
        "teacher_agreement": sum(game.num_as_teacher for game in games) / num_moves,
        "optimal_agreement": _ratio(sum(game.num_optimal for game in games), sum(game.num_with_path for game in games)),
        "path_gap": _ratio(sum(game.path_gap for game in games), sum(game.num_direct_apples for game in games)),
        "moves_per_second": _ratio(num_moves * num_ranks, sum(game.answer_us for game in games) / 1e6),
    }
    for index, name in enumerate(CLAIM_NAMES):
        values[f"claims/{name}"] = _ratio(
            sum(game.num_true_claims[index] for game in games), sum(game.num_claims[index] for game in games)
        )
    values |= {f"ends/{end.name}": sum(game.end is end for game in games) for end in ENDS}
    return {name: value for name, value in values.items() if not math.isnan(value)}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def bootstrap_interval(values: Iterable[float] | npt.NDArray[np.number]) -> Interval:
    """Return the 95% percentile bootstrap interval of the mean (Efron & Tibshirani, 1993, section 13.3).

    The resamples have a fixed seed, so equal values have equal intervals.

    Raises:
        ValueError: If there are no values.
    """
    array = np.asarray(list(values), dtype=np.float64)
    if not len(array):
        raise ValueError("an interval needs at least one value (found: 0)")
    rng = np.random.default_rng(0)
    # In batches, because one matrix of all resamples of a thousand games is large.
    means = [
        array[rng.integers(0, len(array), (_NUM_RESAMPLES // _NUM_RESAMPLE_BATCHES, len(array)))].mean(axis=1)
        for _ in range(_NUM_RESAMPLE_BATCHES)
    ]
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return Interval(float(low), float(high))


def wilson_interval(num_successes: int, num_trials: int) -> Interval:
    """Return the 95% score interval of a proportion (Wilson, 1927), which is useful for proportions of 0 and 1, too.

    Raises:
        ValueError: If ``num_successes`` is not between 0 and ``num_trials``, or there are no trials.
    """
    if not 0 <= num_successes <= num_trials or num_trials == 0:
        raise ValueError(f"{num_successes} of {num_trials} is not a proportion")
    share, weight = num_successes / num_trials, _Z**2 / num_trials
    center = share + weight / 2
    margin = _Z * math.sqrt(share * (1 - share) / num_trials + weight / (4 * num_trials))
    return Interval(max(0.0, (center - margin) / (1 + weight)), min(1.0, (center + margin) / (1 + weight)))


class Difference(NamedTuple):
    """Mean difference in apples between two players on the same games, with its 95% interval."""

    mean: float
    low: float
    high: float


def paired_difference(games: Sequence[GameSummary], others: Sequence[GameSummary]) -> Difference:
    """Return the mean difference in apples over games of the same seeds, with its bootstrap interval.

    Raises:
        ValueError: If the seeds differ.
    """
    if [game.seed for game in games] != [game.seed for game in others]:
        raise ValueError("a paired comparison needs games of the same seeds in the same order")
    differences = [game.num_apples - other.num_apples for game, other in zip(games, others, strict=True)]
    return Difference(sum(differences) / len(differences), *bootstrap_interval(differences))
