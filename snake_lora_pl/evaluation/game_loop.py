"""Many games in lockstep, played by any policy, and what is to be said of each move. Imports no torch.

In each round the policy is asked once for the moves of all games that run. A game that ends makes room for the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from snake_lora_pl.evaluation.policy import Answer, Policy, TeacherPolicy
from snake_lora_pl.game import Board, End, Game, Move, check_claims, shortest_moves
from snake_lora_pl.game.game import starvation_cap
from snake_lora_pl.game.replay import Frame, Recording

DEATHS = (End.WALL, End.SELF, End.NO_VALID_ANSWER)
"""Ends that a move of the player's own brings about."""

# So many games cost a model little more time than one, and no more memory than a small GPU has.
BATCH_SIZE = 64


class Judgment(NamedTuple):
    """What is to be said of one move.

    Attributes:
        is_fatal: The move ended the game though a legal one was left: hitting wall or body, reversing, or naming none.
        is_unparseable: No move could be read.
        teacher_move: What the teacher does on that board.
        optimal_moves: Every first move of a shortest path to the apple; empty where there is no path.
        claims: For each thing that the words claim, whether it is so.
    """

    is_fatal: bool
    is_unparseable: bool
    teacher_move: Move
    optimal_moves: tuple[Move, ...]
    claims: dict[str, bool]


@dataclass(frozen=True)
class PlayedGame:
    """A game that a policy played.

    Attributes:
        seed: The game's seed: the same moves make the same game of it.
        recording: Every position, move and word, and the end.
        judgments: One for each move asked for, the last one included.
        answer_seconds: This game's share of the time that the policy took to answer.
    """

    seed: int
    recording: Recording
    judgments: tuple[Judgment, ...]
    answer_seconds: float

    @property
    def end(self) -> End:
        """Why the game was over."""
        assert self.recording.end is not None
        return self.recording.end

    @property
    def num_apples(self) -> int:
        """Apples eaten."""
        return self.recording.num_apples(-1)

    @property
    def num_steps(self) -> int:
        """Steps survived: a move that ends the game in death is none."""
        return len(self.recording.frames) - 1

    @property
    def moves(self) -> list[Move | None]:
        """The moves as the policy named them, the deadly one included."""
        return [frame.move for frame in decision_frames(self.recording)]


def decision_frames(recording: Recording) -> tuple[Frame, ...]:
    """The positions that a move was asked for: all, but for the last one of a game that outlived its last move."""
    return recording.frames if recording.ended_by_illegal_move else recording.frames[:-1]


def play_games(
    policy: Policy,
    seeds: Sequence[int],
    *,
    grid_size: int = 10,
    max_steps: int | None = None,
    max_steps_without_apple: int | None = None,
    teacher: str = "bfs",
    batch_size: int = BATCH_SIZE,
    progress: Callable[[int, int], None] | None = None,
) -> list[PlayedGame]:
    """Play a game of each seed to its end.

    Args:
        policy: The player.
        seeds: Seeds of the games; ``game.seeds.play_seeds`` makes some that no data set has.
        grid_size: Cells along one side of the grid.
        max_steps: Steps after which a game ends with MAX_STEPS; None for no limit.
        max_steps_without_apple: Steps without an apple after which a game ends with STARVED; None takes
            ``game.starvation_cap``. A player that circles would never end without.
        teacher: Name of the teacher that moves are compared with.
        batch_size: Most games at a time. It bounds memory and changes nothing else.
        progress: Called after each round with the number of games that are over and the number of all.

    Returns:
        The games in the order of their seeds.

    Raises:
        ValueError: If a value is out of range, there is no such teacher, or the policy does not answer every board.
    """
    if max_steps_without_apple is None:
        max_steps_without_apple = starvation_cap(grid_size)
    for name, value in (
        ("batch_size", batch_size),
        ("max_steps_without_apple", max_steps_without_apple),
        ("max_steps", 1 if max_steps is None else max_steps),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1 (found: {value})")
    judge = TeacherPolicy(teacher)
    games = [_RunningGame(Game(grid_size, seed, max_steps, max_steps_without_apple), seed) for seed in seeds]
    waiting = iter(games)
    running = list(islice(waiting, batch_size))
    with policy.playing():
        while running:
            _play_round(policy, running)
            running = [game for game in running if game.end is None]
            running.extend(islice(waiting, batch_size - len(running)))
            if progress is not None:
                progress(sum(game.end is not None for game in games), len(games))
    return [game.judged(policy.name, judge) for game in games]


class _RunningGame:
    """A game and the record of it."""

    def __init__(self, game: Game, seed: int) -> None:
        self._game = game
        self.seed = seed
        self._frames: list[Frame] = []
        self._answer_seconds = 0.0

    @property
    def board(self) -> Board:
        return self._game.board

    @property
    def end(self) -> End | None:
        return self._game.end

    def play(self, answer: Answer, seconds: float) -> None:
        self._frames.append(Frame(self._game.board, answer.move, answer.completion))
        self._answer_seconds += seconds
        self._game.play(answer.move)

    def judged(self, player: str, judge: TeacherPolicy) -> PlayedGame:
        assert self.end is not None
        frames = self._frames if self.end in DEATHS else [*self._frames, Frame(self.board)]
        recording = Recording(tuple(frames), self.end, f"{player}, game {self.seed}")
        return PlayedGame(self.seed, recording, tuple(judge_moves(recording, self.seed, judge)), self._answer_seconds)


def _play_round(policy: Policy, games: Sequence[_RunningGame]) -> None:
    """One move of each game."""
    start = time.perf_counter()
    answers = policy.answer([game.board for game in games], [game.seed for game in games])
    seconds = (time.perf_counter() - start) / len(games)
    if len(answers) != len(games):
        raise ValueError(f"policy '{policy.name}' gave {len(answers)} answers to {len(games)} boards")
    for game, answer in zip(games, answers, strict=True):
        game.play(answer, seconds)


def judge_moves(recording: Recording, seed: int, judge: TeacherPolicy) -> Iterator[Judgment]:
    """What is to be said of each move of a game, in turn.

    Args:
        recording: The game.
        seed: Its seed, for a teacher that draws.
        judge: The teacher that moves are compared with.
    """
    frames = decision_frames(recording)
    for index, (board, move, words) in enumerate(frames):
        ended_in_death = recording.ended_by_illegal_move and index == len(frames) - 1
        (answer,) = judge.answer([board], [seed])
        assert answer.move is not None
        yield Judgment(
            is_fatal=ended_in_death and bool(board.legal_moves()),
            is_unparseable=move is None,
            teacher_move=answer.move,
            optimal_moves=tuple(shortest_moves(board)),
            claims=check_claims(board, move, words) if words else {},
        )
