"""Callback that stores validations and games in the run directory, as input of ``report.html``."""

from __future__ import annotations

import lightning.pytorch as pl
from typing_extensions import override

from snake_lora_pl.durable import explain_failed_writes
from snake_lora_pl.evaluation.dashboard import RunOutcome
from snake_lora_pl.evaluation.distributed import PlayerResult
from snake_lora_pl.evaluation.validations import Validation, add_validation, keep_validations
from snake_lora_pl.paths import RunPaths
from snake_lora_pl.reporting.games_file import write_games


class RunRecord(pl.Callback):
    """Appends each validation to ``validations.jsonl`` and writes the latest games to ``val_games.jsonl``.

    A resumed run drops the validations after its checkpoint, because it runs them again.

    Args:
        paths: Paths of the run directory.
    """

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        path = self._paths.validations_path
        if trainer.is_global_zero and path.is_file():
            keep_validations(path, trainer.global_step)

    def show_validation(self, validation: Validation) -> None:
        """Append a validation."""
        path = self._paths.validations_path
        with explain_failed_writes(path, "the sample rows"):
            add_validation(path, validation)

    def show_games(self, result: PlayerResult, step: int, *, is_final: bool) -> None:
        """Write the games. The command line writes the final games of all players to ``games/``."""
        if not is_final:
            with explain_failed_writes(self._paths.val_games_path, "the games"):
                write_games(self._paths.val_games_path, [result])

    def show_outcome(self, outcome: RunOutcome) -> None:
        """Do nothing: the adapter directory holds the outcome."""
