"""``python -m snake_lora_pl VERB``: this page is the map of the commands.

The verbs that train import Lightning, which takes seconds; this front end does not, so that a list of verbs, a help
text or a mistyped verb answers at once.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import shutil
import sys
import textwrap
from importlib import metadata

from snake_lora_pl.console import wrap_for_terminal
from snake_lora_pl.errors import UserError
from snake_lora_pl.program import LIGHT_VERBS, LIGHTNING_VERBS, PROG, RANK_VARIABLES, help_path
from snake_lora_pl.secrets import mask_secrets
from snake_lora_pl.untrusted import printable

EXIT_USER_ERROR = 2
# As shells have it: 128 and the number of the signal.
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def main(argv: list[str] | None = None) -> int:
    """Run one command; a user's mistake is one line on stderr and exit code 2.

    Args:
        argv: Arguments without the program's name; None takes the process's.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if argv is None else argv
    try:
        try:
            return _dispatch(arguments)
        finally:
            # Here and not when the interpreter ends, where a closed pipe can no longer be caught; also after --help.
            sys.stdout.flush()
    except UserError as error:
        print(wrap_for_terminal(f"error: {printable(mask_secrets(str(error), arguments))}"), file=sys.stderr)
        return EXIT_USER_ERROR
    except BrokenPipeError:
        # Who read the output, ``head`` say, has seen enough. Python would complain once more on closing it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"error: {printable(str(error.filename))}: too long for the name of a file", file=sys.stderr)
        return EXIT_USER_ERROR
    except ValueError as error:
        if str(error) != "embedded null byte":
            raise
        print("error: a null byte in the name of a file", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _dispatch(arguments: list[str]) -> int:
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        print(_overview())
        return 0
    if verb == "--version":
        print(metadata.version("snake_lora_pl"))
        return 0
    _check_surroundings()
    if verb in LIGHT_VERBS:
        command = importlib.import_module(f"snake_lora_pl.cli.commands.{verb}")
        return command.run(arguments[1:])
    if verb not in LIGHTNING_VERBS:
        verbs = [*LIGHTNING_VERBS, *LIGHT_VERBS]
        near = difflib.get_close_matches(verb, verbs, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise UserError(f"unknown command '{verb}'. Commands: {', '.join(verbs)}.{hint}")
    if arguments[1:] and arguments[-1] in ("-h", "--help"):
        print(help_path(verb).read_text(encoding="utf-8"), end="")
        return 0
    from snake_lora_pl.cli.app import run

    return run(arguments)


def _check_surroundings() -> None:
    """Look at what libraries take for granted while they are imported, and would say nothing clear of.

    Raises:
        UserError: If the working directory is gone, or what a launcher tells of this process's place is no number.
    """
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError("the working directory has been removed. Change into one that exists.") from error
    for name in RANK_VARIABLES:
        if not os.environ.get(name, "0").isdecimal():
            raise UserError(f"{name}={os.environ[name]} in the environment is no number. Without a launcher, unset it.")


def _overview() -> str:
    texts = LIGHTNING_VERBS | LIGHT_VERBS
    width = max(map(len, texts))
    columns = shutil.get_terminal_size().columns
    wrapper = textwrap.TextWrapper(max(columns, 40), subsequent_indent=" " * (width + 4), break_on_hyphens=False)
    verbs = "\n".join(wrapper.fill(f"  {verb:<{width}}  {text}") for verb, text in texts.items())
    return (
        f"usage: {PROG} VERB [options]\n\n{verbs}\n\n"
        f"{PROG} VERB --help lists a verb's options.\n"
        f"First run:\n{PROG} fit --config balanced.yaml --config quickstart.yaml"
    )


if __name__ == "__main__":
    sys.exit(main())
