"""Entry point of the training commands: signals, exit codes, and library errors translated for the user.

Ctrl-C and SIGTERM end a command at once here; while a run trains, ``training.callbacks.interruption`` finishes the
step and saves a checkpoint first.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.distributed import DistNetworkError

from snake_lora_pl.cli.app import SnakeCLI
from snake_lora_pl.cli.run_directory import claimed_run_scope
from snake_lora_pl.console import configure_logging, ignore_known_warnings
from snake_lora_pl.errors import UserError, one_line
from snake_lora_pl.paths import RunPaths, display_path
from snake_lora_pl.program import PROG, is_rank_zero
from snake_lora_pl.training.callbacks.interruption import Interrupted, stop_immediately

T = TypeVar("T", bound=SnakeCLI)


def run(arguments: Sequence[str], cli_class: type[SnakeCLI] = SnakeCLI) -> int:
    """Run fit, validate, test or predict.

    Args:
        arguments: The command and its options.
        cli_class: Class that runs the command.

    Returns:
        The exit code: 0, or 128 plus the number of the signal that ended the command.

    Raises:
        UserError: For an error that the user can fix.
    """
    configure_logging(is_rank_zero=is_rank_zero())
    ignore_known_warnings()
    with _sys_argv(arguments), _interruptible():
        try:
            run_cli(arguments, cli_class)
        except Interrupted as stop:
            if is_rank_zero():
                print(f"{stop}. {_resume_hint(stop.checkpoint_path)}".strip(), file=sys.stderr)
            return 128 + stop.signum
    return 0


def run_cli(args: Sequence[str] | Mapping[str, Mapping[str, Any]], cli_class: type[T]) -> T:
    """Run a command in this process and return the CLI with its trainer, module and data.

    Args:
        args: The command and its options, as ``SnakeCLI`` takes them.
        cli_class: Class that runs the command.

    Raises:
        UserError: For an error that the user can fix.
    """
    with _user_errors(), claimed_run_scope(), contextlib.ExitStack() as resources:
        return cli_class(args, resources)


@contextlib.contextmanager
def _sys_argv(arguments: Sequence[str]) -> Iterator[None]:
    """Set the arguments that Lightning repeats when it launches further ranks."""
    argv, sys.argv = sys.argv, [sys.argv[0], *arguments]
    try:
        yield
    finally:
        sys.argv = argv


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """End the command on SIGINT and SIGTERM until the callback ``Interruption`` handles them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, stop_immediately) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _resume_hint(checkpoint_path: Path | None) -> str:
    if checkpoint_path is None:
        return ""
    run = RunPaths.of_checkpoint(checkpoint_path)
    ckpt_option = f"--ckpt_path {shlex.quote(display_path(checkpoint_path))}"
    if run is None or not run.config_path.is_file():
        return f"Resume with the same command and {ckpt_option}"
    return f"Resume with: {PROG} fit --config {shlex.quote(display_path(run.config_path))} {ckpt_option}"


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """Translate errors of libraries that the user can fix.

    Raises:
        UserError: In place of such an error.
    """
    try:
        yield
    except MisconfigurationException as error:
        raise UserError(" ".join(str(error).split())) from error
    except OSError as error:
        # From a logger of the user's, for example; this package explains its own failed writes where they happen.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = f"{error.filename}: " if error.filename is not None else ""
        raise UserError(f"{place}{error.strerror}. Free space, then resume with --ckpt_path last.") from error
    except DistNetworkError as error:
        address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise UserError(
            f"the ranks cannot connect to {address} (MASTER_ADDR:MASTER_PORT): {one_line(error)}. Choose an address of "
            "the first machine that the others reach, and a free port; on a single machine leave both unset."
        ) from error
    except RuntimeError as error:
        # These errors can be told apart by their messages only.
        if str(error).startswith("Early stopping conditioned on metric"):
            raise UserError(f"early_stopping.monitor: {' '.join(str(error).split())}") from error
        if re.search(r"Connection (closed|reset) by peer|remote process exited", str(error)):
            raise UserError(
                "another rank exited; see its output above. If it printed nothing, the system may have killed it for "
                "lack of memory. Resume with --ckpt_path last."
            ) from error
        raise
