"""Command lines whose mistakes are one line, with the nearest option that there is."""

from __future__ import annotations

import argparse
import difflib
from typing import Any, NoReturn

from snake_lora_pl.errors import UserError
from snake_lora_pl.program import LIGHT_VERBS, PROG


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


class _Once(argparse.Action):
    """Takes a value, and not another in its place: who names two means both."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"takes one {option_string}")
        setattr(namespace, self.dest, values)


def add_adapter_argument(parser: Parser) -> None:
    """The option that names an adapter."""
    parser.add_argument(
        "--adapter", required=True, action=_Once, metavar="DIR", help="adapter directory: the model_artifacts of a run"
    )


def add_adapter_arguments(parser: Parser) -> None:
    """The options that name an adapter and say how its base is loaded."""
    add_adapter_argument(parser)
    parser.add_argument(
        "--base_model",
        metavar="NAME",
        help="where its base model lies now: a short name, a directory or a hub id; without it where it was trained on",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="let code that comes with the base model run")
