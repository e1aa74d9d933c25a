"""LightningCLI: wires data, training and evaluation together, and says where everything lies. Nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import io
import itertools
import json
import logging
import os
import pkgutil
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch
import yaml
from jsonargparse import ActionConfigFile, Namespace, get_loader, set_loader
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.text import Text

from snake_lora_pl.adapters import store
from snake_lora_pl.cli import dry_run
from snake_lora_pl.console import configure_logging, ignore_known_warnings
from snake_lora_pl.data.datamodule import SnakeJSONLDataModule, max_processes
from snake_lora_pl.data.encoding import TemplateName
from snake_lora_pl.durable import explain_failed_writes, open_durably, remove_leftovers, sole_use
from snake_lora_pl.errors import UserError, one_line
from snake_lora_pl.evaluation.callbacks.play_evaluation import PlayEvaluation
from snake_lora_pl.evaluation.callbacks.prediction_writer import PredictionWriter
from snake_lora_pl.evaluation.callbacks.sample_rows import SampleRows
from snake_lora_pl.evaluation.dashboard import RunLogger, RunOutcome, dashboards, require_package
from snake_lora_pl.evaluation.match import ADAPTER, Contestant, Match, PromptSpec
from snake_lora_pl.evaluation.player_factory import find_style
from snake_lora_pl.evaluation.settings import PlaySettings
from snake_lora_pl.game import STYLES
from snake_lora_pl.paths import (
    GamesPaths,
    RunPaths,
    display_path,
    distinct_names,
    find_config,
    shipped_configs,
    sibling_lock_path,
)
from snake_lora_pl.program import LIGHTNING_VERBS, PROG, RANK_VARIABLES, help_path
from snake_lora_pl.reporting.games_file import write_games, write_replays
from snake_lora_pl.reporting.html_report import write_report
from snake_lora_pl.reporting.run_record import RunRecord
from snake_lora_pl.reporting.table import difference_lines, render_table, table_json
from snake_lora_pl.training.callbacks.adapter_checkpoint import AdapterCheckpoint
from snake_lora_pl.training.callbacks.adapter_norms import AdapterNorms
from snake_lora_pl.training.callbacks.auto_batch_size import BatchSizeFinder
from snake_lora_pl.training.callbacks.interruption import Interrupted, Interruption, leave_at_once
from snake_lora_pl.training.callbacks.progress_bar import RunProgress
from snake_lora_pl.training.callbacks.run_config import ResolvedConfig, config_text
from snake_lora_pl.training.callbacks.throughput import ThroughputMonitor
from snake_lora_pl.training.memory import out_of_memory
from snake_lora_pl.training.metrics_csv import MetricsCSVLogger
from snake_lora_pl.training.module import LoRALightningModule
from snake_lora_pl.untrusted import load_yaml, read_text

logger = logging.getLogger(__name__)

# Processes that a launcher starts for one run inherit it, so that all write to one place.
RUN_DIR_ENV = "SNAKE_LORA_PL_RUN_DIR"
_HELP_WIDTH = "80"
# Of jsonargparse's readers of configs and of values in flags; it knows our own by this name.
_PARSER_MODE = "checked_yaml"


def _load_checked_yaml(text: str) -> Any:
    return load_yaml(text, get_loader("yaml"))


set_loader(_PARSER_MODE, _load_checked_yaml, exceptions=(yaml.YAMLError,))


class ShippedConfigFile(ActionConfigFile):
    """``--config NAME``: a path, else the name of a config that comes with the package."""

    def __call__(self, parser: Any, cfg: Namespace, values: str, option_string: str | None = None) -> None:
        """Find the file, then let jsonargparse read it.

        Raises:
            UserError: If it is nowhere or cannot be read; the message names it.
        """
        path = find_config(values)
        try:
            read_text(path)
            super().__call__(parser, cfg, str(path), option_string)
        except (ValueError, OSError) as error:
            raise UserError(f"--config {path}: {error}") from error


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line that names the nearest valid key."""

    def add_class_arguments(self, theclass: type, nested_key: str | None = None, **kwargs: Any) -> list[str]:
        """As jsonargparse does, without what can only be given from Python."""
        if theclass is SnakeJSONLDataModule:
            kwargs["skip"] = {"tokenizer"}
        return super().add_class_arguments(theclass, nested_key, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing a usage of a hundred lines.

        Raises:
            UserError: Always.
        """
        _raise_user_error_behind(ex)
        raise UserError(self._one_line(message)) from ex

    def _one_line(self, message: str) -> str:
        lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
        text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", " ".join(lines)[:600])
        if group := re.fullmatch(r'Key "(\w+)\.([\w.]+)" not found in namespace\.', text):
            return f"{group[1]} is a group of keys, not a value: write {group[1]}.{group[2]} and the like."
        for found in re.findall(r"""["']([\w.]+)["']|--([\w.]+)""", text):
            key = found[0] or found[1]
            known = self._known_keys()
            if key in known:
                continue
            # The last part may come alone: jsonargparse names a key relative to its group.
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.6) or [
                k for k in known for m in difflib.get_close_matches(key, [k.rsplit(".", 1)[-1]], n=1) if m
            ]
            if near:
                return f"{text.rstrip('.')}. Did you mean '{near[0]}'?"
        return text

    def _known_keys(self) -> list[str]:
        verbs = [p for a in self._actions if isinstance(a.choices, dict) for p in a.choices.values()]
        return [a.dest for parser in [self, *verbs] for a in parser._actions if a.dest and a.dest != "help"]


def _raise_user_error_behind(error: BaseException | None) -> None:
    """Raise the ``UserError`` that an error was made of, if there is one."""
    while error is not None:
        if isinstance(error, UserError):
            raise error
        error = error.__cause__ or error.__context__


class SnakeCLI(LightningCLI):
    """The verbs fit, validate, test and predict over one module and one data module."""

    run_paths: RunPaths | None = None
    contestants: Sequence[Contestant] = ()
    match: Match | None = None

    def __init__(self, *args: Any, resources: contextlib.ExitStack, **kwargs: Any) -> None:
        self._resources = resources  # what a run holds until it ends; everything happens in the constructor
        super().__init__(*args, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs, and which arguments of the trainer's methods are not the user's to give."""
        # Checkpoints are always read without pickles, so `weights_only` is no choice; an adapter is given by --adapter.
        evaluation = {"model", "dataloaders", "datamodule", "ckpt_path", "verbose", "weights_only"}
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": evaluation,
            "test": evaluation,
            "predict": evaluation | {"return_predictions"},
        }

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that finds shipped configs."""
        # An abbreviated flag would be a mistyped one that goes unnoticed.
        parser = self.parser_class(**kwargs, allow_abbrev=False)
        parser.add_argument(
            "-c", "--config", action=ShippedConfigFile, help="Config by path or shipped name; several compose."
        )
        for action in parser._actions:
            if "--print_config" in action.option_strings:
                # Offered only where ruamel.yaml happens to be installed; the help is the same everywhere.
                action.help = str(action.help).replace(" comments,", "")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Keys of the run itself, the callbacks, and values that two parts need."""
        parser.add_argument("--root", type=str, default=".", help="Directory whose logs/ holds the runs.")
        parser.add_argument("--adapter_name", type=str, default="snake_reasoning", help="Name of the run's directory.")
        parser.add_argument(
            "--adapter",
            type=str | list[str] | None,
            default=None,
            help="Adapter directory to start from or to evaluate; test takes several: --adapter A --adapter B.",
        )
        parser.add_argument("--games", type=int, default=100, help="Games of each player in test.")
        parser.add_argument(
            "--num_sample_rows",
            type=int,
            default=8,
            help="Validation rows that the model completes at each validation of fit, always the same; 0 for none.",
        )
        parser.add_argument(
            "--dry_run",
            action="store_true",
            help="fit: show config, data, memory, one step and where files would go; write nothing.",
        )
        parser.add_class_arguments(PlaySettings, "play")
        parser.add_lightning_class_args(AdapterCheckpoint, "checkpoint")
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        parser.set_defaults(
            {
                "early_stopping.monitor": "val/loss",
                "early_stopping.patience": 5,
                # At a training epoch's end there is nothing to look at, least of all where no rows validate.
                "early_stopping.check_on_train_epoch_end": False,
                "model.text_metrics": {"class_path": "snake_lora_pl.evaluation.metrics.SnakeMoveMetrics"},
            }
        )
        parser.link_arguments("adapter", "model.adapter_path", compute_fn=_first)
        for key in ("base_model", "revision", "trust_remote_code"):
            parser.link_arguments(f"model.{key}", f"data.{key}")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what was given, without Lightning's warning about arguments that come from two sides."""
        with _command_line():
            super().parse_arguments(parser, args)
        verb = self.config["subcommand"]
        seed = self.config[verb].seed_everything
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise UserError(f"seed_everything must lie between 0 and {2**32 - 1:,} (found: {seed})")
        try:
            # A config's null was let through, whatever the key's type.
            self._subcommand_parsers[verb].validate(self.config[verb], skip_unset=False)
        except (TypeError, KeyError) as error:
            parser.error(str(error), error)

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would let hyper-parameters inside a checkpoint override ``--model.*`` silently."""

    # ------------------------------------------------------------------ where files go

    def before_instantiate_classes(self) -> None:
        """Settle the run's directory before anything is built."""
        config = self.config[self.subcommand]
        if not re.fullmatch(r"[\w][\w.-]*", config.adapter_name):
            raise UserError(f"--adapter_name '{config.adapter_name}': use letters, digits, '.', '_' and '-' only.")
        if config.dry_run and self.subcommand != "fit":
            raise UserError(f"--dry_run is for fit; {self.subcommand} has none.")
        if self.subcommand != "test" and len(_adapter_dirs(config)) > 1:
            raise UserError(f"{self.subcommand} takes one --adapter; test plays several against each other.")
        if self.subcommand == "fit":
            self.run_paths = self._resolve_run(config)
            if _is_first_process() and not config.dry_run:
                self._resources.enter_context(sole_use(self.run_paths.lock_path))
                remove_leftovers(self.run_paths.run_dir, "*")
                for elsewhere in (config.checkpoint.dirpath, config.checkpoint.adapter_dir):
                    if elsewhere is not None:
                        self._resources.enter_context(_sole_use_of(elsewhere))
        elif config.adapter is not None:
            self._prompt_as_trained(config)

    def _prompt_as_trained(self, config: Namespace) -> None:
        """Prompts reach an adapter as they did in training, whatever the config says of the rows of another run."""
        adapter_dirs = _adapter_dirs(config)
        trained = [store.read_metadata(adapter_dir) for adapter_dir in adapter_dirs]
        names = [ADAPTER] if len(trained) == 1 else [f"{ADAPTER} {name}" for name in distinct_names(adapter_dirs)]
        styles = [config.play.style or metadata.data.get("prompt_format") for metadata in trained]
        self.contestants = [
            Contestant(name, PromptSpec(style if style in STYLES else None, metadata.data.get("template")), adapter_dir)
            for name, style, metadata, adapter_dir in zip(names, styles, trained, adapter_dirs, strict=True)
        ]
        for adapter_dir, metadata in zip(adapter_dirs, trained, strict=True):
            template = metadata.data.get("template")
            if template is not None and template not in get_args(TemplateName):
                known = ", ".join(get_args(TemplateName))
                raise UserError(
                    f"{Path(adapter_dir) / store.METADATA_FILE}: damaged (data.template is '{template}', none of "
                    f"{known}). Copy the file again, or train again."
                )
        # validate and predict know one adapter, test's base takes after the first.
        config.data.template = trained[0].data.get("template", config.data.template)
        grid_sizes = list(dict.fromkeys(metadata.grid_size for metadata in trained if metadata.grid_size is not None))
        if len(grid_sizes) > 1 and config.play.grid_size is None:
            sizes = " and ".join(f"{size}x{size}" for size in grid_sizes)
            raise UserError(f"the adapters were trained on {sizes} grids. Set --play.grid_size to play on one.")
        config.play.grid_size = config.play.grid_size or next(iter(grid_sizes), None)

    def _resolve_run(self, config: Namespace) -> RunPaths:
        data = SnakeJSONLDataModule(train_path=config.data.train_path, grid_size=config.data.grid_size)
        grid_size = data.resolved_grid_size  # reads the first row
        if config.ckpt_path in ("last", "auto"):
            run = RunPaths.latest(config.root, grid_size, config.adapter_name)
            if run is not None:
                config.ckpt_path = str(run.last_checkpoint_path)
                return run
            if config.ckpt_path == "last":
                raise UserError(
                    f"--ckpt_path last: no run of '{config.adapter_name}' on a {grid_size}x{grid_size} grid with a "
                    f"checkpoint under {display_path(config.root)}. Leave the flag out to start one, or set --root."
                )
            config.ckpt_path = None
        if config.ckpt_path is not None:
            if not Path(config.ckpt_path).is_file():
                raise UserError(f"--ckpt_path {config.ckpt_path}: no such file. 'last' takes the newest run's.")
            run = RunPaths.of_checkpoint(config.ckpt_path)
            if run is not None:
                return run
        if (inherited := os.environ.get(RUN_DIR_ENV)) is not None:
            return RunPaths(Path(inherited))
        if config.dry_run or not _is_first_process():
            # Not this run's directory yet: AdapterCheckpoint.setup brings the first process's choice.
            return RunPaths.new(config.root, grid_size, config.adapter_name)
        run = RunPaths.claim(config.root, grid_size, config.adapter_name)
        os.environ[RUN_DIR_ENV] = str(run.run_dir)
        return run

    # ------------------------------------------------------------------ the trainer

    def instantiate_classes(self) -> None:
        """Make the module, the data module and the trainer.

        Raises:
            UserError: As one of them raised it; jsonargparse, which tries every type that an option may have, wraps it.
        """
        # Before jsonargparse makes them: of an item in a list it lets no reason through.
        configured = self.config[self.subcommand].trainer.logger
        for run_logger in configured if isinstance(configured, list) else [configured]:
            class_path = getattr(run_logger, "class_path", "")
            if class_path.startswith("snake_lora_pl.evaluation."):
                require_package(pkgutil.resolve_name(class_path).package)
        try:
            super().instantiate_classes()
        except ValueError as error:
            _raise_user_error_behind(error)
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the logger and the callbacks that the verb needs."""
        config = self.config_init[self.subcommand]
        trainer_config = {**config.trainer, **kwargs}
        callbacks: list[Any] = []
        # Lightning looks at them in the first step, too late for a message.
        for name in ("accumulate_grad_batches", "check_val_every_n_epoch"):
            if (found := trainer_config[name]) is not None and found < 1:
                raise UserError(f"trainer.{name} must be at least 1 (found: {found})")
        if trainer_config["enable_progress_bar"] is not False:
            callbacks.append(RunProgress())
        callbacks.append(Interruption())
        if self.subcommand == "fit":
            assert self.run_paths is not None
            callbacks += [BatchSizeFinder(config.ckpt_path), ThroughputMonitor(), AdapterNorms(), config.early_stopping]
            callbacks += [SampleRows(config.num_sample_rows), RunRecord(self.run_paths)]
            if config.play.val_games:
                callbacks.append(PlayEvaluation(config.play))
            if trainer_config["enable_checkpointing"] is not False:
                callbacks.append(config.checkpoint)
            trainer_config["logger"] = self._loggers(trainer_config["logger"])
            # Where a SLURM job that is requeued leaves its state: never where another run would find it.
            trainer_config["default_root_dir"] = trainer_config["default_root_dir"] or str(self.run_paths.run_dir)
        else:
            trainer_config["logger"] = False
            trainer_config["enable_checkpointing"] = False
        if self.subcommand == "predict":
            self.prediction_writer = PredictionWriter(self._predictions_path(config))
            callbacks.append(self.prediction_writer)
        if self.subcommand != "fit":
            self.save_config_callback = None
        trainer_config["enable_model_summary"] = False
        if config.dry_run:
            callbacks = [Interruption()]
            trainer_config |= {**dry_run.TRAINER_SETTINGS, "callbacks": None}
            self.save_config_callback = None
        try:
            trainer = self._instantiate_trainer(trainer_config, callbacks)
        except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
            chosen = ", ".join(f"{k}={trainer_config[k]}" for k in ("accelerator", "devices", "strategy", "precision"))
            raise UserError(
                f"these trainer settings do not fit this machine ({chosen}): {' '.join(str(error).split())} "
                "--trainer.accelerator=auto --trainer.devices=auto --trainer.strategy=auto work everywhere."
            ) from error
        _check_processes(trainer)
        return trainer

    def _loggers(self, configured: Any) -> list[Any]:
        assert self.run_paths is not None
        if configured is None or isinstance(configured, bool):
            configured = []
        extra = configured if isinstance(configured, list) else [configured]
        for run_logger in extra:
            if isinstance(run_logger, RunLogger):
                run_logger.attach(self.run_paths, self._run_name(self.run_paths))
                self._resources.callback(run_logger.finish)
        return [MetricsCSVLogger(str(self.run_paths.run_dir)), *extra]

    def _predictions_path(self, config: Namespace) -> Path:
        if config.data.predict_path is None:
            raise UserError("predict needs --data.predict_path FILE.jsonl, rows with a 'prompt'.")
        first = config.data.predict_path if isinstance(config.data.predict_path, str) else config.data.predict_path[0]
        return RunPaths.predictions_path(config.adapter, first)

    # ------------------------------------------------------------------ the verbs

    def fit(self, **kwargs: Any) -> None:
        """Train, or rehearse it; a machine with too little memory for it is told what fits."""
        config = self.config[self.subcommand]
        if not config.dry_run:
            with out_of_memory.explained(self.trainer, self.model, self.datamodule):
                self.trainer.fit(**kwargs)
            return
        assert self.run_paths is not None
        resolved = config_text(self._parser(self.subcommand), config)
        accumulated = config.trainer.accumulate_grad_batches
        sections = dry_run.rehearse(self.trainer, self.model, self.datamodule, self.run_paths, accumulated)
        for title, text in itertools.chain([("config", resolved.rstrip())], sections):
            if self.trainer.is_global_zero:
                print(f"{title}\n{text}\n", flush=True)
        if self.trainer.is_global_zero:
            print("Nothing was written. Without --dry_run this trains.")

    def after_fit(self) -> None:
        """Let the adapter play, and say what came out."""
        settings: PlaySettings = self.config_init[self.subcommand].play
        if self.config[self.subcommand].dry_run:
            return
        if self.run_paths is None or self.config[self.subcommand].trainer.fast_dev_run:
            return
        self.run_paths = self.trainer.strategy.broadcast(self.run_paths)
        if settings.final_games:
            self._play_with_best(settings)
        if self.trainer.is_global_zero:
            self._show_outcome(self.run_paths)
            self.say_what_came_out(self.run_paths)

    def _show_outcome(self, paths: RunPaths) -> None:
        """Hand what the run has left to every dashboard, and write the report."""
        if (paths.artifacts_dir / store.METADATA_FILE).is_file():
            metadata = dataclasses.asdict(store.read_metadata(paths.artifacts_dir))
            data = self.datamodule
            outcome = RunOutcome(paths.artifacts_dir, metadata, data.train_paths(), data.summary())
            for dashboard in dashboards(self.trainer):
                dashboard.show_outcome(outcome)
        _write_report(paths)

    def say_what_came_out(self, paths: RunPaths) -> None:
        """Print the games' table, where everything lies and what comes next."""
        if self.match is not None:
            self._print_games()
        # Bold in a terminal, which wraps long lines itself, so that a path or the command can be copied whole.
        console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        console.print()
        places = [
            ("report", paths.report_path),
            ("metrics", paths.metrics_path),
            ("games", paths.games.games_dir),
            ("checkpoints", paths.checkpoints_dir),
            ("adapter", paths.artifacts_dir),
        ]
        lines = [(label, display_path(path)) for label, path in places if path.exists()]
        lines += [(log.label, log.location) for log in self.trainer.loggers if isinstance(log, RunLogger)]
        for label, place in lines:
            console.print(Text.assemble((f"{label:<12}", "bold"), place))
        command = [*PROG.split(), "test"]
        for config in self._config_names():
            command += ["--config", display_path(config)]
        command += ["--adapter", display_path(paths.artifacts_dir)]
        next_one = ("Next:", "bold")
        console.print(
            Text.assemble("Everything lies in ", display_path(paths.run_dir), ". ", next_one, " ", shlex.join(command))
        )

    def _play_with_best(self, settings: PlaySettings) -> None:
        """Play with the adapter that was kept, which need not be the last one."""
        assert self.run_paths is not None
        if find_style(settings, self.datamodule) is None:
            logger.warning("no games played: the prompts of the training rows are of no known style. Set play.style.")
            return
        checkpoint = self.trainer.checkpoint_callback
        if isinstance(checkpoint, AdapterCheckpoint) and checkpoint.adapter_dir is not None:
            self.model.load_adapter(checkpoint.adapter_dir)
        contestant = Contestant(adapter_dir=display_path(self.run_paths.artifacts_dir))
        self._play(settings.final_games, self.run_paths.games, [contestant])

    def _play(self, num_games: int, paths: GamesPaths, contestants: Sequence[Contestant]) -> None:
        """Let every player play, and write table, games and replays."""
        config = self.config_init[self.subcommand]
        self.match = match = Match(self.model, self.datamodule, config.play, num_games, contestants)
        self.trainer.test(match, verbose=False)
        if not self.trainer.is_global_zero:
            return
        facts = {"base_model": config.model.base_model, **match.conditions}
        adapters = {
            contestant.name: {"directory": contestant.adapter_dir, **contestant.prompt_spec._asdict()}
            for contestant in match.contestants
        }
        table = table_json(match.results, facts, adapters)
        try:
            with explain_failed_writes(paths.games_dir, "the games", then="play them again with the verb test"):
                with open_durably(paths.table_path, "w", encoding="utf-8") as file:
                    json.dump(table, file, indent=2)
                write_games(paths.games_path, match.results)
                looked_at = [result for result in match.results if result.name in adapters] or match.results[:1]
                for result in looked_at:
                    write_replays(paths if len(looked_at) == 1 else paths.of_player(result.name), result.games)
        except UserError:
            self._print_games()  # the table at least is not lost
            raise
        for contestant in match.contestants:
            if contestant.adapter_dir is not None:
                _record_play(contestant.adapter_dir, table, contestant.name)
        for dashboard in dashboards(self.trainer):
            dashboard.show_games(match.results[0], self.trainer.global_step, is_final=True)

    def _print_games(self) -> None:
        assert self.match is not None
        is_terminal = sys.stdout.isatty()
        # A log file has no width; 80 columns would cut names.
        console = Console(width=None if is_terminal else 120, highlight=False, markup=False, emoji=False)
        console.print(f"\n{self.match.title}\n", soft_wrap=not is_terminal)
        if len(self.match.contestants) > 1:
            for contestant in self.match.contestants:
                print(f"{contestant.name}: {contestant.adapter_dir}, prompts in {contestant.prompt_spec.style}")
            print()
        console.print(render_table(self.match.results))
        print("", *difference_lines(self.match.results), sep="\n")

    def after_predict(self) -> None:
        """Say where the completions are."""
        if self.trainer.is_global_zero:
            print(
                f"{self.prediction_writer.num_rows} completions written to {display_path(self.prediction_writer.path)}"
            )

    def validate(self, **kwargs: Any) -> None:
        """Run the validation without Lightning's table; the progress bar prints the metrics."""
        self.trainer.validate(**kwargs, verbose=False)
        if self.datamodule.num_val_rows == 0:
            raise UserError("no rows to validate on: name some in data.val_path, or set data.val_fraction above 0.")
        if self.trainer.is_global_zero:
            self._say_if_rows_differ()
            for name, value in sorted(self.trainer.callback_metrics.items()):
                print(f"{name} {float(value):.6g}")

    def _say_if_rows_differ(self) -> None:
        """An adapter's figures on rows it was trained on are worth little: say where that may be so."""
        adapter = self.config[self.subcommand].adapter
        if adapter is None:
            return
        trained = store.read_metadata(adapter).data.get("split_hash")
        if trained is not None and trained != self.datamodule.summary()["split_hash"]:
            logger.warning(
                "These are not the rows, or not the split, that the adapter was trained and validated on, so it may "
                "have been trained on some of them. The run's own config.yaml gives the same split."
            )

    def test(self, **kwargs: Any) -> None:
        """Play seeded games, print the table and say where games and replays are."""
        config = self.config[self.subcommand]
        if not self.contestants:
            logger.warning("no --adapter given: the base model plays alone, beside the teacher and chance.")
        paths = GamesPaths.of_adapters(
            [contestant.adapter_dir for contestant in self.contestants if contestant.adapter_dir]
        )
        self._play(config.games, paths, self.contestants)
        if self.trainer.is_global_zero:
            self._print_games()
            run = RunPaths(paths.games_dir.parent)
            if len(self.contestants) == 1 and run == RunPaths.of_adapter(str(self.contestants[0].adapter_dir)):
                _write_report(run)
            print(f"Table, games and replays written to {display_path(paths.games_dir)}")

    def predict(self, **kwargs: Any) -> None:
        """Write completions as they come; nothing is kept in memory."""
        self.trainer.predict(**kwargs, return_predictions=False)

    def _run_name(self, paths: RunPaths) -> str:
        """Preset, base model, kind and time."""
        config = self.config[self.subcommand]
        configs = [Path(name).stem for name in self._config_names()]
        preset = "+".join(name for name in configs if name not in ("wandb", "tensorboard"))
        base = Path(str(config.model.base_model)).name
        started = paths.run_dir.parent.name[-len("YYYYmmdd_HHMMSS") :]
        return " ".join(part for part in (preset, base, config.model.adapter_type, started) if part)

    def _config_names(self) -> list[str]:
        given = [Path(str(path)) for path in self.config[self.subcommand].get("config") or []]
        shipped = {path.resolve(): name for name, path in shipped_configs().items()}
        return [shipped.get(path.resolve(), str(path)) for path in given]


@contextlib.contextmanager
def _sole_use_of(directory: str) -> Iterator[None]:
    """Keep other runs out of a directory that was named for checkpoints or the adapter, outside of the run's own."""
    lock_path = sibling_lock_path(directory)
    try:
        lock_path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory}: cannot be created ({error.strerror}). Choose a writable directory.") from error
    with sole_use(lock_path, directory, instead="name another one"):
        yield


def _adapter_dirs(config: Namespace) -> list[str]:
    given = config.adapter
    return [] if given is None else [given] if isinstance(given, str) else list(dict.fromkeys(given))


def _first(adapter: str | list[str] | None) -> str | None:
    return adapter[0] if isinstance(adapter, list) else adapter


def _gather_adapters(arguments: list[str]) -> list[str]:
    """``--adapter A --adapter B`` as a list; of an option that stands twice a parser takes the last alone."""
    is_first = True
    gathered = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name == "--adapter":
            gathered.append(f"{name}{'' if is_first else '+'}{equals}{value}")
            is_first = False
        else:
            gathered.append(argument)
    return gathered


def run(arguments: list[str]) -> int:
    """Run a Lightning verb.

    Args:
        arguments: The verb and its options.

    Returns:
        The exit code.

    Raises:
        UserError: If the user can mend it.
    """
    configure_logging(is_rank_zero=_is_first_process())
    ignore_known_warnings()
    # A launcher of further processes repeats the command line.
    with _command_line(*arguments), _leaving_on_signals():
        try:
            build_and_run(arguments)
        except Interrupted as stop:
            if _is_first_process():
                print(f"{stop}. {_how_to_go_on(stop.checkpoint_path)}".strip(), file=sys.stderr)
            return 128 + stop.signum  # as shells have it
    return 0


@contextlib.contextmanager
def _leaving_on_signals() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end what there is no state of yet; in training ``Interruption`` takes over."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, leave_at_once) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _how_to_go_on(checkpoint_path: Path | None) -> str:
    if checkpoint_path is None:
        return ""
    run = RunPaths.of_checkpoint(checkpoint_path)
    again = f"--ckpt_path {shlex.quote(display_path(checkpoint_path))}"
    if run is None or not run.config_path.is_file():
        return f"Go on with the same command and {again}"
    return f"Go on with: {PROG} fit --config {shlex.quote(display_path(run.config_path))} {again}"


def build_and_run(arguments: list[str], cli_class: type[SnakeCLI] = SnakeCLI) -> SnakeCLI:
    """Run a Lightning verb in this process, whoever asked for it.

    Args:
        arguments: The verb and its options.
        cli_class: What runs it.

    Returns:
        What ran it: its trainer, module and data.

    Raises:
        UserError: If the user can mend it.
    """
    inherited = os.environ.get(RUN_DIR_ENV)
    try:
        with contextlib.ExitStack() as resources:
            return _build(arguments, cli_class, resources)
    except MisconfigurationException as error:
        raise UserError(" ".join(str(error).split())) from error
    except OSError as error:  # from a logger of the user's, say; what this package writes is explained where it does so
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = f"{error.filename}: " if error.filename is not None else ""
        raise UserError(f"{place}{error.strerror}. Free space, then go on with --ckpt_path last.") from error
    except torch.distributed.DistNetworkError as error:
        place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise UserError(
            f"the processes cannot meet at {place} (MASTER_ADDR:MASTER_PORT): {one_line(error)}. Choose an address "
            "of the first machine that the others reach and a port that is free there; on one machine leave both unset."
        ) from error
    except RuntimeError as error:
        # What has no type of its own: a name that no metric has, found out at the first validation, ...
        if str(error).startswith("Early stopping conditioned on metric"):
            raise UserError(f"early_stopping.monitor: {' '.join(str(error).split())}") from error
        # ... and a process that finds another one gone.
        if re.search(r"Connection (closed|reset) by peer|remote process exited", str(error)):
            raise UserError(
                "another process of this run has died; what it said stands above, if anything (where memory runs out "
                "the system kills without a word). Go on with --ckpt_path last."
            ) from error
        raise
    finally:
        claimed = os.environ.get(RUN_DIR_ENV)
        if inherited is None and claimed is not None:
            del os.environ[RUN_DIR_ENV]
            RunPaths(Path(claimed)).remove_if_empty()


def _is_first_process() -> bool:
    """Whether no launcher (torchrun, srun, mpirun, one command a node) says that this is another process."""
    return all(os.environ.get(name, "0") == "0" for name in RANK_VARIABLES)


def _check_processes(trainer: Trainer) -> None:
    """Refuse processes that cannot be started, or more than a machine without GPUs could bear.

    Raises:
        UserError: If there are such.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise UserError(
            "trainer.strategy: processes that are forked or spawned from this one are not supported. Use "
            "--config ddp.yaml, which starts each by the same command."
        )
    if trainer.strategy.root_device.type == "cpu" and trainer.num_devices > max_processes():
        raise UserError(
            f"trainer.devices={trainer.num_devices}: this machine has {os.cpu_count() or 1} cores. Start a process for "
            "each at most."
        )


def _record_play(adapter_dir: str, table: dict[str, Any], player: str) -> None:
    """Let the adapter's card say how it plays; one that cannot be written to still has its table."""
    try:
        store.record_play(adapter_dir, table, player)
    except OSError as error:
        logger.warning("%s: the games are not noted in the adapter's card (%s).", adapter_dir, error)


def _write_report(paths: RunPaths) -> None:
    """Write the report; a run whose report cannot be written has ended well all the same."""
    try:
        write_report(paths)
    except UserError as error:
        logger.warning("%s", error)


def _build(arguments: list[str], cli_class: type[SnakeCLI], resources: contextlib.ExitStack) -> SnakeCLI:
    return cli_class(
        LoRALightningModule,
        SnakeJSONLDataModule,
        args=_gather_adapters(arguments),
        resources=resources,
        parser_class=OneLineParser,
        seed_everything_default=42,
        auto_configure_optimizers=False,
        save_config_callback=ResolvedConfig,
        save_config_kwargs={"save_to_log_dir": False},
        load_from_checkpoint_support=False,
        trainer_defaults={"use_distributed_sampler": False},
        parser_kwargs={
            "prog": PROG,
            "parser_mode": _PARSER_MODE,
            "description": "Train a language model to play Snake from written heuristics.",
        }
        | {verb: {"description": text, "usage": f"{PROG} {verb} [options]"} for verb, text in LIGHTNING_VERBS.items()},
    )


def help_text(verb: str) -> str:
    """The help of a verb as its parser prints it, 80 columns wide."""
    with _environment(COLUMNS=_HELP_WIDTH, NO_COLOR="1"), contextlib.redirect_stdout(io.StringIO()) as text:
        with contextlib.suppress(SystemExit):
            _build([verb, "--help"], SnakeCLI, contextlib.ExitStack())
        return text.getvalue()


def write_help() -> None:
    """Write the help texts that ``__main__`` prints without importing Lightning."""
    for verb in LIGHTNING_VERBS:
        path = help_path(verb)
        path.parent.mkdir(exist_ok=True)
        path.write_text(help_text(verb), encoding="utf-8")


@contextlib.contextmanager
def _command_line(*arguments: str) -> Iterator[None]:
    argv, sys.argv = sys.argv, [sys.argv[0], *arguments]
    try:
        yield
    finally:
        sys.argv = argv


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
