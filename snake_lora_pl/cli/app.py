"""LightningCLI subclass of the training commands: wires data, training, evaluation and reporting together."""

from __future__ import annotations

import contextlib
import logging
import os
import pkgutil
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from snake_lora_pl.adapters import store
from snake_lora_pl.cli import dry_run, games, summary
from snake_lora_pl.cli.argparse_internals import parser_actions
from snake_lora_pl.cli.parser import OneLineParser, ShippedConfigFile, append_repeated, raise_user_error
from snake_lora_pl.cli.run_directory import locked_run, resolve_run
from snake_lora_pl.cli.trainer_errors import check_constructors, explain_trainer_error
from snake_lora_pl.data.datamodule import SnakeJSONLDataModule
from snake_lora_pl.data.loaders import max_processes
from snake_lora_pl.errors import UserError
from snake_lora_pl.evaluation.callbacks.play_evaluation import PlayEvaluation
from snake_lora_pl.evaluation.callbacks.prediction_writer import PredictionWriter
from snake_lora_pl.evaluation.callbacks.sample_rows import SampleRows
from snake_lora_pl.evaluation.dashboard import RunLogger, require_package
from snake_lora_pl.evaluation.match import Contestant, Match
from snake_lora_pl.evaluation.player_factory import GamePromptCheck, find_style
from snake_lora_pl.evaluation.settings import PlaySettings
from snake_lora_pl.imitation.callback import Imitation
from snake_lora_pl.imitation.settings import ImitationSettings
from snake_lora_pl.paths import GamesPaths, RunPaths, display_path
from snake_lora_pl.program import LIGHTNING_COMMANDS, PROG, is_rank_zero
from snake_lora_pl.reporting.run_record import RunRecord
from snake_lora_pl.training.callbacks.adapter_checkpoint import AdapterCheckpoint, find_adapter_checkpoint
from snake_lora_pl.training.callbacks.adapter_norms import AdapterNorms
from snake_lora_pl.training.callbacks.auto_batch_size import AutoBatchSize
from snake_lora_pl.training.callbacks.interruption import Interruption
from snake_lora_pl.training.callbacks.progress_bar import RunProgressBar
from snake_lora_pl.training.callbacks.run_config import ResolvedConfig, config_text
from snake_lora_pl.training.callbacks.supported import check_supported
from snake_lora_pl.training.callbacks.token_throughput import TokenThroughput
from snake_lora_pl.training.callbacks.untrained_layers import UntrainedLayers
from snake_lora_pl.training.checks import check_precision
from snake_lora_pl.training.lightning_internals import LightningCLIInternals, forks_or_spawns
from snake_lora_pl.training.memory.out_of_memory import explain_out_of_memory
from snake_lora_pl.training.metrics_csv import MetricsCSVLogger
from snake_lora_pl.training.module import LoRALightningModule

logger = logging.getLogger(__name__)

# Arguments of the trainer's methods that are not options. Checkpoints are always read without pickle, so `weights_only`
# is not one; --adapter names an adapter.
_OF_EVALUATION = {"model", "dataloaders", "datamodule", "ckpt_path", "verbose", "weights_only"}
_SKIPPED_ARGUMENTS = {
    "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
    "validate": _OF_EVALUATION,
    "test": _OF_EVALUATION,
    "predict": _OF_EVALUATION | {"return_predictions"},
}


class SnakeCLI(LightningCLIInternals):
    """The commands fit, validate, test and predict over one module and one data module.

    The constructor parses the arguments and runs the command.

    Args:
        args: The command and its options, as strings or as ``{command: {key: value}}``; in a dict the key ``config``
            holds the names of config files. None is for ``build_parsers``.
        resources: Receives what must be released when the command ends.

    Attributes:
        commands: The commands to build parsers for: all of the class, or the one in ``args``.
        match: The games at the end of ``fit`` or of ``test``, if any were played.
    """

    commands: tuple[str, ...] = tuple(_SKIPPED_ARGUMENTS)
    match: Match | None = None

    def __init__(
        self,
        args: Sequence[str] | Mapping[str, Mapping[str, Any]] | None,
        resources: contextlib.ExitStack | None = None,
    ) -> None:
        self._resources = resources or contextlib.ExitStack()
        self._run_paths: RunPaths | None = None
        self._contestants: Sequence[Contestant] = ()
        if args is not None:
            # Building the parser of a command takes longer than parsing.
            self.commands = (next(iter(args)),)
        super().__init__(
            LoRALightningModule,
            SnakeJSONLDataModule,
            args=args,  # type: ignore[arg-type,unused-ignore]
            parser_class=OneLineParser,
            seed_everything_default=42,
            auto_configure_optimizers=False,
            save_config_callback=ResolvedConfig,
            save_config_kwargs={"save_to_log_dir": False},
            load_from_checkpoint_support=False,
            trainer_defaults={"use_distributed_sampler": False},
            parser_kwargs=self.parser_settings(),
        )

    def parser_settings(self) -> dict[str, Any]:
        """Return the constructor arguments of the parser of all commands, and by command those of its parser."""
        return {"prog": PROG, "description": "Train a language model to play Snake from written heuristics."} | {
            command: {
                "command": command,
                "description": LIGHTNING_COMMANDS[command],
                "usage": f"{PROG} {command} [options]",
            }
            for command in self.commands
        }

    @override
    # Lightning calls this static method of its class on the instance.
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        return {command: _SKIPPED_ARGUMENTS[command] for command in self.commands}

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = OneLineParser(**kwargs)
        parser.add_argument(
            "-c", "--config", action=ShippedConfigFile, help="Config by path or shipped name; several compose."
        )
        for action in parser_actions(parser):
            if "--print_config" in action.option_strings:
                # The flag `comments` exists only where ruamel.yaml is installed; the help must not depend on that.
                action.help = str(action.help).replace(" comments,", "")
        return parser

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--root", type=str, default=".", help="Directory whose logs/ holds the runs.")
        parser.add_argument("--adapter_name", type=str, default="snake_reasoning", help="Name of the run's directory.")
        parser.add_argument(
            "--adapter",
            type=str | list[str] | None,
            default=None,
            help="Adapter directory to start from or to evaluate; test takes several: --adapter A --adapter B.",
        )
        if isinstance(parser, OneLineParser) and parser.command == "test":
            parser.add_argument("--games", type=int | None, default=None, help="Short form of --play.test_games.")
        parser.add_argument(
            "--num_sample_rows",
            type=int,
            default=8,
            help="Validation rows that the model completes at each validation of fit, the same each time; 0 for none.",
        )
        parser.add_argument(
            "--dry_run",
            action="store_true",
            help="fit: print config, data, memory, one step and the paths of the run's files; write nothing.",
        )
        parser.add_class_arguments(PlaySettings, "play")
        parser.add_class_arguments(ImitationSettings, "imitate")
        parser.add_lightning_class_args(AdapterCheckpoint, "checkpoint")
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        parser.set_defaults(
            {
                "early_stopping.monitor": "val/loss",
                "early_stopping.patience": 5,
                # The monitored metric is logged by validations, not at the end of a training epoch.
                "early_stopping.check_on_train_epoch_end": False,
                "model.text_metrics": {"class_path": "snake_lora_pl.evaluation.metrics.SnakeMoveMetrics"},
            }
        )
        parser.link_arguments("adapter", "model.adapter_path", compute_fn=_first)
        for key in ("base_model", "revision", "trust_remote_code"):
            parser.link_arguments(f"model.{key}", f"data.{key}")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        if args is None:
            raise _ParsersBuilt({command: self.command_parser(command) for command in self.commands})
        if isinstance(args, Mapping):
            self.config = _parse_settings(parser, args)
        else:
            with warnings.catch_warnings():
                # The launcher of further ranks repeats sys.argv, so it is set as well as `args`.
                warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
                super().parse_arguments(parser, append_repeated(list(args), "--adapter"))
        command = self.config["subcommand"]
        seed = self.config[command].seed_everything
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise UserError(f"seed_everything must be between 0 and {2**32 - 1:,} (found: {seed})")
        try:
            # Parsing accepts null in a config for every type.
            self.command_parser(command).validate(self.config[command], skip_unset=False)
        except (TypeError, KeyError) as error:
            parser.error(str(error), error)

    @property
    def options(self) -> Namespace:
        """Parsed options of the command."""
        options: Namespace = self.config[self.subcommand]
        return options

    @property
    def run_paths(self) -> RunPaths:
        """The run that ``fit`` writes."""
        if self._run_paths is None:
            raise RuntimeError(f"the command {self.subcommand} has no run directory")
        return self._run_paths

    @override
    def before_instantiate_classes(self) -> None:
        """Check options that depend on the command, and resolve the run directory or the adapters."""
        config = self.options
        if not re.fullmatch(r"[\w][\w.-]*", config.adapter_name):
            raise UserError(f"--adapter_name '{config.adapter_name}': use letters, digits, '.', '_' and '-' only.")
        if config.dry_run and self.subcommand != "fit":
            raise UserError(f"--dry_run is for fit; {self.subcommand} does not support it. Remove the flag.")
        if self.subcommand != "test" and len(games.adapter_dirs(config)) > 1:
            raise UserError(f"{self.subcommand} takes one --adapter; only test plays several against each other.")
        if self.subcommand == "fit":
            self._run_paths = resolve_run(config)
            if is_rank_zero() and not config.dry_run:
                self._resources.enter_context(locked_run(self._run_paths, config))
        elif config.adapter is not None:
            self._contestants = games.use_trained_prompts(config)
        if self.subcommand == "test" and config.games is not None:
            config.play.test_games = config.games

    @override
    def instantiate_classes(self) -> None:
        """Create the module, the data module and the trainer.

        Raises:
            UserError: If one of them raised it; jsonargparse wraps it in another error.
        """
        # jsonargparse hides the reason why an item of a list cannot be created, so a missing package is reported here.
        configured = self.options.trainer.logger
        for run_logger in configured if isinstance(configured, list) else [configured]:
            class_path = getattr(run_logger, "class_path", "")
            if class_path.startswith("snake_lora_pl.reporting."):
                require_package(pkgutil.resolve_name(class_path).package)
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise_user_error(error)
            check_constructors(self.options)
            raise

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create the trainer with the logger and the callbacks of the command."""
        config = self.config_init[self.subcommand]
        trainer_config = {**config.trainer, **kwargs, "enable_model_summary": False}
        check_precision(trainer_config["precision"])
        # Lightning checks these in the first step, after the model is loaded.
        for name in ("accumulate_grad_batches", "check_val_every_n_epoch"):
            if (found := trainer_config[name]) is not None and found < 1:
                raise UserError(f"trainer.{name} must be at least 1 (found: {found})")
        configured = trainer_config["callbacks"] or []
        configured = configured if isinstance(configured, list) else [configured]
        check_supported(configured)
        callbacks: list[Callback] = [Interruption()]
        if config.dry_run:
            trainer_config |= dry_run.TRAINER_SETTINGS
            configured = []
        elif self.subcommand == "fit":
            trainer_config["logger"] = self._loggers(trainer_config["logger"])
            # SLURM's requeue checkpoint goes there; outside the run directory another run would find it.
            trainer_config["default_root_dir"] = trainer_config["default_root_dir"] or str(self.run_paths.run_dir)
            callbacks += self._fit_callbacks(config)
            if trainer_config["enable_checkpointing"] is not False:
                # Before other checkpoint callbacks, whose directories it chooses.
                configured = [config.checkpoint, *configured]
        else:
            trainer_config |= {"logger": False, "enable_checkpointing": False}
            # The config of a run names its callbacks; there are no checkpoints here.
            configured = [callback for callback in configured if not isinstance(callback, Checkpoint)]
        has_bar = any(isinstance(callback, ProgressBar) for callback in configured)
        if trainer_config["enable_progress_bar"] is not False and not has_bar:
            callbacks.insert(0, RunProgressBar())
        if config.dry_run or self.subcommand != "fit":
            self.save_config_callback = None
        trainer_config["callbacks"] = configured
        try:
            trainer = self.build_trainer(trainer_config, callbacks)
        except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
            raise explain_trainer_error(trainer_config, error) from error
        _check_ranks(trainer)
        return trainer

    def _fit_callbacks(self, config: Namespace) -> list[Callback]:
        callbacks = [
            AutoBatchSize(config.ckpt_path),
            TokenThroughput(),
            AdapterNorms(),
            UntrainedLayers(),
            config.early_stopping,
            SampleRows(config.num_sample_rows),
            RunRecord(self.run_paths),
        ]
        if config.play.val_games or config.play.final_games:
            callbacks.append(GamePromptCheck(config.play))
        if config.play.val_games:
            callbacks.append(PlayEvaluation(config.play))
        if config.imitate.every_n_steps:
            callbacks.append(Imitation(config.imitate, config.play, self.run_paths))
        return callbacks

    def _loggers(self, configured: Any) -> list[Any]:
        if configured is None or isinstance(configured, bool):
            configured = []
        extra = configured if isinstance(configured, list) else [configured]
        for run_logger in extra:
            if isinstance(run_logger, RunLogger):
                run_logger.attach(self.run_paths, summary.run_name(self.run_paths, self.options))
                self._resources.callback(run_logger.finish)
        return [MetricsCSVLogger(str(self.run_paths.run_dir)), *extra]

    def fit(self, **kwargs: Any) -> None:
        """Train, or make a dry run."""
        config = self.options
        if config.dry_run:
            resolved = config_text(self.command_parser("fit"), config)
            accumulated = config.trainer.accumulate_grad_batches
            dry_run.print_dry_run(resolved, self.trainer, self.model, self.datamodule, self.run_paths, accumulated)
            return
        with explain_out_of_memory(self.trainer, self.model, self.datamodule):
            self.trainer.fit(**kwargs)

    def after_fit(self) -> None:
        """Play the final games, and print a summary of the run."""
        if self.options.dry_run or self.options.trainer.fast_dev_run:
            return
        # The first rank chose the directory.
        self._run_paths = self.trainer.strategy.broadcast(self._run_paths)
        settings: PlaySettings = self.config_init[self.subcommand].play
        if settings.final_games:
            self._play_final_games(settings)
        if self.trainer.is_global_zero:
            summary.publish_outcome(self.run_paths, self.trainer, self.datamodule)
            self.print_summary()

    def print_summary(self) -> None:
        """Print the games table, the run's files and the next command."""
        if self.match is not None:
            summary.print_games(self.match)
        summary.print_run(self.run_paths, self.trainer.loggers, self.options)

    def _play_final_games(self, settings: PlaySettings) -> None:
        if find_style(settings, self.datamodule) is None:
            logger.warning("no games played: the style of the training prompts is unknown. Set play.style.")
            return
        # The best adapter plays, which may not be the last.
        checkpoint = find_adapter_checkpoint(self.trainer)
        if checkpoint is not None and checkpoint.adapter_dir is not None:
            self.model.load_adapter(checkpoint.adapter_dir)
        contestant = Contestant(adapter_dir=display_path(self.run_paths.artifacts_dir))
        self._play(settings.final_games, self.run_paths.games, [contestant])

    def _play(self, num_games: int, paths: GamesPaths, contestants: Sequence[Contestant]) -> Match:
        config = self.config_init[self.subcommand]
        self.match = match = Match(self.model, self.datamodule, config.play, num_games, contestants)
        self.trainer.test(match, verbose=False)
        if self.trainer.is_global_zero:
            try:
                games.save_games(match, self.trainer, config.model.base_model, paths)
            except UserError:
                summary.print_games(match)  # so that the results are not lost
                raise
        return match

    def validate(self, **kwargs: Any) -> None:
        """Validate, and print the metrics."""
        self.trainer.validate(**kwargs, verbose=False)
        if self.datamodule.num_val_rows == 0:
            raise UserError("no rows to validate on. Set data.val_path, or data.val_fraction above 0.")
        if self.trainer.is_global_zero:
            self._warn_if_split_differs()
            for name, value in sorted(self.trainer.callback_metrics.items()):
                print(f"{name} {float(value):.6g}")

    def _warn_if_split_differs(self) -> None:
        if self.options.adapter is None:
            return
        trained = store.read_metadata(self.options.adapter).data.get("split_hash")
        if trained is not None and trained != self.datamodule.summary()["split_hash"]:
            logger.warning(
                "The adapter may have been trained on some of these rows: the rows or their split differ from those of "
                "its run. The config.yaml of the run gives the same split."
            )

    def test(self, **kwargs: Any) -> None:
        """Play seeded games, and print and write the table."""
        if not self._contestants:
            logger.warning("no --adapter given: the base model plays with the teacher and random moves only.")
        adapter_dirs = [contestant.adapter_dir for contestant in self._contestants if contestant.adapter_dir]
        paths = GamesPaths.of_adapters(adapter_dirs)
        match = self._play(self.options.play.test_games, paths, self._contestants)
        if self.trainer.is_global_zero:
            summary.print_games(match)
            run = RunPaths(paths.games_dir.parent)
            if len(adapter_dirs) == 1 and run == RunPaths.of_adapter(adapter_dirs[0]):
                summary.try_write_report(run)
            print(f"Table, games and replays written to {display_path(paths.games_dir)}")

    def predict(self, **kwargs: Any) -> None:
        """Write completions as they are computed."""
        config = self.options
        given = config.data.predict_path
        if given is None:
            raise UserError("predict needs --data.predict_path FILE.jsonl, rows with a 'prompt'.")
        first = given if isinstance(given, str) else given[0]
        writer = PredictionWriter(RunPaths.predictions_path(config.adapter, first))
        self.trainer.callbacks.append(writer)  # type: ignore[attr-defined]
        self.trainer.predict(**kwargs, return_predictions=False)
        if self.trainer.is_global_zero:
            print(f"{writer.num_rows} completions written to {display_path(writer.path)}")


class _ParsersBuilt(BaseException):
    """Ends the construction of a ``SnakeCLI`` that has nothing to parse; holds its parsers by command."""

    def __init__(self, parsers: dict[str, LightningArgumentParser]) -> None:
        super().__init__("parsers built")
        self.parsers = parsers


def build_parsers(cli_class: type[SnakeCLI] = SnakeCLI) -> dict[str, LightningArgumentParser]:
    """Return the parsers of a CLI by command, without parsing or running anything."""
    try:
        cli_class(None)
    except _ParsersBuilt as built:
        return built.parsers
    raise AssertionError("unreachable: without arguments the constructor raises")


def _parse_settings(parser: LightningArgumentParser, settings: Mapping[str, Mapping[str, Any]]) -> Namespace:
    ((command, options),) = settings.items()
    configs = [f"--config={os.fspath(name)}" for name in options.get("config", [])]
    others = {key: value for key, value in options.items() if key != "config"}
    base = parser.parse_args([command, *configs])
    parsed: Namespace = parser.parse_object({"subcommand": command, command: others}, base)
    return parsed


def _first(adapter: str | list[str] | None) -> str | None:
    return adapter[0] if isinstance(adapter, list) else adapter


def _check_ranks(trainer: Trainer) -> None:
    """Refuse launchers that are not supported, and more ranks than a machine without GPUs has cores.

    Raises:
        UserError: In either case.
    """
    if forks_or_spawns(trainer):
        raise UserError(
            "trainer.strategy: forked and spawned processes are not supported. Use --config ddp.yaml, which starts "
            "each rank by the same command."
        )
    if trainer.strategy.root_device.type == "cpu" and trainer.num_devices > max_processes():
        raise UserError(
            f"trainer.devices={trainer.num_devices}: this machine has {os.cpu_count() or 1} cores. Start at most one "
            "process per core."
        )
