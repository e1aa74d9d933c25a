"""Training in one call: the command ``fit`` with its options as arguments, and its results as values."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snake_lora_pl.adapters import store
from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.cli.app import SnakeCLI, build_and_run
from snake_lora_pl.console import suppress_library_output
from snake_lora_pl.errors import UserError
from snake_lora_pl.paths import RunPaths
from snake_lora_pl.training.callbacks.adapter_checkpoint import AdapterCheckpoint
from snake_lora_pl.training.callbacks.interruption import Interrupted

DEFAULT_CONFIG = "balanced.yaml"


@dataclass(frozen=True)
class TrainingResult:
    """What a run left behind; every path is absolute.

    Attributes:
        run_dir: Directory of the run.
        adapter_dir: The adapter that was best by ``checkpoint.monitor``; ``load_player`` and PEFT load it.
        checkpoint_path: State to go on from, with ``training_config={"ckpt_path": ...}``.
        config_path: The resolved config, which ``fit --config`` runs again.
        metrics_path: Every logged metric, a row a step.
        games_dir: Games played at the end; None where ``play.final_games`` is 0 or no games could be played.
        num_steps: Optimizer steps of the run.
        adapter_step: Those that the adapter in ``adapter_dir`` has behind it.
        metrics: Metrics of that adapter, ``val/loss`` among them.
        play: Figures of each player of the games at the end, as in ``games/table.json``; empty without games.
    """

    run_dir: Path
    adapter_dir: Path
    checkpoint_path: Path
    config_path: Path
    metrics_path: Path
    games_dir: Path | None
    num_steps: int
    adapter_step: int
    metrics: dict[str, float]
    play: dict[str, dict[str, float]]


def train_on_heuristic_data(
    dataset_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    adapter_config: LoRAConfig | str | None = None,
    training_config: Mapping[str, Any] | None = None,
) -> TrainingResult:
    """Train an adapter on rows that heuristics wrote, as ``python -m snake_lora_pl fit`` does.

    It is the same run: config files, seed, run directory, checkpoints, early stopping, games at the end. Nothing is
    printed but the progress bar; what there is to say goes to the logger ``snake_lora_pl``.

    Args:
        dataset_path: Rows with ``prompt`` and ``completion``: a JSONL file, a glob or several.
        adapter_config: The adapter's settings, or the name of a preset; None leaves them to the config files.
        training_config: Any other key of ``fit``, by its full name (``{"trainer.max_epochs": 3}``) or nested
            (``{"trainer": {"max_epochs": 3}}``), with plain values. ``config`` names the config files to start from,
            as ``--config`` takes them; without it ``balanced.yaml``.

    Returns:
        Where everything lies, and the metrics.

    Raises:
        UserError: For whatever is a mistake on the command line, with its one line.
        KeyboardInterrupt: On Ctrl-C, when the step is finished and saved; it says how to go on.

    Example:
        >>> train_on_heuristic_data("rows.jsonl", "lightweight", {"trainer.max_steps": 500})  # doctest: +SKIP
    """
    arguments = _arguments(dataset_path, adapter_config, training_config or {})
    with suppress_library_output():
        try:
            run = build_and_run(arguments, _Fit)
        except Interrupted as stop:
            if stop.signum != signal.SIGINT:
                raise
            way_on = (
                f'; training_config={{"ckpt_path": "{stop.checkpoint_path}"}} goes on' if stop.checkpoint_path else ""
            )
            raise KeyboardInterrupt(f"{stop}{way_on}") from stop
    checkpoint: AdapterCheckpoint = run.config_init[run.subcommand].checkpoint
    assert run.run_paths is not None
    assert checkpoint.adapter_dir is not None
    if not checkpoint.adapter_dir.is_dir():
        raise UserError(
            "training_config: the run had no step to take, so there is no adapter. Raise trainer.max_steps, "
            "trainer.max_epochs or trainer.limit_train_batches."
        )
    # A program may change its working directory; a result stays true.
    paths = RunPaths(run.run_paths.run_dir.absolute())
    metadata = store.read_metadata(checkpoint.adapter_dir)
    return TrainingResult(
        run_dir=paths.run_dir,
        adapter_dir=checkpoint.adapter_dir.absolute(),
        checkpoint_path=Path(checkpoint.last_model_path).absolute(),
        config_path=paths.config_path,
        metrics_path=paths.metrics_path,
        games_dir=paths.games.games_dir if run.match is not None else None,
        num_steps=run.trainer.global_step,
        adapter_step=metadata.step,
        metrics=metadata.metrics,
        play={player.name: player.statistics() for player in run.match.results} if run.match is not None else {},
    )


class _Fit(SnakeCLI):
    """The verb for a caller who reads values, not output."""

    def before_instantiate_classes(self) -> None:
        """Refuse a run that would leave nothing to return."""
        trainer = self.config[self.subcommand].trainer
        if trainer.fast_dev_run or trainer.enable_checkpointing is False:
            key = "fast_dev_run" if trainer.fast_dev_run else "enable_checkpointing"
            raise UserError(
                f"training_config: trainer.{key}={getattr(trainer, key)} writes no adapter, so there would be no "
                "result. Leave it out, or run it from the command line."
            )
        super().before_instantiate_classes()

    def say_what_came_out(self, paths: RunPaths) -> None:
        """Nothing: it is returned."""


def _arguments(
    dataset_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    adapter_config: LoRAConfig | str | None,
    training_config: Mapping[str, Any],
) -> list[str]:
    """The command line that says the same."""
    if not isinstance(training_config, Mapping):
        raise UserError(f"training_config: a dict of fit's keys is needed, not {_described(training_config)}.")
    settings = dict(_flat(training_config))
    configs = settings.pop("config", DEFAULT_CONFIG)
    names = [configs] if isinstance(configs, (str, os.PathLike)) else configs
    if not _are_paths(names):
        raise UserError(f"training_config: config names files, one or a list; it is {_described(configs)}.")
    dataset_paths = [dataset_path] if isinstance(dataset_path, (str, os.PathLike)) else dataset_path
    if not _are_paths(dataset_paths):
        # Without any, `fit` would generate rows.
        raise UserError(
            f"dataset_path: a JSONL file, a glob or a list of them is needed, not {_described(dataset_path)}."
        )
    given: dict[str, Any] = {"data.train_path": dataset_path}
    if adapter_config is not None:
        if isinstance(adapter_config, str):
            adapter_config = LoRAConfig.preset(adapter_config)
        if not isinstance(adapter_config, LoRAConfig):
            raise UserError(
                f"adapter_config: a LoRAConfig or the name of a preset is needed, not {_described(adapter_config)}."
            )
        given |= {f"model.lora.{name}": value for name, value in dataclasses.asdict(adapter_config).items()}
    for key in settings:
        owner = "dataset_path" if key == "data.train_path" else "adapter_config"
        if key in given or (adapter_config is not None and key == "model.lora"):
            raise UserError(f"training_config: {key} is what the argument {owner} says. Leave one of them out.")
    options = {**settings, **given}
    return [
        "fit",
        *(f"--config={os.fspath(name)}" for name in names),
        *(f"--{key}={_text(key, value)}" for key, value in options.items()),
    ]


def _are_paths(values: Any) -> bool:
    return isinstance(values, Sequence) and all(isinstance(value, (str, os.PathLike)) for value in values)


def _described(value: Any) -> str:
    return f"{value!r:.60} of type {type(value).__name__}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings by their full names; what lies deeper than a group's key is a value."""
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and "." not in name:
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _text(key: str, value: Any) -> str:
    """A value as a command line has it."""
    if isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    try:
        return json.dumps(value, default=os.fspath)
    except TypeError as error:
        raise UserError(
            f"training_config: {key} holds an object of type {type(value).__name__}; only plain values have a place in "
            "a config. For objects build a lightning.Trainer, as the README shows."
        ) from error
