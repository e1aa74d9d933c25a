"""Parser of the light commands: one-line errors that name the nearest option."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from typing_extensions import override

from snake_lora_pl.errors import UserError, did_you_mean
from snake_lora_pl.program import LIGHT_COMMANDS, PROG


class CommandParser(argparse.ArgumentParser):
    """Parser of one light command.

    Args:
        command: One of ``LIGHT_COMMANDS``.
        epilog: Text below the options.
    """

    def __init__(self, command: str, epilog: str | None = None) -> None:
        self._options: list[str] = []
        super().__init__(
            prog=f"{PROG} {command}", description=LIGHT_COMMANDS[command], epilog=epilog, allow_abbrev=False
        )

    @override
    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
        """Add an argument; a default other than None and False is appended to its help."""
        if kwargs.get("default") not in (None, False, argparse.SUPPRESS):
            kwargs["help"] += " (default: %(default)s)"
        self._options += [name for name in names if name.startswith("--")]
        return super().add_argument(*names, **kwargs)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse arguments.

        Raises:
            UserError: If an option is unknown or missing, or its value is invalid.
        """
        parsed, unknown = self.parse_known_args(arguments)
        if unknown:
            name = unknown[0].partition("=")[0]
            hint = did_you_mean(name, self._options) or f" Options: {', '.join(sorted(self._options))}."
            raise UserError(f"{self.prog}: unknown argument '{name}'.{hint}")
        return parsed

    @override
    def error(self, message: str) -> NoReturn:
        """Raise the error as one line, without the usage.

        Raises:
            UserError: Always.
        """
        raise UserError(f"{self.prog}: {message}. See {self.prog} --help.")


class _SingleValue(argparse.Action):
    """Stores a value, and refuses a second one."""

    @override
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"takes one {option_string}")
        setattr(namespace, self.dest, values)


def add_adapter_argument(parser: CommandParser) -> None:
    """Add the option that names an adapter."""
    parser.add_argument(
        "--adapter",
        required=True,
        action=_SingleValue,
        metavar="DIR",
        help="adapter directory: model_artifacts of a run",
    )


def add_adapter_arguments(parser: CommandParser) -> None:
    """Add the options that name an adapter and its base model."""
    add_adapter_argument(parser)
    parser.add_argument(
        "--base_model",
        metavar="NAME",
        help="its base model: a short name, a directory or a Hub id; without it, the base that it was trained on",
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="allow code that comes with the base model to run"
    )
