"""``python -m snake_lora_pl COMMAND``; ``COMMANDS`` maps each command to the module that runs it.

A module is imported when its command runs. The training commands import Lightning, which takes seconds; the list of
commands, a cached help text and a mistyped command do not wait for it.
"""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import sys
import textwrap
from collections.abc import Callable
from importlib import metadata

from snake_lora_pl.cli.help import help_text
from snake_lora_pl.console import wrap_for_terminal
from snake_lora_pl.errors import UserError, did_you_mean
from snake_lora_pl.program import LIGHT_COMMANDS, LIGHTNING_COMMANDS, PROG, RANK_VARIABLES
from snake_lora_pl.secrets import mask_secrets
from snake_lora_pl.untrusted import printable

# The function `run(arguments)` of the module runs the command and returns the exit code. The first four share a module,
# whose `run` takes the command as the first argument.
COMMANDS = {
    "fit": "snake_lora_pl.cli.run",
    "validate": "snake_lora_pl.cli.run",
    "test": "snake_lora_pl.cli.run",
    "predict": "snake_lora_pl.cli.run",
    "memory": "snake_lora_pl.cli.commands.memory",
    "generate": "snake_lora_pl.cli.commands.generate",
    "audit": "snake_lora_pl.cli.commands.audit",
    "adapters": "snake_lora_pl.cli.commands.adapters",
    "watch": "snake_lora_pl.cli.commands.watch",
    "report": "snake_lora_pl.cli.commands.report",
    "merge": "snake_lora_pl.cli.commands.merge",
    "export": "snake_lora_pl.cli.commands.export",
    "push": "snake_lora_pl.cli.commands.push",
    "completion": "snake_lora_pl.cli.commands.completion",
}

# Of Lightning, which reads the seed from the environment in the ranks that it launches.
_MAX_SEED = 2**32 - 1

EXIT_USER_ERROR = 2
# As in shells: 128 plus the number of the signal.
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def main(argv: list[str] | None = None) -> int:
    """Run one command; print a user error as one line on stderr.

    Args:
        argv: Arguments without the program's name; None for those of the process.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if argv is None else argv
    try:
        try:
            return _run(arguments)
        finally:
            # While the interpreter shuts down, an error of a closed pipe could not be caught; --help raises SystemExit.
            sys.stdout.flush()
    except UserError as error:
        print(wrap_for_terminal(f"error: {printable(mask_secrets(str(error), arguments))}"), file=sys.stderr)
        return EXIT_USER_ERROR
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe. Python would report the error again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"error: {printable(str(error.filename))}: the file name is too long", file=sys.stderr)
        return EXIT_USER_ERROR
    except ValueError as error:
        if str(error) != "embedded null byte":
            raise
        print("error: a file name contains a null byte", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(arguments: list[str]) -> int:
    command, *options = arguments or ["--help"]
    if command in ("-h", "--help"):
        print(_overview())
        return 0
    if command == "--version":
        print(metadata.version("snake_lora_pl"))
        return 0
    _check_environment()
    if command not in COMMANDS:
        hint = did_you_mean(command, COMMANDS)
        raise UserError(f"unknown command '{command}'. Commands: {', '.join(COMMANDS)}.{hint}")
    if command in LIGHTNING_COMMANDS and options and options[-1] in ("-h", "--help"):
        print(help_text(command), end="")
        return 0
    run: Callable[[list[str]], int] = importlib.import_module(COMMANDS[command]).run
    return run(arguments if COMMANDS[command] == "snake_lora_pl.cli.run" else options)


def _check_environment() -> None:
    """Check what libraries assume while they are imported, where they would fail with an unclear error.

    Raises:
        UserError: If the working directory does not exist, or a launcher's rank or Lightning's seed is not a number.
    """
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError("the working directory has been removed. Change to one that exists.") from error
    for name in RANK_VARIABLES:
        if not os.environ.get(name, "0").isdecimal():
            raise UserError(f"the environment variable {name}={os.environ[name]} is not a number. Unset it.")
    seed = os.environ.get("PL_GLOBAL_SEED", "0")
    if not seed.isdecimal() or int(seed) > _MAX_SEED:
        raise UserError(
            f"the environment variable PL_GLOBAL_SEED={seed} is not a number between 0 and {_MAX_SEED:,}. Unset it and "
            "set --seed_everything."
        )


def _overview() -> str:
    descriptions = LIGHTNING_COMMANDS | LIGHT_COMMANDS
    width = max(map(len, COMMANDS))
    columns = shutil.get_terminal_size().columns
    wrapper = textwrap.TextWrapper(max(columns, 40), subsequent_indent=" " * (width + 4), break_on_hyphens=False)
    commands = "\n".join(wrapper.fill(f"  {command:<{width}}  {descriptions[command]}") for command in COMMANDS)
    return (
        f"usage: {PROG} COMMAND [options]\n\n{commands}\n\n"
        f"{PROG} COMMAND --help lists its options.\n"
        f"First run:\n{PROG} fit --config balanced.yaml --config quickstart.yaml"
    )


if __name__ == "__main__":
    sys.exit(main())
