"""Interfaces of everything that reports a run: dashboards show it, run loggers are dashboards with a location.

``SampleRows`` passes a ``Validation`` to every dashboard at each validation; ``PlayEvaluation`` and the end of a run
pass games. A logger or callback of the trainer is a dashboard if it implements ``Dashboard``: ``RunRecord`` (files and
``report.html``), Weights & Biases, TensorBoard.
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
    """Results of a completed run.

    Attributes:
        adapter_dir: Directory of the saved adapter.
        metadata: Metadata of the adapter, as plain JSON.
        data_paths: Files that it was trained on.
        data_summary: Summary of the data module.
    """

    adapter_dir: Path
    metadata: Mapping[str, Any]
    data_paths: Sequence[Path]
    data_summary: Mapping[str, Any]


@runtime_checkable
class Dashboard(Protocol):
    """Shows validations, games and the outcome of a run. Only rank zero calls it."""

    def show_validation(self, validation: Validation) -> None:
        """Show a validation."""

    def show_games(self, result: PlayerResult, step: int, *, is_final: bool) -> None:
        """Show games.

        Args:
            result: Games of the model.
            step: Number of optimizer steps before the games.
            is_final: Whether these are the games of the saved adapter at the end of the run.
        """

    def show_outcome(self, outcome: RunOutcome) -> None:
        """Show the results of a completed run."""


@runtime_checkable
class RunLogger(Protocol):
    """Logger that is attached to the run directory and reports where it logs.

    Attributes:
        label: Name of the logger in the summary of a run.
        package: Package that it needs.
    """

    label: str
    package: str

    def attach(self, paths: RunPaths, name: str) -> None:
        """Set the paths and the name of the run, before anything is logged."""

    @property
    def location(self) -> str:
        """URL, or the command that shows what was logged."""

    def finish(self) -> None:
        """Write pending data and close; nothing is logged afterwards."""


def require_package(package: str) -> None:
    """Check that the package of an optional logger is installed.

    Args:
        package: Name of the package, which is also the name of the config and of the extra.

    Raises:
        UserError: If it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{package}.yaml needs {package}: pip install 'snake_lora_pl[{package}]'.")


def dashboards(trainer: pl.Trainer) -> list[Dashboard]:
    """Return the dashboards of a trainer on rank zero, and none on other ranks."""
    parts: list[Any] = [*trainer.loggers, *trainer.callbacks]  # type: ignore[attr-defined]
    return [part for part in parts if isinstance(part, Dashboard)] if trainer.is_global_zero else []
