"""Every path of a run and of the cache; no other module joins their names.

A run directory follows the convention of upstream's extensions, so that their tools find it::

    ROOT/logs/extensions/models/grid-size-{N}/llm_finetune_v0.03_{YYYYmmdd_HHMMSS}/{adapter_name}/
        report.html  config.yaml  metrics.csv  checkpoints/  lora_adapters/model_artifacts/  games/  ...

The cache holds files that can be created again: base models, generated data sets, encoded rows.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import platformdirs

from snake_lora_pl.errors import UserError, did_you_mean

EXTENSION_TYPE = "llm_finetune"
EXTENSION_VERSION = "0.03"
TIMESTAMP_FORMAT = "%Y%m%d_%H%M%S"
CACHE_ENV = "SNAKE_LORA_PL_CACHE"
_RUN_PREFIX = f"{EXTENSION_TYPE}_v{EXTENSION_VERSION}_"
_UNSAFE_CHARS = re.compile(r"[^\w.+-]+")
_temporary_row_cache: ContextVar[Path | None] = ContextVar("temporary_row_cache", default=None)


def get_model_path(
    extension_type: str,
    version: str,
    grid_size: int,
    algorithm: str,
    timestamp: str,
    root: str | os.PathLike[str] = ".",
) -> Path:
    """Return the directory of one trained model, by upstream's convention.

    Args:
        extension_type: Type of extension, here ``llm_finetune``.
        version: Version of the convention without the ``v``, here ``0.03``.
        grid_size: Cells along one side of the board.
        algorithm: Name of the model in that run, here the adapter's name.
        timestamp: Start of the run as ``YYYYmmdd_HHMMSS``.
        root: Directory that holds ``logs/``.

    Returns:
        ``ROOT/logs/extensions/models/grid-size-{N}/{type}_v{version}_{timestamp}/{algorithm}``.
    """
    run = f"{extension_type}_v{version}_{timestamp}"
    return Path(root) / "logs" / "extensions" / "models" / f"grid-size-{grid_size}" / run / algorithm


@dataclass(frozen=True)
class RunPaths:
    """Paths of one run, derived from its directory ``{adapter_name}/``."""

    run_dir: Path

    @classmethod
    def new(
        cls, root: str | os.PathLike[str], grid_size: int, adapter_name: str, timestamp: str | None = None
    ) -> RunPaths:
        """Return the paths of a run that starts now, or at ``timestamp``, without creating anything."""
        timestamp = timestamp or datetime.now().strftime(TIMESTAMP_FORMAT)
        return cls(get_model_path(EXTENSION_TYPE, EXTENSION_VERSION, grid_size, adapter_name, timestamp, root))

    @classmethod
    def claim(cls, root: str | os.PathLike[str], grid_size: int, adapter_name: str) -> RunPaths:
        """Create the directory of a run that starts now; no two runs get the same one.

        Raises:
            UserError: If the directory cannot be created.
        """
        while True:
            run = cls.new(root, grid_size, adapter_name)
            try:
                run.run_dir.mkdir(parents=True)
                return run
            except FileExistsError:
                time.sleep(0.2)  # the name has a resolution of one second
            except OSError as error:
                raise UserError(
                    f"--root {root}: {run.run_dir} cannot be created ({error.strerror}). Choose a writable directory."
                ) from error

    def remove_if_empty(self) -> None:
        """Remove the directory of a run that failed before it wrote anything, and its empty parents."""
        directory = self.run_dir
        with contextlib.suppress(OSError):
            if list(directory.iterdir()) == [self.lock_path]:
                self.lock_path.unlink()
            while directory.name != "logs":
                directory.rmdir()
                directory = directory.parent
            directory.rmdir()

    @classmethod
    def latest(cls, root: str | os.PathLike[str], grid_size: int, adapter_name: str) -> RunPaths | None:
        """Return the newest run under ``root`` that has a checkpoint, which may not be ``last.ckpt``; or None."""
        pattern = get_model_path(EXTENSION_TYPE, EXTENSION_VERSION, grid_size, adapter_name, "*", root)
        runs = [cls(p) for p in Path(root).glob(str(pattern.relative_to(root)))]
        runs = [run for run in runs if newest_checkpoint(run.checkpoints_dir) is not None]
        return max(runs, key=lambda run: run.run_dir.parent.name, default=None)

    @classmethod
    def with_adapters(cls, root: str | os.PathLike[str]) -> list[RunPaths]:
        """Return the runs below ``root`` that have saved an adapter, the newest first."""
        found = Path(root).glob("logs/extensions/models/grid-size-*/*/*/lora_adapters/model_artifacts")
        runs = [cls(path.parent.parent) for path in found]
        return sorted(runs, key=lambda run: run.run_dir.parts[-2:], reverse=True)

    @classmethod
    def of_checkpoint(cls, checkpoint_path: str | os.PathLike[str]) -> RunPaths | None:
        """Return the run of a checkpoint file, or None if the file is not in the ``checkpoints/`` of a run."""
        directory = Path(checkpoint_path).absolute().parent
        return cls(directory.parent) if directory.name == "checkpoints" else None

    @classmethod
    def of_adapter(cls, adapter_dir: str | os.PathLike[str]) -> RunPaths | None:
        """Return the run of an adapter directory, or None if the directory is not in a run."""
        directory = Path(adapter_dir).absolute()
        is_in_run = directory.name == "model_artifacts" and directory.parent.name == "lora_adapters"
        return cls(directory.parent.parent) if is_in_run else None

    @classmethod
    def of_directory(cls, directory: str | os.PathLike[str]) -> RunPaths:
        """Return the run of a run directory or an adapter directory."""
        return cls.of_adapter(directory) or cls(Path(directory))

    @classmethod
    def predictions_path(cls, adapter_dir: str | os.PathLike[str] | None, prompts_path: str) -> Path:
        """Return a new path for completions in the adapter's run, or in the working directory without a run."""
        run = cls.of_adapter(adapter_dir) if adapter_dir is not None else None
        stem = Path(prompts_path).name.split(".jsonl")[0].replace("*", "")
        timestamp = datetime.now().strftime(TIMESTAMP_FORMAT)
        directory = run.run_dir / "predictions" if run is not None else Path(".")
        return directory / f"{stem}_{timestamp}.predictions.jsonl"

    @property
    def games(self) -> GamesPaths:
        """Games that the adapter played in the last test."""
        return GamesPaths(self.run_dir / "games")

    @property
    def artifacts_dir(self) -> Path:
        """Adapter: weights, config, metadata, tokenizer files, model card."""
        return self.run_dir / "lora_adapters" / "model_artifacts"

    @property
    def checkpoints_dir(self) -> Path:
        """Trainer state to resume from, without base weights."""
        return self.run_dir / "checkpoints"

    @property
    def last_checkpoint_path(self) -> Path:
        """Newest checkpoint."""
        return self.checkpoints_dir / "last.ckpt"

    @property
    def lock_path(self) -> Path:
        """Lock file held by the process that writes to the run."""
        return self.run_dir / ".lock"

    @property
    def config_path(self) -> Path:
        """Resolved config."""
        return self.run_dir / "config.yaml"

    @property
    def metrics_path(self) -> Path:
        """Logged metrics, one row per step."""
        return self.run_dir / "metrics.csv"

    @property
    def validations_path(self) -> Path:
        """Sample rows and confusion matrix of each validation, one line per validation."""
        return self.run_dir / "validations.jsonl"

    @property
    def val_games_path(self) -> Path:
        """Games played at the last validation."""
        return self.run_dir / "val_games.jsonl"

    @property
    def rounds_dir(self) -> Path:
        """Rows of the rounds of imitation."""
        return self.run_dir / "rounds"

    def round_path(self, number: int) -> Path:
        """Return the file of a round, counted from 0."""
        return self.rounds_dir / f"{number:03}.jsonl"

    @property
    def tensorboard_dir(self) -> Path:
        """TensorBoard event files."""
        return self.run_dir / "tensorboard"

    @property
    def report_path(self) -> Path:
        """HTML report of the run."""
        return self.run_dir / "report.html"


@dataclass(frozen=True)
class GamesPaths:
    """Paths of the games of one test, derived from their directory."""

    games_dir: Path

    @classmethod
    def of_adapters(cls, adapter_dirs: Sequence[str | os.PathLike[str]]) -> GamesPaths:
        """Return the games of one adapter's run; without a run, or with several adapters, a new directory."""
        run = RunPaths.of_adapter(adapter_dirs[0]) if len(adapter_dirs) == 1 else None
        return run.games if run is not None else cls(Path(f"games_{datetime.now().strftime(TIMESTAMP_FORMAT)}"))

    @property
    def games_path(self) -> Path:
        """Games, one per line."""
        return self.games_dir / "games.jsonl"

    @property
    def table_path(self) -> Path:
        """Statistics of all players."""
        return self.games_dir / "table.json"

    def replay_path(self, which: str, file_type: str) -> Path:
        """Return the path of one replay.

        Args:
            which: ``best``, ``median`` or ``worst``.
            file_type: ``gif`` or ``html``.
        """
        return self.games_dir / f"{which}.{file_type}"

    def of_player(self, player: str) -> GamesPaths:
        """Return the paths of one player's replays, for tests with several adapters."""
        return GamesPaths(self.games_dir / _UNSAFE_CHARS.sub("_", player))


def sibling_lock_path(directory: str | os.PathLike[str]) -> Path:
    """Return the lock file of a directory that cannot contain it, such as one that is replaced as a whole."""
    directory = Path(os.path.realpath(directory))
    return directory.with_name(f".{directory.name}.lock")


def distinct_names(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return short names for directories, made of the parts in which their paths differ.

    Args:
        paths: Different directories; an adapter in a run is identified by the run's timestamp and name.

    Returns:
        One name per directory, safe as a file name.
    """
    parts = [_identifying_parts(path) for path in paths]
    num_front = len(os.path.commonprefix(parts))  # noqa: RUF071 compares parts, not characters
    num_back = len(os.path.commonprefix([p[num_front:][::-1] for p in parts]))  # noqa: RUF071
    middles = [p[num_front : len(p) - num_back] for p in parts]
    if len({len(middle) for middle in middles}) == 1:
        differs = [len(set(items)) > 1 for items in zip(*middles, strict=True)]
        middles = [tuple(itertools.compress(middle, differs)) for middle in middles]
    names = [_UNSAFE_CHARS.sub("_", "_".join(middle) or p[-1]) for middle, p in zip(middles, parts, strict=True)]
    return [name if names.count(name) == 1 else f"{name}_{names[:i].count(name) + 1}" for i, name in enumerate(names)]


def _identifying_parts(path: str | os.PathLike[str]) -> tuple[str, ...]:
    run = RunPaths.of_adapter(path)
    if run is None:
        return Path(path).absolute().parts
    return (*run.run_dir.parts[:-2], run.run_dir.parts[-2].removeprefix(_RUN_PREFIX), run.run_dir.name)


def shipped_configs() -> dict[str, Path]:
    """Return the configs of the package by file name, from the checkout or the installed wheel."""
    package = Path(__file__).parent
    for directory in (package / "configs", package.parent / "configs"):
        if directory.is_dir():
            return {path.name: path for path in sorted(directory.glob("*.yaml"))}
    return {}


def find_config(name: str) -> Path:
    """Return the path of a config, given as a path or as the name of a shipped config.

    Raises:
        UserError: If it is neither; the message lists the shipped configs.
    """
    if os.path.isfile(name):  # Path.is_file raises for names that are too long
        return Path(name)
    shipped = shipped_configs()
    if name in shipped:
        return shipped[name]
    if os.path.exists(name):
        raise UserError(f"--config {name}: not a regular file. Name a YAML file.")
    hint = did_you_mean(f"{name.removesuffix('.yaml')}.yaml", shipped)
    raise UserError(
        f"--config {name}: no such file in {Path.cwd()} or among the shipped configs ({', '.join(shipped)}).{hint}"
    )


def newest_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """Return the checkpoint in a directory that was written last, or None if there is none."""
    paths = [path for path in Path(directory).glob("*.ckpt") if path.is_file()]
    return max(paths, key=lambda path: path.stat().st_mtime_ns, default=None)


def display_path(path: str | os.PathLike[str]) -> str:
    """Return a path for messages: relative to the working directory if it is below it."""
    path = Path(path)
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def cache_dir() -> Path:
    """Return the root of the cache: ``$SNAKE_LORA_PL_CACHE``, or the platform's cache directory of the user."""
    override = os.environ.get(CACHE_ENV)
    return Path(override).expanduser() if override else platformdirs.user_cache_path("snake_lora_pl", appauthor=False)


def base_model_cache_dir(short_name: str) -> Path:
    """Return the Hugging Face directory of a base model with a short name."""
    return cache_dir() / "base_models" / short_name


def generated_data_path(
    grid_size: int,
    teacher: str,
    style: str,
    num_games: int,
    noise: float,
    seed: int,
    noise_moves: str = "legal",
    augment: str = "none",
) -> Path:
    """Return the path of a generated data set, which contains the settings that generate it."""
    moves = "" if noise_moves == "legal" else f"-{noise_moves}"
    symmetries = "" if augment == "none" else f"_symmetries-{augment}"
    name = f"{teacher}_games-{num_games}_noise-{noise:g}{moves}{symmetries}_seed-{seed}.jsonl"
    return _row_cache_dir() / "datasets" / f"grid-size-{grid_size}" / style / name


def encoded_rows_dir(key: str) -> Path:
    """Return the directory of the encoded rows of a data set, given the hash of everything they depend on."""
    return _row_cache_dir() / "encoded_rows" / key


def _row_cache_dir() -> Path:
    return _temporary_row_cache.get() or cache_dir()


@contextlib.contextmanager
def temporary_row_cache() -> Iterator[Path]:
    """Keep generated and encoded rows in a temporary directory for the block; base models stay in the cache."""
    with tempfile.TemporaryDirectory(prefix="snake_lora_pl_rows_", ignore_cleanup_errors=True) as directory:
        token = _temporary_row_cache.set(Path(directory))
        try:
            yield Path(directory)
        finally:
            _temporary_row_cache.reset(token)
