"""What a run has to show beside its scalar metrics, and who may show it.

It is made once: ``SampleRows`` makes a ``Validation`` at each validation, ``PlayEvaluation`` and the end of a run play
games. Every logger and callback of the trainer that is a ``Dashboard`` gets the same: files and ``report.html``
(``RunRecord``), Weights & Biases, TensorBoard.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import lightning.pytorch as pl

from snake_lora_pl.errors import UserError
from snake_lora_pl.evaluation.distributed import PlayerResult
from snake_lora_pl.evaluation.validations import Validation
from snake_lora_pl.paths import RunPaths


class RunOutcome(NamedTuple):
    """What is there when a run has ended well.

    Attributes:
        adapter_dir: The adapter it kept.
        metadata: What is known of the adapter, as plain JSON.
        data_paths: The files it was trained on.
        data_summary: What the data module says of them.
    """

    adapter_dir: Path
    metadata: Mapping[str, Any]
    data_paths: Sequence[Path]
    data_summary: Mapping[str, Any]


@runtime_checkable
class Dashboard(Protocol):
    """Shows a run somewhere. Only the first process calls it."""

    def show_validation(self, validation: Validation) -> None:
        """Show what a validation brought."""

    def show_games(self, result: PlayerResult, step: int, *, is_final: bool) -> None:
        """Show games.

        Args:
            result: The model's games.
            step: Optimizer steps done when they were played.
            is_final: Whether these are the games that the run ends with, by the adapter that was kept.
        """

    def show_outcome(self, outcome: RunOutcome) -> None:
        """Show what a run that ended well has left."""


@runtime_checkable
class RunLogger(Protocol):
    """A logger that a run tells of itself and that tells of its own place; ``package`` is what it needs installed."""

    label: str
    package: str

    def attach(self, paths: RunPaths, name: str) -> None:
        """Take the run's places, and a name for it, before anything is logged."""

    @property
    def location(self) -> str:
        """An address, or the command that shows what was logged."""

    def finish(self) -> None:
        """Write what is left; nothing comes after."""


def require_package(package: str) -> None:
    """Make sure that the package of an optional place to show a run is there.

    Args:
        package: Its name, and that of the overlay and the extra.

    Raises:
        UserError: If it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{package}.yaml needs {package}: pip install 'snake_lora_pl[{package}]'.")


def dashboards(trainer: pl.Trainer) -> list[Dashboard]:
    """Everything that shows the run of a trainer; nothing in all processes but the first."""
    parts: list[Any] = [*trainer.loggers, *trainer.callbacks]  # type: ignore[attr-defined]
    return [part for part in parts if isinstance(part, Dashboard)] if trainer.is_global_zero else []
