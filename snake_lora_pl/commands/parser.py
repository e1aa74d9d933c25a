"""Command lines whose mistakes are one line, with the nearest option that there is."""

from __future__ import annotations

import argparse
import difflib
from typing import NoReturn

from snake_lora_pl.errors import UserError
from snake_lora_pl.verbs import LIGHT_VERBS, PROG


class _DefaultsFormatter(argparse.HelpFormatter):
    """Adds the default to the help of options that have one to speak of."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.help is None or action.default in (None, False, argparse.SUPPRESS):
            return action.help
        return f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """Parses the arguments of one verb.

    Args:
        verb: One of ``LIGHT_VERBS``.
        epilog: What stands below the options.
    """

    def __init__(self, verb: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=f"{PROG} {verb}",
            description=LIGHT_VERBS[verb],
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=_DefaultsFormatter,
        )

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        """Parse arguments.

        Raises:
            UserError: If an option is unknown, missing or has a value it cannot have.
        """
        parsed, unknown = self.parse_known_args(arguments)
        if unknown:
            name = unknown[0].partition("=")[0]
            options = [option for action in self._actions for option in action.option_strings if option != "-h"]
            near = difflib.get_close_matches(name, options, n=1)
            hint = f" Did you mean {near[0]}?" if near else f" Options: {', '.join(sorted(options))}."
            raise UserError(f"{self.prog}: unknown argument {name!r}.{hint}")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Report a mistake in one line, without the usage."""
        raise UserError(f"{self.prog}: {message}. See {self.prog} --help.")
