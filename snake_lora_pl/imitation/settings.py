"""Settings of imitation: the group ``imitate`` of a config."""

from __future__ import annotations

import math
from dataclasses import dataclass

from snake_lora_pl.errors import UserError
from snake_lora_pl.game import get_seeded_teacher
from snake_lora_pl.game.seeds import NUM_DATA_SEEDS

# Smallest and largest value of each number.
_RANGES: dict[str, tuple[float, float]] = {
    "every_n_steps": (0, math.inf),
    "num_games": (1, math.inf),
    "max_states": (1, math.inf),
    "warm_starts": (0, 1),
    "teacher_share": (0, 1),
    "teacher_share_rounds": (1, math.inf),
    "rows_share": (0, 1),
    "seed": (0, NUM_DATA_SEEDS - 1),
    "num_ending_states": (1, math.inf),
}
_WEIGHT_PREFIX = "weight_"


@dataclass(frozen=True)
class ImitationSettings:
    """Settings of imitation on the states that the adapter visits.

    A state that is of several types has the largest of their weights; a state of weight 0 is dropped.

    Args:
        every_n_steps: Number of optimizer steps between two rounds of games; 0 for no imitation.
        num_games: Number of games played at a time.
        max_states: Number of states visited in a round; a game that ends is replaced by the next one.
        warm_starts: Share of games that start from a position of a game that the teacher plays, at any length.
        teacher: Teacher that names the moves; by default play.teacher.
        teacher_share: Share of moves in the first round that follow the teacher instead of the adapter.
        teacher_share_rounds: Number of rounds over which teacher_share falls to 0, linearly.
        rows_share: Share of each training batch that is replaced by rows of the rounds, drawn by weight.
        seed: Seed of the games, in the range of data sets. Must differ from the seeds of other rows.
        weight_agreement: Weight of a state in which the adapter names the teacher's move.
        weight_disagreement: Weight of a state in which it names another move.
        weight_decisive: Weight of a state that offers a trap, after which the tail is unreachable, and a safe move.
        weight_trap: Weight of a decisive state in which the adapter's move is a trap.
        weight_fatal: Weight of a state in which the adapter's move ends the game although there is a legal move.
        weight_ending: Weight of the last states before a collision.
        weight_starving: Weight of the states of a loop in which a game starves.
        num_ending_states: Number of last states before a collision that have weight_ending.

    Raises:
        UserError: If a value is out of range or the teacher is unknown.
    """

    every_n_steps: int = 0
    num_games: int = 32
    max_states: int = 4096
    warm_starts: float = 0.5
    teacher: str | None = None
    teacher_share: float = 0.5
    teacher_share_rounds: int = 2
    rows_share: float = 0.33
    seed: int = NUM_DATA_SEEDS - 1
    weight_agreement: float = 1.0
    weight_disagreement: float = 3.0
    weight_decisive: float = 3.0
    weight_trap: float = 10.0
    weight_fatal: float = 10.0
    weight_ending: float = 3.0
    weight_starving: float = 3.0
    num_ending_states: int = 8

    def __post_init__(self) -> None:
        """Collect all problems and raise once."""
        weights = {name: getattr(self, name) for name in self.__dataclass_fields__ if name.startswith(_WEIGHT_PREFIX)}
        problems = []
        for name, (minimum, maximum) in {**_RANGES, **dict.fromkeys(weights, (0, math.inf))}.items():
            value = getattr(self, name)
            if not minimum <= value <= maximum or value == math.inf:
                limits = f"at least {minimum}" + ("" if maximum == math.inf else f" and at most {maximum}")
                problems.append(f"imitate.{name} must be {limits} (found: {value})")
        if not problems and self.max_states < self.num_games:
            problems.append(
                f"imitate.max_states must be at least imitate.num_games={self.num_games} (found: {self.max_states})"
            )
        if not any(weights.values()):
            problems.append("imitate.weight_*: every weight is 0, so that no state is kept. Set one above 0")
        if self.teacher is not None:
            try:
                get_seeded_teacher(self.teacher)
            except ValueError as error:
                problems.append(f"imitate.teacher: {error}")
        if problems:
            raise UserError("; ".join(problems))

    def weight_of(self, state_type: str) -> float:
        """Return the weight of a type of state, see ``visits.StateType``."""
        weight: float = getattr(self, f"{_WEIGHT_PREFIX}{state_type}")
        return weight

    def teacher_share_of(self, round_number: int) -> float:
        """Return the share of moves that follow the teacher in a round, counted from 0."""
        return self.teacher_share * max(0.0, 1 - round_number / self.teacher_share_rounds)
