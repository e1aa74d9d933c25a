"""How games are played that judge a model: the ``play`` group of a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from snake_lora_pl.errors import UserError
from snake_lora_pl.evaluation.game_loop import BATCH_SIZE
from snake_lora_pl.game import get_seeded_teacher, get_style
from snake_lora_pl.game.board import MAX_GRID_SIZE
from snake_lora_pl.game.game import starvation_cap
from snake_lora_pl.game.seeds import play_seeds

Reading: TypeAlias = Literal["generate", "score"]


@dataclass(frozen=True)
class PlaySettings:
    """How games are played that judge a model.

    Args:
        reading: How a move is read: generate lets the model write and reads its conclusion, score compares the four
            moves by likelihood where the style allows it.
        legal_mask: Whether test plays the adapter once more with illegal moves barred, as a player of its own; needs
            score.
        style: Format of the prompts. Without it, that of the rows trained on.
        grid_size: Cells along one side of the grid. Without it, that of the rows trained on.
        teacher: Teacher that moves are compared with, and that test plays beside the model.
        seed: Which games: another seed, other games. None of them is in any generated data set.
        max_steps: Steps after which a game ends. Without it there is no limit.
        max_steps_without_apple: Steps without an apple after which a game ends. Without it, four times the cells of the
            board.
        batch_size: Most games that are played at a time.
        val_games: Games to play while fitting; 0 for none. A completion is written for every move: with long ones this
            takes minutes on a CPU.
        every_n_epochs: Epochs between two times that games are played while fitting. The last validation always plays.
        test_games: Games of each player in the command test.
        final_games: Games that fit ends with, by the adapter it kept, the base model and test's other players; 0 for
            none.

    Raises:
        UserError: If a value is out of range, or a name unknown.
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
        """Check the values."""
        problems = []
        if self.reading not in ("generate", "score"):
            problems.append(f"play.reading must be generate or score, not '{self.reading}'")
        if self.legal_mask and self.reading != "score":
            problems.append("play.legal_mask=true needs play.reading=score: a mask compares moves, it does not write")
        least = {"grid_size": 2, "max_steps": 1, "max_steps_without_apple": 1, "batch_size": 1}
        least |= {"val_games": 0, "every_n_epochs": 1, "test_games": 1, "final_games": 0}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                problems.append(f"play.{name} must be at least {minimum} (found: {value})")
        if self.grid_size is not None and self.grid_size > MAX_GRID_SIZE:
            problems.append(f"play.grid_size must be at most {MAX_GRID_SIZE} (found: {self.grid_size})")
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
        """The settings of ``play_games`` on a grid."""
        return {
            "grid_size": grid_size,
            "max_steps": self.max_steps,
            "max_steps_without_apple": self.max_steps_without_apple or starvation_cap(grid_size),
            "teacher": self.teacher,
            "batch_size": self.batch_size,
        }
