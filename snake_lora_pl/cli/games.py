"""The games of ``test`` and of the end of ``fit``: which adapters play, how they are prompted, what is saved."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
from jsonargparse import Namespace

from snake_lora_pl.adapters import store
from snake_lora_pl.adapters.metadata import AdapterMetadata
from snake_lora_pl.data.encoding import TemplateName
from snake_lora_pl.durable import explain_failed_writes, open_durably
from snake_lora_pl.errors import UserError
from snake_lora_pl.evaluation.dashboard import dashboards
from snake_lora_pl.evaluation.match import ADAPTER, Contestant, Match, PromptSpec
from snake_lora_pl.game import STYLES
from snake_lora_pl.paths import GamesPaths, distinct_names
from snake_lora_pl.reporting.games_file import write_games, write_replays
from snake_lora_pl.reporting.table import table_json

logger = logging.getLogger(__name__)


def adapter_dirs(config: Namespace) -> list[str]:
    """Return the distinct adapter directories that a command was given."""
    given = config.adapter
    return [] if given is None else [given] if isinstance(given, str) else list(dict.fromkeys(given))


def use_trained_prompts(config: Namespace) -> list[Contestant]:
    """Return the adapters of a command, each with the prompts of its training.

    Replaces the template, its date and the grid size in ``config`` as well: they may describe the rows of another run.

    Raises:
        UserError: If an adapter cannot be read, or the adapters were trained on different grids.
    """
    dirs = adapter_dirs(config)
    metadata = [store.read_metadata(adapter_dir) for adapter_dir in dirs]
    templates = [_trained_template(*pair) for pair in zip(dirs, metadata, strict=True)]
    # validate and predict use one adapter; the base of test is prompted like the first.
    config.data.template = templates[0] or config.data.template
    dates = [entry.data.get("template_date") for entry in metadata]
    config.data.template_date = dates[0] or config.data.template_date
    grid_sizes = list(dict.fromkeys(entry.grid_size for entry in metadata if entry.grid_size is not None))
    if len(grid_sizes) > 1 and config.play.grid_size is None:
        sizes = " and ".join(f"{size}x{size}" for size in grid_sizes)
        raise UserError(f"the adapters were trained on {sizes} grids. Set --play.grid_size to play on one.")
    config.play.grid_size = config.play.grid_size or next(iter(grid_sizes), None)
    names = [ADAPTER] if len(dirs) == 1 else [f"{ADAPTER} {name}" for name in distinct_names(dirs)]
    styles = [config.play.style or entry.data.get("prompt_format") for entry in metadata]
    return [
        Contestant(name, PromptSpec(style if style in STYLES else None, template, date), adapter_dir)
        for name, style, template, date, adapter_dir in zip(names, styles, templates, dates, dirs, strict=True)
    ]


def _trained_template(adapter_dir: str, metadata: AdapterMetadata) -> str | None:
    template: str | None = metadata.data.get("template")
    known = get_args(TemplateName)
    if template is not None and template not in known:
        raise UserError(
            f"{Path(adapter_dir) / store.METADATA_FILE}: unknown data.template '{template}' (known: "
            f"{', '.join(known)}). The file is damaged: copy it again, or train again."
        )
    return template


def save_games(match: Match, trainer: pl.Trainer, base_model: str, paths: GamesPaths) -> None:
    """Write the table, the games and the replays of a match, and show them on every dashboard.

    Args:
        match: A match that was played; call this on rank 0 only.
        trainer: The trainer that ran it.
        base_model: Name of the base model.
        paths: Where to write.

    Raises:
        UserError: If a file cannot be written.
    """
    adapters = {
        contestant.name: {"directory": contestant.adapter_dir, **contestant.prompt_spec.known()}
        for contestant in match.contestants
    }
    table = table_json(match.results, {"base_model": base_model, **match.conditions}, adapters)
    with explain_failed_writes(paths.games_dir, "the games", then="play them again with the command test"):
        with open_durably(paths.table_path, "w", encoding="utf-8") as file:
            json.dump(table, file, indent=2)
        write_games(paths.games_path, match.results)
        replayed = [result for result in match.results if result.name in adapters] or match.results[:1]
        for result in replayed:
            write_replays(paths if len(replayed) == 1 else paths.of_player(result.name), result.games)
    _record_in_adapters(match.contestants, table)
    for dashboard in dashboards(trainer):
        dashboard.show_games(match.results[0], trainer.global_step, is_final=True)


def _record_in_adapters(contestants: Sequence[Contestant], table: dict[str, Any]) -> None:
    for name, _, adapter_dir in contestants:
        if adapter_dir is None:
            continue
        try:
            store.record_play(adapter_dir, table, name)
        except OSError as error:
            logger.warning("%s: the model card cannot be updated with the games (%s).", adapter_dir, error)
