"""Plays the games of a round and assesses the states that the player visits. Imports no torch.

A round has slots, each of which plays the same number of moves, one game after the other. A game depends on the round,
its slot and the player only, so the states are the same for any number of ranks that share the slots.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias, get_args

from snake_lora_pl.evaluation.game_loop import DEATHS
from snake_lora_pl.evaluation.policy import Policy
from snake_lora_pl.game import Board, End, Game, Move, PromptMoves, get_seeded_teacher
from snake_lora_pl.game.game import starvation_cap
from snake_lora_pl.game.seeds import GAMES_PER_SEED, data_seed
from snake_lora_pl.game.teachers import SeededTeacher
from snake_lora_pl.imitation.settings import ImitationSettings

StateType: TypeAlias = Literal["fatal", "trap", "starving", "ending", "decisive", "disagreement", "agreement"]
"""Type of a state; the settings ``weight_*`` define them. A state may be of several types."""

STATE_TYPES: tuple[StateType, ...] = get_args(StateType)


@dataclass
class VisitedState:
    """A state in which the player was asked for a move.

    Attributes:
        board: The position.
        step: Number of moves played before.
        teacher_move: The teacher's move.
        types: What the state is an example of.
    """

    board: Board
    step: int
    teacher_move: Move
    types: set[StateType]


def state_types(board: Board, answer: Move | None, teacher_move: Move) -> set[StateType]:
    """Return the types of a state that do not depend on the rest of the game.

    Args:
        board: A position with a legal move.
        answer: The player's move; None if it named none.
        teacher_move: The teacher's move.
    """
    moves = PromptMoves.of(board)
    types: set[StateType] = {"agreement" if answer is teacher_move else "disagreement"}
    if moves.is_decisive:
        types.add("decisive")
    if answer not in moves.legal:
        types.add("fatal")
    elif moves.is_decisive and answer in moves.traps:
        types.add("trap")
    return types


@dataclass
class VisitedGame:
    """A game and the states that the player visited.

    Attributes:
        index: Number of the game among all games of all rounds.
        seed: Seed of the game.
        game: The game at the position from which the player plays.
        make_teacher: Makes the teacher from a seed.
        num_ending_states: Number of last states before a collision that are of type ``ending``.
        rng: Generator of the choices other than apples.
        states: The states, in order.
        is_over: Whether the game has ended, or repeats a position and would starve.
    """

    index: int
    seed: int
    game: Game
    make_teacher: SeededTeacher
    num_ending_states: int
    rng: random.Random
    states: list[VisitedState] = field(default_factory=list)
    is_over: bool = False

    def __post_init__(self) -> None:
        """Remember the start."""
        self._teacher = self.make_teacher(self.seed)
        self._num_first_apples = self.game.num_apples
        self._num_states_at_apple = 0
        # Positions since the last apple and the last move of the teacher: if one repeats, the player moves in a loop.
        self._positions: dict[Board, int] = {}

    @property
    def num_apples(self) -> int:
        """Number of apples that the snake ate since the player plays."""
        return self.game.num_apples - self._num_first_apples

    def play(self, answer: Move | None, teacher_share: float) -> None:
        """Record the state, and play the answer or the teacher's move."""
        board = self.game.board
        if board in self._positions:
            self._end(self.states[self._positions[board] :], "starving")
            return
        teacher_move = self._teacher(board)
        move, follows_teacher = answer, False
        if teacher_move is not None:  # else every move ends the game
            self._positions[board] = len(self.states)
            types = state_types(board, answer, teacher_move)
            self.states.append(VisitedState(board, self.game.num_steps, teacher_move, types))
            follows_teacher = teacher_share > 0 and self.rng.random() < teacher_share
            move = teacher_move if follows_teacher else answer
        num_apples = self.game.num_apples
        end = self.game.play(move)
        if follows_teacher or self.game.num_apples > num_apples:
            self._positions.clear()
        if self.game.num_apples > num_apples:
            self._num_states_at_apple = len(self.states)
        if end is End.STARVED:
            self._end(self.states[self._num_states_at_apple :], "starving")
        elif end is not None:
            self._end(self.states[-self.num_ending_states :] if end in DEATHS else [], "ending")

    def _end(self, states: Sequence[VisitedState], state_type: StateType) -> None:
        self.is_over = True
        for state in states:
            state.types.add(state_type)


class RoundCounts(NamedTuple):
    """Counts of some games of a round.

    Attributes:
        num_games: Games.
        num_apples: Apples that the snakes ate while the player played.
        num_states: Visited states.
        num_disagreements: States in which the player did not name the teacher's move.
        num_fatal: States of type ``fatal``.
        num_decisive: States of type ``decisive``.
        num_traps: States of type ``trap``.
    """

    num_games: int = 0
    num_apples: int = 0
    num_states: int = 0
    num_disagreements: int = 0
    num_fatal: int = 0
    num_decisive: int = 0
    num_traps: int = 0

    @classmethod
    def of(cls, games: Sequence[VisitedGame]) -> RoundCounts:
        """Count the states of games."""
        states = [state for game in games for state in game.states]
        names: tuple[StateType, ...] = ("disagreement", "fatal", "decisive", "trap")
        return cls(
            len(games),
            sum(game.num_apples for game in games),
            len(states),
            *(sum(name in state.types for state in states) for name in names),
        )

    @classmethod
    def total(cls, parts: Sequence[RoundCounts]) -> RoundCounts:
        """Return the sum of at least one part's counts."""
        return cls(*map(sum, zip(*parts, strict=True)))

    def metrics(self) -> dict[str, float]:
        """Return the metrics of a round, without the rates of which there are no cases."""
        rates = {
            "apples_mean": (self.num_apples, self.num_games),
            "trap_rate": (self.num_traps, self.num_decisive),
            "fatal_move_rate": (self.num_fatal, self.num_states),
            "disagreement_rate": (self.num_disagreements, self.num_states),
        }
        return {name: part / whole for name, (part, whole) in rates.items() if whole}


def play_round(
    policy: Policy,
    settings: ImitationSettings,
    teacher: str,
    grid_size: int,
    round_number: int,
    slots: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> list[list[VisitedGame]]:
    """Play the games of some slots of a round in lockstep.

    Args:
        policy: The player.
        settings: Settings of the games.
        teacher: Name of the teacher.
        grid_size: Cells along one side of the board.
        round_number: Number of the round, from 0.
        slots: Numbers of the slots, below ``settings.num_games``.
        progress: Called after each move with the number of moves of a slot, and of all its moves.

    Returns:
        The games of each slot.
    """
    make_teacher = get_seeded_teacher(teacher)
    teacher_share = settings.teacher_share_of(round_number)
    num_moves = settings.max_states // settings.num_games
    games: list[list[VisitedGame]] = [[] for _ in slots]
    if not games:
        return games
    with policy.playing():
        for num_played in range(num_moves):
            for slot, played in zip(slots, games, strict=True):
                if not played or played[-1].is_over:
                    number = len(played) * settings.num_games + slot
                    index = round_number * settings.max_states + number
                    played.append(start_game(index, settings, make_teacher, grid_size))
            running = [played[-1] for played in games]
            answers = policy.answer([game.game.board for game in running], [game.seed for game in running])
            for game, answer in zip(running, answers, strict=True):
                game.play(answer.move, teacher_share)
            if progress is not None:
                progress(num_played + 1, num_moves)
    return games


def start_game(index: int, settings: ImitationSettings, make_teacher: SeededTeacher, grid_size: int) -> VisitedGame:
    """Start a game: at the beginning, or for a share of the games at a number of apples of the teacher's game.

    The number is drawn uniformly from those that the teacher reaches in this game.
    """
    seed = data_seed(settings.seed - index // GAMES_PER_SEED, index % GAMES_PER_SEED)
    rng = random.Random(f"imitation {seed}")
    num_apples = int(rng.random() * (grid_size**2 - 1)) if rng.random() < settings.warm_starts else 0
    game = _play_teacher(seed, num_apples, make_teacher, grid_size)
    if game.end is not None or game.num_apples < num_apples:
        game = _play_teacher(seed, int(rng.random() * game.num_apples), make_teacher, grid_size)
    return VisitedGame(index, seed, game, make_teacher, settings.num_ending_states, rng)


def _play_teacher(seed: int, num_apples: int, make_teacher: SeededTeacher, grid_size: int) -> Game:
    game = Game(grid_size, seed, max_steps_without_apple=starvation_cap(grid_size))
    teacher = make_teacher(seed)
    while game.end is None and game.num_apples < num_apples:
        move = teacher(game.board)
        if move is None:
            break
        game.play(move)
    return game
