"""Logging of a run to TensorBoard: metrics, and sample rows, confusion matrix and games as text."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from lightning.pytorch.loggers import TensorBoardLogger
from lightning_utilities.core.rank_zero import rank_zero_only

from snake_lora_pl.evaluation.dashboard import RunOutcome, require_package
from snake_lora_pl.evaluation.distributed import PlayerResult
from snake_lora_pl.evaluation.validations import MOVES, NO_MOVE, Validation
from snake_lora_pl.paths import RunPaths, display_path
from snake_lora_pl.reporting.games_file import best_median_worst
from snake_lora_pl.reporting.table import format_bool, players_in, table_rows


class RunTensorBoardLogger(TensorBoardLogger):
    """Lightning's ``TensorBoardLogger`` in the run directory that is also a ``Dashboard``.

    Args:
        save_dir: Directory of the event files; None uses ``tensorboard/`` in the run directory.

    Raises:
        UserError: If TensorBoard is not installed.
    """

    label = "TensorBoard"
    package = "tensorboard"

    def __init__(self, save_dir: str | None = None) -> None:
        require_package(self.package)
        self._has_save_dir = save_dir is not None
        self._init(save_dir or "tensorboard")

    def _init(self, save_dir: str) -> None:
        super().__init__(save_dir, name="", version="", default_hp_metric=False)

    def attach(self, paths: RunPaths, name: str) -> None:
        """Set the directory of the event files, unless the constructor was given one."""
        if not self._has_save_dir:
            self._init(str(paths.tensorboard_dir))

    @property
    def location(self) -> str:
        """Command that opens TensorBoard on this run."""
        return f"tensorboard --logdir {shlex.quote(display_path(self.log_dir))}"

    def finish(self) -> None:
        """Write and close the event file."""
        self.finalize("success")

    @rank_zero_only
    def show_validation(self, validation: Validation) -> None:
        """Log the sample rows, and the confusion matrix of moves as a table."""
        for index, row in enumerate(validation.rows):
            wrong = ", ".join(name for name, is_true in row.claims.items() if not is_true) or "none"
            verdict = (
                f"right move: {format_bool(row.is_right)}, legal move: {format_bool(row.is_legal)}, "
                f"wrong claims: {wrong}"
            )
            parts = (("model", row.completion), ("teacher", row.target), ("prompt", row.prompt))
            text = "\n\n".join([verdict, *(f"{label}:\n\n{_code_block(content)}" for label, content in parts)])
            self.experiment.add_text(f"val/sample_rows/{index}", text, validation.step)
        if validation.decisions is not None:
            rows = [[name, *map(str, counts)] for name, counts in zip(MOVES, validation.decisions, strict=True)]
            self.experiment.add_text("val/moves", _markdown_table(["teacher", *MOVES, NO_MOVE], rows), validation.step)

    @rank_zero_only
    def show_games(self, result: PlayerResult, step: int, *, is_final: bool) -> None:
        """Log the completions of the best, median and worst game."""
        prefix = "final_games" if is_final else "games"
        games = best_median_worst(result.games, lambda game: (game.num_apples, game.num_steps, game.seed))
        for which, game in games.items():
            summary = f"{game.num_apples} apples in {game.num_steps} steps, {game.end.value}"
            completions = "\n".join(f"{i}. {frame.completion}" for i, frame in enumerate(game.recording.frames))
            self.experiment.add_text(f"{prefix}/{which}", f"{summary}\n\n{_code_block(completions)}", step)

    @rank_zero_only
    def show_outcome(self, outcome: RunOutcome) -> None:
        """Log the table of players."""
        if outcome.metadata["play"]:
            players = players_in(outcome.metadata["play"])
            rows = [[label.strip(), *cells] for label, cells in table_rows(list(players.values()))]
            text = _markdown_table(["", *players], rows)
            self.experiment.add_text("final_games/players", text, outcome.metadata["step"])


def _code_block(text: str) -> str:
    """Indent a text so that Markdown shows it verbatim."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
