"""A run in TensorBoard: metrics, and sample rows, confusion of moves and games as text."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from snake_lora_pl.evaluation.dashboard import RunOutcome, require_package
from snake_lora_pl.evaluation.distributed import PlayerResult
from snake_lora_pl.evaluation.validations import MOVES, NO_MOVE, Validation
from snake_lora_pl.paths import RunPaths, display_path
from snake_lora_pl.reporting.games_file import best_median_worst
from snake_lora_pl.reporting.table import players_in, table_rows


class RunTensorBoardLogger(TensorBoardLogger):
    """Lightning's ``TensorBoardLogger`` in the run's directory, which shows what a ``Dashboard`` is given.

    Args:
        save_dir: Directory of the event files; None takes ``tensorboard/`` in the run's.

    Raises:
        UserError: If TensorBoard is not installed.
    """

    label = "TensorBoard"
    package = "tensorboard"

    def __init__(self, save_dir: str | None = None) -> None:
        require_package(self.package)
        super().__init__(save_dir or "tensorboard", name="", version="", default_hp_metric=False)
        self._is_placed = save_dir is not None

    def attach(self, paths: RunPaths, name: str) -> None:
        """Take the run's directory where none was given."""
        if not self._is_placed:
            self._root_dir = str(paths.tensorboard_dir)

    @property
    def location(self) -> str:
        """The command that shows it."""
        return f"tensorboard --logdir {display_path(self.log_dir)}"

    def finish(self) -> None:
        """Write what is left."""
        self.finalize("success")

    @rank_zero_only
    def show_validation(self, validation: Validation) -> None:
        """The sample rows, and the confusion of moves as a table."""
        for place, row in enumerate(validation.rows):
            wrong = ", ".join(name for name, is_true in row.claims.items() if not is_true)
            verdict = (
                f"move right: {_said(row.is_right)}, legal: {_said(row.is_legal)}, wrong claims: {wrong or 'none'}"
            )
            parts = (("model", row.words), ("teacher", row.teacher), ("prompt", row.prompt))
            text = "\n\n".join([verdict, *(f"{label}:\n\n{_verbatim(words)}" for label, words in parts)])
            self.experiment.add_text(f"val/sample_rows/{place}", text, validation.step)
        if validation.decisions is not None:
            rows = [[name, *map(str, counts)] for name, counts in zip(MOVES, validation.decisions, strict=True)]
            self.experiment.add_text("val/moves", _table(["teacher", *MOVES, NO_MOVE], rows), validation.step)

    @rank_zero_only
    def show_games(self, result: PlayerResult, step: int, *, is_final: bool) -> None:
        """The best, the median and the worst game, move by move."""
        prefix = "final_games" if is_final else "games"
        three = best_median_worst(result.games, lambda game: (game.num_apples, game.num_steps, game.seed))
        for which, game in three.items():
            head = f"{game.num_apples} apples in {game.num_steps} steps, {game.end.value}"
            words = "\n".join(f"{i}. {frame.completion}" for i, frame in enumerate(game.recording.frames))
            self.experiment.add_text(f"{prefix}/{which}", f"{head}\n\n{_verbatim(words)}", step)

    @rank_zero_only
    def show_outcome(self, outcome: RunOutcome) -> None:
        """The table of players."""
        if outcome.metadata["play"]:
            players = players_in(outcome.metadata["play"])
            rows = [[label.strip(), *cells] for label, cells in table_rows(list(players.values()))]
            self.experiment.add_text("final_games/players", _table(["", *players], rows), outcome.metadata["step"])


def _said(value: bool | None) -> str:
    return "unknown" if value is None else "yes" if value else "no"


def _verbatim(text: str) -> str:
    """Markdown that shows a text as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
