"""``python -m snake_lora_pl VERB``: this page is the map of the commands.

The verbs that train import Lightning, which takes seconds; this front end does not, so that a list of verbs, a help
text or a mistyped verb answers at once.
"""

from __future__ import annotations

import difflib
import sys
from importlib import metadata

from snake_lora_pl.errors import UserError
from snake_lora_pl.verbs import LIGHTNING_VERBS, PROG, help_path

EXIT_USER_ERROR = 2


def main(argv: list[str] | None = None) -> int:
    """Run one command; a user's mistake is one line on stderr and exit code 2.

    Args:
        argv: Arguments without the program's name; None takes the process's.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if argv is None else argv
    try:
        return _dispatch(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def _dispatch(arguments: list[str]) -> int:
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        print(_overview())
        return 0
    if verb == "--version":
        print(metadata.version("snake_lora_pl"))
        return 0
    if verb not in LIGHTNING_VERBS:
        near = difflib.get_close_matches(verb, LIGHTNING_VERBS, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise UserError(f"unknown command '{verb}'. Commands: {', '.join(LIGHTNING_VERBS)}.{hint}")
    if arguments[1:] and arguments[-1] in ("-h", "--help"):
        print(help_path(verb).read_text(encoding="utf-8"), end="")
        return 0
    from snake_lora_pl.cli import run

    return run(arguments)


def _overview() -> str:
    width = max(map(len, LIGHTNING_VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in LIGHTNING_VERBS.items())
    return (
        f"usage: {PROG} VERB [options]\n\n{verbs}\n\n"
        f"{PROG} VERB --help lists a verb's options.\n"
        f"First run: {PROG} fit --config balanced.yaml --config quickstart.yaml"
    )


if __name__ == "__main__":
    sys.exit(main())
