"""Run directory of ``fit``: resumed, inherited from the process that launched this one, or new."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from jsonargparse import Namespace

from snake_lora_pl.data.datamodule import SnakeJSONLDataModule
from snake_lora_pl.durable import remove_leftovers, sole_use
from snake_lora_pl.errors import UserError
from snake_lora_pl.paths import RunPaths, display_path, sibling_lock_path
from snake_lora_pl.program import is_rank_zero

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
        config.ckpt_path = None if run is None else str(run.last_checkpoint_path)
        return run
    if config.ckpt_path is None:
        return None
    if not Path(config.ckpt_path).is_file():
        raise UserError(f"--ckpt_path {config.ckpt_path}: no such file. 'last' takes the checkpoint of the newest run.")
    return RunPaths.of_checkpoint(config.ckpt_path)


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
