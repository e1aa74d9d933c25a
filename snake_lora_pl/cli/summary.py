"""Output at the end of a command: the games table, the files of a run, the next command."""

from __future__ import annotations

import dataclasses
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from rich.console import Console
from rich.text import Text

from snake_lora_pl.adapters import store
from snake_lora_pl.cli.parser import config_names
from snake_lora_pl.constants import DEFAULT_BASE_MODEL
from snake_lora_pl.data.datamodule import SnakeJSONLDataModule
from snake_lora_pl.errors import UserError
from snake_lora_pl.evaluation.dashboard import RunLogger, RunOutcome, dashboards
from snake_lora_pl.evaluation.match import Match
from snake_lora_pl.paths import RunPaths, display_path
from snake_lora_pl.program import PROG
from snake_lora_pl.reporting.html_report import write_report
from snake_lora_pl.reporting.table import difference_lines, render_table

logger = logging.getLogger(__name__)

_DASHBOARD_CONFIGS = ("wandb", "tensorboard")


def print_games(match: Match) -> None:
    """Print the table of a match."""
    is_terminal = sys.stdout.isatty()
    # A log file has no width; 80 columns would cut names.
    console = Console(width=None if is_terminal else 120, highlight=False, markup=False, emoji=False)
    console.print(f"\n{match.title}\n", soft_wrap=not is_terminal)
    if len(match.contestants) > 1:
        for contestant in match.contestants:
            print(f"{contestant.name}: {contestant.adapter_dir}, prompts in {contestant.prompt_spec.style}")
        print()
    console.print(render_table(match.results))
    print("", *difference_lines(match.results), sep="\n")


def print_run(paths: RunPaths, loggers: Sequence[Any], config: Namespace) -> None:
    """Print where the files of a finished run are, and the command that evaluates its adapter.

    Args:
        paths: The run.
        loggers: Loggers of its trainer.
        config: Options of ``fit``.
    """
    # A terminal wraps long lines itself, so that a path or the command can be copied whole.
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    console.print()
    files = [
        ("report", paths.report_path),
        ("metrics", paths.metrics_path),
        ("games", paths.games.games_dir),
        ("checkpoints", paths.checkpoints_dir),
        ("adapter", paths.artifacts_dir),
    ]
    lines = [(label, display_path(path)) for label, path in files if path.exists()]
    lines += [(log.label, log.location) for log in loggers if isinstance(log, RunLogger)]
    for label, location in lines:
        console.print(Text.assemble((f"{label:<12}", "bold"), location))
    command = [*PROG.split(), "test"]
    for name in config_names(config):
        command += ["--config", display_path(name)]
    command += [*_base_model_options(config), "--adapter", display_path(paths.artifacts_dir)]
    console.print(
        Text.assemble("Run directory: ", display_path(paths.run_dir), ". ", ("Next:", "bold"), " ", shlex.join(command))
    )


def _base_model_options(config: Namespace) -> list[str]:
    """Return the options that name the base model of a run, which its configs need not name."""
    model = config.model
    options = ["--model.base_model", str(model.base_model)] if model.base_model != DEFAULT_BASE_MODEL else []
    options += ["--model.revision", str(model.revision)] if model.revision is not None else []
    return [*options, *(["--model.trust_remote_code=true"] if model.trust_remote_code else [])]


def publish_outcome(paths: RunPaths, trainer: pl.Trainer, data: SnakeJSONLDataModule) -> None:
    """Show the result of a finished run on every dashboard and write its report; call this on rank 0 only."""
    if (paths.artifacts_dir / store.METADATA_FILE).is_file():
        metadata = dataclasses.asdict(store.read_metadata(paths.artifacts_dir))
        outcome = RunOutcome(paths.artifacts_dir, metadata, data.train_paths(), data.summary())
        for dashboard in dashboards(trainer):
            dashboard.show_outcome(outcome)
    try_write_report(paths)


def try_write_report(paths: RunPaths) -> None:
    """Write the report; log a warning if that fails, as the run itself has succeeded."""
    try:
        write_report(paths)
    except UserError as error:
        logger.warning("%s", error)


def run_name(paths: RunPaths, config: Namespace) -> str:
    """Return the name of a run on dashboards: preset, base model, adapter type and time."""
    presets = [Path(name).stem for name in config_names(config)]
    preset = "+".join(name for name in presets if name not in _DASHBOARD_CONFIGS)
    base = Path(str(config.model.base_model)).name
    started = paths.run_dir.parent.name[-len("YYYYmmdd_HHMMSS") :]
    return " ".join(part for part in (preset, base, config.model.adapter_type, started) if part)
