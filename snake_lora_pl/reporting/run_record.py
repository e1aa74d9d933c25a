"""RunRecord: what a run has to show, as files in its directory, from which ``report.html`` is made."""

from __future__ import annotations

import lightning.pytorch as pl

from snake_lora_pl.durable import explain_failed_writes
from snake_lora_pl.evaluation.dashboard import RunOutcome
from snake_lora_pl.evaluation.distributed import PlayerResult
from snake_lora_pl.evaluation.validations import Validation, add_validation, keep_validations
from snake_lora_pl.paths import RunPaths
from snake_lora_pl.reporting.games_file import write_games


class RunRecord(pl.Callback):
    """Writes each validation to ``validations.jsonl`` and the games played last to ``val_games.jsonl``.

    A run that goes on from a checkpoint drops what it is about to show again.

    Args:
        paths: The run's places.
    """

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop what lies ahead of the step that training goes on from."""
        path = self._paths.validations_path
        if trainer.is_global_zero and path.is_file():
            keep_validations(path, trainer.global_step)

    def show_validation(self, validation: Validation) -> None:
        """Add a line."""
        path = self._paths.validations_path
        with explain_failed_writes(path, "the sample rows"):
            add_validation(path, validation)

    def show_games(self, result: PlayerResult, step: int, *, is_final: bool) -> None:
        """Keep the games; those that a run ends with stand in ``games/``, beside the other players'."""
        if not is_final:
            with explain_failed_writes(self._paths.val_games_path, "the games"):
                write_games(self._paths.val_games_path, [result])

    def show_outcome(self, outcome: RunOutcome) -> None:
        """Nothing: the adapter's own directory says it."""
