"""Settings of play evaluation: the group ``play`` of a config."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from snake_lora_pl.errors import UserError
from snake_lora_pl.evaluation.game_loop import BATCH_SIZE
from snake_lora_pl.evaluation.policy import Reading, reading_problems
from snake_lora_pl.game import get_seeded_teacher, get_style
from snake_lora_pl.game.board import MAX_GRID_SIZE
from snake_lora_pl.game.game import starvation_cap
from snake_lora_pl.game.seeds import GAMES_PER_SEED, play_seeds

# Smallest and largest value of each number.
_RANGES = {
    "grid_size": (2, MAX_GRID_SIZE),
    "max_steps": (1, math.inf),
    "max_steps_without_apple": (1, math.inf),
    "batch_size": (1, math.inf),
    "val_games": (0, GAMES_PER_SEED),
    "every_n_epochs": (1, math.inf),
    "test_games": (1, GAMES_PER_SEED),
    "final_games": (0, GAMES_PER_SEED),
}


@dataclass(frozen=True)
class PlaySettings:
    """Settings of the games that evaluate a model.

    Args:
        reading: How a move is read from the model. generate decodes a completion and reads its conclusion; score
            compares the likelihoods of the four moves, if the style allows it.
        legal_mask: Whether test adds a player that chooses among legal moves only; needs score.
        style: Style of the prompts; by default that of the training rows.
        grid_size: Cells along one side of the board; by default that of the training rows.
        teacher: Teacher that moves are compared with, and that test adds as a player.
        seed: Seed of the set of games. No generated data set contains any of them.
        max_steps: Number of steps after which a game ends; no limit by default.
        max_steps_without_apple: Number of steps without an apple after which a game ends; by default four times the
            number of cells.
        batch_size: Maximum number of games played at a time.
        val_games: Number of games played during training; 0 for none. The model decodes a completion for every move;
            with long completions this takes minutes on a CPU.
        every_n_epochs: Number of epochs between validations with games. The last validation always has games.
        test_games: Number of games of each player in the command test.
        final_games: Number of games of each player at the end of fit: the saved adapter, the base model and the other
            players of test; 0 for none.

    Raises:
        UserError: If a value is out of range or a name is unknown.
    """

    reading: Reading = "generate"
    legal_mask: bool = False
    style: str | None = None
    grid_size: int | None = None
    teacher: str = "bfs"
    seed: int = 0
    max_steps: int | None = None
    max_steps_without_apple: int | None = None
    batch_size: int = BATCH_SIZE
    val_games: int = 0
    every_n_epochs: int = 1
    test_games: int = 100
    final_games: int = 0

    def __post_init__(self) -> None:
        """Collect all problems and raise once."""
        problems = reading_problems(self.reading, legal_mask=self.legal_mask)
        for name, (minimum, maximum) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                problems.append(f"play.{name} must be at least {minimum} (found: {value})")
            if value is not None and value > maximum:
                problems.append(f"play.{name} must be at most {maximum} (found: {value})")
        for name, check in (
            ("style", lambda: self.style is None or get_style(self.style)),
            ("teacher", lambda: get_seeded_teacher(self.teacher)),
            ("seed", lambda: play_seeds(1, self.seed)),
        ):
            try:
                check()
            except ValueError as error:
                problems.append(f"play.{name}: {error}")
        if problems:
            raise UserError("; ".join(problems))

    def loop(self, grid_size: int) -> dict[str, Any]:
        """Return the options of ``play_games`` for a grid size."""
        return {
            "grid_size": grid_size,
            "max_steps": self.max_steps,
            "max_steps_without_apple": self.max_steps_without_apple or starvation_cap(grid_size),
            "teacher": self.teacher,
            "batch_size": self.batch_size,
        }
