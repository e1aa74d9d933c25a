"""Run directory of ``fit``: resumed, inherited from the process that launched this one, or new."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import yaml
from jsonargparse import Namespace

from snake_lora_pl.data.datamodule import SnakeJSONLDataModule
from snake_lora_pl.durable import remove_leftovers, sole_use
from snake_lora_pl.errors import UserError
from snake_lora_pl.paths import RunPaths, display_path, newest_checkpoint, sibling_lock_path
from snake_lora_pl.program import is_rank_zero
from snake_lora_pl.untrusted import load_yaml, read_text

# Passes the directory on to the processes that Lightning launches for the same run.
RUN_DIR_ENV = "SNAKE_LORA_PL_RUN_DIR"


def resolve_run(config: Namespace) -> RunPaths:
    """Return the run that ``fit`` writes, and replace ``ckpt_path=last|auto`` by the checkpoint's path.

    Args:
        config: Options of ``fit``.

    Raises:
        UserError: If there is no such checkpoint, or the directory cannot be created.
    """
    data = SnakeJSONLDataModule(train_path=config.data.train_path, grid_size=config.data.grid_size)
    grid_size = data.resolved_grid_size  # reads the first row
    if (resumed := _resumed_run(config, grid_size)) is not None:
        config.data.template_date = config.data.template_date or _recorded_template_date(resumed)
        return resumed
    if (inherited := os.environ.get(RUN_DIR_ENV)) is not None:
        return RunPaths(Path(inherited))
    if config.dry_run or not is_rank_zero():
        # A placeholder: AdapterCheckpoint.setup broadcasts the directory that the first process claimed.
        return RunPaths.new(config.root, grid_size, config.adapter_name)
    run = RunPaths.claim(config.root, grid_size, config.adapter_name)
    os.environ[RUN_DIR_ENV] = str(run.run_dir)
    return run


def _resumed_run(config: Namespace, grid_size: int) -> RunPaths | None:
    if config.ckpt_path in ("last", "auto"):
        run = RunPaths.latest(config.root, grid_size, config.adapter_name)
        if run is None and config.ckpt_path == "last":
            raise UserError(
                f"--ckpt_path last: no run of '{config.adapter_name}' on a {grid_size}x{grid_size} grid with a "
                f"checkpoint under {display_path(config.root)}. Remove the flag to start a new run, or set --root."
            )
        if run is not None:
            _check_checkpoint(config.ckpt_path, run.last_checkpoint_path)
        config.ckpt_path = None if run is None else str(run.last_checkpoint_path)
        return run
    if config.ckpt_path is None:
        return None
    _check_checkpoint(config.ckpt_path, Path(config.ckpt_path))
    return RunPaths.of_checkpoint(config.ckpt_path)


def _recorded_template_date(run: RunPaths) -> str | None:
    """Return the date in the prompts of a run that is resumed, perhaps on another day."""
    try:
        config = load_yaml(read_text(run.config_path), yaml.safe_load)
    except (OSError, ValueError, yaml.YAMLError):
        return None  # the data module warns if the checkpoint names another date
    data = config.get("data") if isinstance(config, dict) else None
    date = data.get("template_date") if isinstance(data, dict) else None
    return None if date is None else str(date)


def _check_checkpoint(given: str, path: Path) -> None:
    """Check that a checkpoint exists.

    Raises:
        UserError: If it does not; the message names the newest checkpoint in its directory.
    """
    if path.is_file():
        return
    if (newest := newest_checkpoint(path.parent)) is None:
        raise UserError(f"--ckpt_path {given}: no such file. 'last' takes the checkpoint of the newest run.")
    raise UserError(
        f"--ckpt_path {given}: {display_path(path)} does not exist. The newest checkpoint in its directory is "
        f"{newest.name}: set --ckpt_path {shlex.quote(display_path(newest))}"
    )


@contextlib.contextmanager
def locked_run(paths: RunPaths, config: Namespace) -> Iterator[None]:
    """Keep other processes from writing the run's directories, and remove what a killed run left half-written.

    Args:
        paths: The run.
        config: Options of ``fit``; directories set for checkpoints or the adapter are locked too.

    Raises:
        UserError: If another run writes one of them.
    """
    with contextlib.ExitStack() as locks:
        locks.enter_context(sole_use(paths.lock_path))
        remove_leftovers(paths.run_dir, "*")
        for directory in (config.checkpoint.dirpath, config.checkpoint.adapter_dir):
            if directory is not None:
                locks.enter_context(_locked_directory(directory))
        yield


@contextlib.contextmanager
def _locked_directory(directory: str) -> Iterator[None]:
    lock_path = sibling_lock_path(directory)
    try:
        lock_path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory}: cannot be created ({error.strerror}). Choose a writable directory.") from error
    with sole_use(lock_path, directory, instead="choose another one"):
        yield


@contextlib.contextmanager
def claimed_run_scope() -> Iterator[None]:
    """Forget the run directory that was claimed meanwhile, and remove it if nothing was written to it."""
    is_inherited = RUN_DIR_ENV in os.environ
    try:
        yield
    finally:
        if not is_inherited and (claimed := os.environ.pop(RUN_DIR_ENV, None)) is not None:
            RunPaths(Path(claimed)).remove_if_empty()
