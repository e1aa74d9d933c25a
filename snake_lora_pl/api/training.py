"""Training in one call: the command ``fit`` with its options as arguments and its results as values."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import override

from snake_lora_pl.adapters import store
from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.cli.app import SnakeCLI
from snake_lora_pl.cli.run import run_cli
from snake_lora_pl.console import suppress_library_output
from snake_lora_pl.errors import UserError
from snake_lora_pl.paths import RunPaths
from snake_lora_pl.training.callbacks.adapter_checkpoint import AdapterCheckpoint
from snake_lora_pl.training.callbacks.interruption import Interrupted

DEFAULT_CONFIG = "balanced.yaml"


@dataclass(frozen=True)
class TrainingResult:
    """Files and metrics of a finished run; every path is absolute.

    Attributes:
        run_dir: Directory of the run.
        adapter_dir: The best adapter by ``checkpoint.monitor``, for ``load_player`` and PEFT.
        checkpoint_path: State to resume from, with ``training_config={"ckpt_path": ...}``.
        config_path: The resolved config, for ``fit --config``.
        metrics_path: Every logged metric, one row per step.
        games_dir: The final games; None if ``play.final_games`` is 0 or no games could be played.
        num_steps: Optimizer steps of the run.
        adapter_step: Optimizer steps after which the adapter in ``adapter_dir`` was saved.
        metrics: Metrics of that adapter, such as ``val/loss``.
        play: Statistics of the final games by player, as in ``games/table.json``; empty without games.
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
    """Train an adapter on rows written by heuristics, as ``python -m snake_lora_pl fit`` does.

    The run is that of the command: config files, seed, run directory, checkpoints, early stopping, final games. Only
    the progress bar is printed; messages go to the logger ``snake_lora_pl``.

    Args:
        dataset_path: JSONL file, glob or several, with rows of ``prompt`` and ``completion``.
        adapter_config: Settings of the adapter, or the name of a preset; None leaves them to the config files.
        training_config: Other keys of ``fit``, by full name (``{"trainer.max_epochs": 3}``) or nested
            (``{"trainer": {"max_epochs": 3}}``), with plain values. ``config`` names the config files, as ``--config``
            does; the default is ``balanced.yaml``.

    Returns:
        The run's files and metrics.

    Raises:
        UserError: For every user error of the command, with its one-line message.
        KeyboardInterrupt: On Ctrl-C, after the step is finished and saved; the message says how to resume.

    Example:
        >>> train_on_heuristic_data("rows.jsonl", "lightweight", {"trainer.max_steps": 500})  # doctest: +SKIP
    """
    settings = _fit_settings(dataset_path, adapter_config, training_config or {})
    with suppress_library_output():
        try:
            run = run_cli({"fit": settings}, _Fit)
        except Interrupted as stop:
            if stop.signum != signal.SIGINT:
                raise
            hint = f'; resume with training_config={{"ckpt_path": "{stop.checkpoint_path}"}}'
            raise KeyboardInterrupt(f"{stop}{hint if stop.checkpoint_path else ''}") from stop
    checkpoint: AdapterCheckpoint = run.config_init[run.subcommand].checkpoint
    if checkpoint.adapter_dir is None or not checkpoint.adapter_dir.is_dir():
        raise UserError(
            "training_config: the run made no step, so there is no adapter. Raise trainer.max_steps, "
            "trainer.max_epochs or trainer.limit_train_batches."
        )
    # Absolute, because the program may change its working directory.
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
    """The command for a caller that reads values instead of output."""

    @override
    def before_instantiate_classes(self) -> None:
        trainer = self.options.trainer
        if trainer.fast_dev_run or trainer.enable_checkpointing is False:
            key = "fast_dev_run" if trainer.fast_dev_run else "enable_checkpointing"
            raise UserError(
                f"training_config: trainer.{key}={getattr(trainer, key)} writes no adapter, so there is no result to "
                "return. Remove the key, or use the command line."
            )
        super().before_instantiate_classes()

    @override
    def print_summary(self) -> None:
        """Print nothing: the caller gets the values."""


def _fit_settings(
    dataset_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    adapter_config: LoRAConfig | str | None,
    training_config: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the options of ``fit`` by full name."""
    if not isinstance(training_config, Mapping):
        raise UserError(f"training_config: a dict of fit's keys is needed, not {_described(training_config)}.")
    settings = dict(_flatten(training_config))
    configs = settings.pop("config", DEFAULT_CONFIG)
    names = [configs] if isinstance(configs, (str, os.PathLike)) else configs
    if not _are_paths(names):
        raise UserError(f"training_config: config must be a file name or a list of them, not {_described(configs)}.")
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
        if key in given or (adapter_config is not None and key == "model.lora"):
            argument = "dataset_path" if key == "data.train_path" else "adapter_config"
            raise UserError(f"training_config: {key} is set by the argument {argument}. Remove one of them.")
    options = {key: _plain_value(key, value) for key, value in {**settings, **given}.items()}
    return {**options, "config": [os.fspath(name) for name in names]}


def _are_paths(values: Any) -> bool:
    return isinstance(values, Sequence) and all(isinstance(value, (str, os.PathLike)) for value in values)


def _described(value: Any) -> str:
    return f"{value!r:.60} of type {type(value).__name__}"


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings by full name; a mapping below the key of a group is a value."""
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and "." not in name:
            yield from _flatten(value, f"{name}.")
        else:
            yield name, value


def _plain_value(key: str, value: Any) -> Any:
    """Return a value as a YAML config would hold it."""
    try:
        return json.loads(json.dumps(value, default=os.fspath))
    except TypeError as error:
        raise UserError(
            f"training_config: {key} holds an object of type {type(value).__name__}, but a config holds plain values "
            "only. To pass objects, build a lightning.Trainer."
        ) from error
