"""Where files go. Nobody else joins the path names of a run or of the cache.

A run lies where upstream's extensions put their models, so that its tools find it::

    ROOT/logs/extensions/models/grid-size-{N}/llm_finetune_v0.03_{YYYYmmdd_HHMMSS}/{adapter_name}/
        report.html  config.yaml  metrics.csv  checkpoints/  lora_adapters/model_artifacts/  games/  ...

The cache holds what can be made again: base models, generated data sets, encoded rows.
"""

from __future__ import annotations

import contextlib
import difflib
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

from snake_lora_pl.errors import UserError

EXTENSION_TYPE = "llm_finetune"
EXTENSION_VERSION = "0.03"
_RUN_PREFIX = f"{EXTENSION_TYPE}_v{EXTENSION_VERSION}_"
_temporary_row_cache: ContextVar[Path | None] = ContextVar("temporary_row_cache", default=None)
_FILE_UNSAFE = re.compile(r"[^\w.+-]+")
TIMESTAMP_FORMAT = "%Y%m%d_%H%M%S"
CACHE_ENV = "SNAKE_LORA_PL_CACHE"


def get_model_path(
    extension_type: str,
    version: str,
    grid_size: int,
    algorithm: str,
    timestamp: str,
    root: str | os.PathLike[str] = ".",
) -> Path:
    """Directory of one trained model, by upstream's convention.

    Args:
        extension_type: Kind of extension, here ``llm_finetune``.
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
    """Every place of one run, derived from the directory ``{adapter_name}/`` that holds it."""

    run_dir: Path

    @classmethod
    def new(
        cls, root: str | os.PathLike[str], grid_size: int, adapter_name: str, timestamp: str | None = None
    ) -> RunPaths:
        """The places of a run that starts now, or at ``timestamp``; nothing is created."""
        timestamp = timestamp or datetime.now().strftime(TIMESTAMP_FORMAT)
        return cls(get_model_path(EXTENSION_TYPE, EXTENSION_VERSION, grid_size, adapter_name, timestamp, root))

    @classmethod
    def claim(cls, root: str | os.PathLike[str], grid_size: int, adapter_name: str) -> RunPaths:
        """Create the directory of a run that starts now; two runs never get the same one.

        Raises:
            UserError: If the directory cannot be created.
        """
        while True:
            run = cls.new(root, grid_size, adapter_name)
            try:
                run.run_dir.mkdir(parents=True)
                return run
            except FileExistsError:
                time.sleep(0.2)  # the name is of this second
            except OSError as error:
                raise UserError(
                    f"--root {root}: {run.run_dir} cannot be created ({error.strerror}). Choose a writable directory."
                ) from error

    def remove_if_empty(self) -> None:
        """Leave no directory behind of a run that failed before it wrote anything; what is not empty stays."""
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
        """The newest run under ``root`` that has a checkpoint to go on from, or None."""
        pattern = get_model_path(EXTENSION_TYPE, EXTENSION_VERSION, grid_size, adapter_name, "*", root)
        runs = [cls(p) for p in Path(root).glob(str(pattern.relative_to(root)))]
        runs = [run for run in runs if run.last_checkpoint_path.is_file()]
        return max(runs, key=lambda run: run.run_dir.parent.name, default=None)

    @classmethod
    def of_checkpoint(cls, checkpoint_path: str | os.PathLike[str]) -> RunPaths | None:
        """The run that a checkpoint file lies in, or None where it does not lie in a run's ``checkpoints/``."""
        directory = Path(checkpoint_path).absolute().parent
        return cls(directory.parent) if directory.name == "checkpoints" else None

    @classmethod
    def of_adapter(cls, adapter_dir: str | os.PathLike[str]) -> RunPaths | None:
        """The run that an adapter directory lies in, or None where it was moved out of one."""
        directory = Path(adapter_dir).absolute()
        inside = directory.name == "model_artifacts" and directory.parent.name == "lora_adapters"
        return cls(directory.parent.parent) if inside else None

    @classmethod
    def of_directory(cls, directory: str | os.PathLike[str]) -> RunPaths:
        """The run that a user names by its directory or by that of its adapter."""
        return cls.of_adapter(directory) or cls(Path(directory))

    @classmethod
    def predictions_path(cls, adapter_dir: str | os.PathLike[str] | None, prompts_path: str) -> Path:
        """A new file for completions: in the adapter's run, or in the working directory where it has none."""
        run = cls.of_adapter(adapter_dir) if adapter_dir is not None else None
        stem = Path(prompts_path).name.split(".jsonl")[0].replace("*", "")
        timestamp = datetime.now().strftime(TIMESTAMP_FORMAT)
        directory = run.run_dir / "predictions" if run is not None else Path(".")
        return directory / f"{stem}_{timestamp}.predictions.jsonl"

    @property
    def games(self) -> GamesPaths:
        """The games that the adapter played last."""
        return GamesPaths(self.run_dir / "games")

    @property
    def artifacts_dir(self) -> Path:
        """The adapter: weights, config, metadata, tokenizer files, model card."""
        return self.run_dir / "lora_adapters" / "model_artifacts"

    @property
    def checkpoints_dir(self) -> Path:
        """Resumable trainer state, without base weights."""
        return self.run_dir / "checkpoints"

    @property
    def last_checkpoint_path(self) -> Path:
        """The newest resumable state."""
        return self.checkpoints_dir / "last.ckpt"

    @property
    def lock_path(self) -> Path:
        """Held by the process that writes the run."""
        return self.run_dir / ".lock"

    @property
    def config_path(self) -> Path:
        """The resolved config of the run."""
        return self.run_dir / "config.yaml"

    @property
    def metrics_path(self) -> Path:
        """Every logged metric, a row a step."""
        return self.run_dir / "metrics.csv"

    @property
    def validations_path(self) -> Path:
        """What the model said at each validation, a line each."""
        return self.run_dir / "validations.jsonl"

    @property
    def val_games_path(self) -> Path:
        """The games that were played last while fitting."""
        return self.run_dir / "val_games.jsonl"

    @property
    def tensorboard_dir(self) -> Path:
        """TensorBoard's event files."""
        return self.run_dir / "tensorboard"

    @property
    def report_path(self) -> Path:
        """The page that shows the run."""
        return self.run_dir / "report.html"


@dataclass(frozen=True)
class GamesPaths:
    """Every place of some games that were played, derived from the directory that holds them."""

    games_dir: Path

    @classmethod
    def of_adapters(cls, adapter_dirs: Sequence[str | os.PathLike[str]]) -> GamesPaths:
        """In the adapter's run; a new directory in the working directory where it has none, or there are several."""
        run = RunPaths.of_adapter(adapter_dirs[0]) if len(adapter_dirs) == 1 else None
        return run.games if run is not None else cls(Path(f"games_{datetime.now().strftime(TIMESTAMP_FORMAT)}"))

    @property
    def games_path(self) -> Path:
        """Every game, a line each."""
        return self.games_dir / "games.jsonl"

    @property
    def table_path(self) -> Path:
        """The figures of all players."""
        return self.games_dir / "table.json"

    def replay_path(self, which: str, kind: str) -> Path:
        """One game to look at.

        Args:
            which: ``best``, ``median`` or ``worst``.
            kind: ``gif`` or ``html``.
        """
        return self.games_dir / f"{which}.{kind}"

    def of_player(self, player: str) -> GamesPaths:
        """The places of what is one player's alone, where several are looked at."""
        return GamesPaths(self.games_dir / _FILE_UNSAFE.sub("_", player))


def sibling_lock_path(directory: str | os.PathLike[str]) -> Path:
    """Held by the process that writes a directory which is no run's, such as one that is replaced as a whole."""
    directory = Path(os.path.realpath(directory))
    return directory.with_name(f".{directory.name}.lock")


def distinct_names(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Short names that tell directories apart: those parts of their paths in which they differ.

    Args:
        paths: Different directories; of a run's adapter, time and name of the run count.

    Returns:
        A name for each, fit for a file's.
    """
    parts = [_telling_parts(path) for path in paths]
    num_front = _num_shared(parts)
    num_back = _num_shared([p[num_front:][::-1] for p in parts])
    middles = [p[num_front : len(p) - num_back] for p in parts]
    if len({len(middle) for middle in middles}) == 1:
        differs = [len(set(items)) > 1 for items in zip(*middles, strict=True)]
        middles = [tuple(itertools.compress(middle, differs)) for middle in middles]
    names = [_FILE_UNSAFE.sub("_", "_".join(middle) or p[-1]) for middle, p in zip(middles, parts, strict=True)]
    return [name if names.count(name) == 1 else f"{name}_{names[:i].count(name) + 1}" for i, name in enumerate(names)]


def _telling_parts(path: str | os.PathLike[str]) -> tuple[str, ...]:
    run = RunPaths.of_adapter(path)
    if run is None:
        return Path(path).absolute().parts
    return (*run.run_dir.parts[:-2], run.run_dir.parts[-2].removeprefix(_RUN_PREFIX), run.run_dir.name)


def _num_shared(sequences: Sequence[Sequence[str]]) -> int:
    """Number of items that all sequences begin with."""
    return next(
        (i for i, items in enumerate(zip(*sequences, strict=False)) if len(set(items)) > 1), min(map(len, sequences))
    )


def shipped_configs() -> dict[str, Path]:
    """The configs that come with the package, by file name: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parent
    for directory in (package / "configs", package.parent / "configs"):
        if directory.is_dir():
            return {path.name: path for path in sorted(directory.glob("*.yaml"))}
    return {}


def find_config(name: str) -> Path:
    """A config file by path, else among those shipped.

    Raises:
        UserError: If it is neither; the message lists the shipped ones.
    """
    if os.path.isfile(name):  # pathlib's raises where the name is too long
        return Path(name)
    shipped = shipped_configs()
    if name in shipped:
        return shipped[name]
    if os.path.exists(name):
        raise UserError(f"--config {name}: is a directory or no regular file. Name a YAML file.")
    near = difflib.get_close_matches(name, [*shipped, *(n.removesuffix(".yaml") for n in shipped)], n=1, cutoff=0.5)
    hint = f" Did you mean {near[0].removesuffix('.yaml')}.yaml?" if near else ""
    raise UserError(
        f"--config {name}: no such file in {Path.cwd()}, nor among the shipped ones: {', '.join(shipped)}.{hint}"
    )


def display_path(path: str | os.PathLike[str]) -> str:
    """A path as a person would type it: relative where it lies below the working directory."""
    path = Path(path)
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def cache_dir() -> Path:
    """Root of the cache: ``$SNAKE_LORA_PL_CACHE``, or the user's cache directory of the platform."""
    override = os.environ.get(CACHE_ENV)
    return Path(override).expanduser() if override else platformdirs.user_cache_path("snake_lora_pl", appauthor=False)


def base_model_cache_dir(short_name: str) -> Path:
    """Where the base model of a short name is kept as a Hugging Face directory."""
    return cache_dir() / "base_models" / short_name


def generated_data_path(grid_size: int, teacher: str, style: str, num_games: int, noise: float, seed: int) -> Path:
    """Where a generated data set is kept; its name says how it was made."""
    name = f"{teacher}_games-{num_games}_noise-{noise:g}_seed-{seed}.jsonl"
    return _row_cache_dir() / "datasets" / f"grid-size-{grid_size}" / style / name


def encoded_rows_dir(key: str) -> Path:
    """Where the encoded rows of one data set are kept, by the hash of all that made them."""
    return _row_cache_dir() / "encoded_rows" / key


def _row_cache_dir() -> Path:
    return _temporary_row_cache.get() or cache_dir()


@contextlib.contextmanager
def temporary_row_cache() -> Iterator[Path]:
    """Let rows that are generated or encoded meanwhile lie in a directory of their own, which is then removed.

    Base models stay where they are.
    """
    with tempfile.TemporaryDirectory(prefix="snake_lora_pl_rows_", ignore_cleanup_errors=True) as directory:
        token = _temporary_row_cache.set(Path(directory))
        try:
            yield Path(directory)
        finally:
            _temporary_row_cache.reset(token)
