"""Plays many games of one policy in lockstep and judges each move. Imports no torch.

Each round asks the policy once for the moves of all running games. A game that ends is replaced by the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from snake_lora_pl.evaluation.policy import Answer, Policy, TeacherPolicy
from snake_lora_pl.game import Board, End, Game, Move, PromptMoves, check_claims, shortest_moves
from snake_lora_pl.game.game import starvation_cap
from snake_lora_pl.game.replay import Frame, Recording

DEATHS = (End.WALL, End.SELF, End.NO_VALID_ANSWER)
"""Ends caused by a move of the player."""

# A model answers this many boards in little more time than one, within the memory of a small GPU.
BATCH_SIZE = 64


class Judgment(NamedTuple):
    """Assessment of one move.

    Attributes:
        is_fatal: The move ended the game although there was a legal move: it hit a wall or the body, reversed, or named
            no move.
        is_decisive: There were both a trap and a safe move.
        is_trap: The move is a trap although there was a safe move.
        is_unparseable: No move could be read.
        teacher_move: The teacher's move on the board.
        optimal_moves: All first moves of shortest paths to the apple; empty without a path.
        claims: Name -> truth of each claim in the completion.
    """

    is_fatal: bool
    is_decisive: bool
    is_trap: bool
    is_unparseable: bool
    teacher_move: Move
    optimal_moves: tuple[Move, ...]
    claims: dict[str, bool]


@dataclass(frozen=True)
class PlayedGame:
    """A finished game.

    Attributes:
        seed: Seed of the game; seed and moves determine it.
        recording: All positions, moves and completions.
        judgments: One for each decision, the last included.
        answer_seconds: This game's share of the time that the policy took to answer.
        end: Why the game ended.
    """

    seed: int
    recording: Recording
    judgments: tuple[Judgment, ...]
    answer_seconds: float
    end: End

    @property
    def num_apples(self) -> int:
        """Number of apples that the snake ate."""
        return self.recording.num_apples(-1)

    @property
    def num_steps(self) -> int:
        """Number of steps survived, without a move that ends the game in death."""
        return len(self.recording.frames) - 1

    @property
    def moves(self) -> list[Move | None]:
        """Moves that the policy named, including a deadly last one."""
        return [frame.move for frame in decision_frames(self.recording)]


def decision_frames(recording: Recording) -> tuple[Frame, ...]:
    """Return the positions in which the player was asked for a move: all but the last of a game without a death."""
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
    """Play one game per seed.

    Args:
        policy: The player.
        seeds: Seeds of the games; ``game.seeds.play_seeds`` returns seeds that no data set uses.
        grid_size: Cells along one side of the board.
        max_steps: Number of steps after which a game ends with MAX_STEPS; None for no limit.
        max_steps_without_apple: Number of steps without an apple after which a game ends with STARVED, so that a player
            that moves in circles ends; None for ``game.starvation_cap``.
        teacher: Name of the teacher that moves are compared with.
        batch_size: Maximum number of games played at a time; affects memory, not results.
        progress: Called after each round with the number of finished games and of all games.

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
    return [game.finish(policy.name, judge) for game in games]


class _RunningGame:
    """A game and its record."""

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

    def finish(self, player: str, judge: TeacherPolicy) -> PlayedGame:
        if self.end is None:
            raise RuntimeError(f"game {self.seed} is not over")
        frames = self._frames if self.end in DEATHS else [*self._frames, Frame(self.board)]
        recording = Recording(tuple(frames), self.end, f"{player}, game {self.seed}")
        judgments = tuple(judge_moves(recording, self.seed, judge))
        return PlayedGame(self.seed, recording, judgments, self._answer_seconds, self.end)


def _play_round(policy: Policy, games: Sequence[_RunningGame]) -> None:
    """Play one move of each game."""
    start = time.perf_counter()
    answers = policy.answer([game.board for game in games], [game.seed for game in games])
    seconds = (time.perf_counter() - start) / len(games)
    if len(answers) != len(games):
        raise ValueError(f"policy '{policy.name}' gave {len(answers)} answers to {len(games)} boards")
    for game, answer in zip(games, answers, strict=True):
        game.play(answer, seconds)


def judge_moves(recording: Recording, seed: int, judge: TeacherPolicy) -> Iterator[Judgment]:
    """Judge each move of a game in turn.

    Args:
        recording: The game.
        seed: Its seed, for a teacher that draws random numbers.
        judge: The teacher that moves are compared with.
    """
    frames = decision_frames(recording)
    for index, (board, move, completion) in enumerate(frames):
        is_death = recording.ended_by_illegal_move and index == len(frames) - 1
        moves = PromptMoves.of(board)
        yield Judgment(
            is_fatal=is_death and bool(moves.legal),
            is_decisive=moves.is_decisive,
            is_trap=moves.is_decisive and move in moves.traps,
            is_unparseable=move is None,
            teacher_move=judge.move(board, seed),
            optimal_moves=tuple(shortest_moves(board)),
            claims=check_claims(board, move, completion) if completion else {},
        )
