"""Parser of the training commands: one-line errors that name the nearest key, and configs by path or shipped name."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import (  # type: ignore[attr-defined,unused-ignore]
    ActionConfigFile,
    DefaultHelpFormatter,
    Namespace,
    get_loader,
    set_loader,
)
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from snake_lora_pl.cli.argparse_internals import command_parsers, parser_actions
from snake_lora_pl.data.datamodule import SnakeJSONLDataModule
from snake_lora_pl.errors import UserError, did_you_mean
from snake_lora_pl.paths import find_config, shipped_configs
from snake_lora_pl.untrusted import load_yaml, read_text

HELP_WIDTH = 80

# Name under which jsonargparse knows the loader of configs and of values in flags.
_PARSER_MODE = "checked_yaml"


def _load_checked_yaml(text: str) -> Any:
    return load_yaml(text, get_loader("yaml"))


set_loader(_PARSER_MODE, _load_checked_yaml, exceptions=(yaml.YAMLError,))


class ShippedConfigFile(ActionConfigFile):
    """``--config NAME``: a path, else the name of a config shipped with the package."""

    @override
    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Find the file and let jsonargparse read it.

        Raises:
            UserError: If the file does not exist or is not valid; the message names it.
        """
        path = find_config(values)
        try:
            read_text(path)
            super().__call__(parser, cfg, str(path), option_string)  # type: ignore[no-untyped-call,unused-ignore]
        except (ValueError, OSError) as error:
            raise UserError(f"--config {path}: {error}") from error


class _FixedWidthHelp(DefaultHelpFormatter):
    """Help that is independent of the terminal, so that it can be cached."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, **{**kwargs, "width": HELP_WIDTH})  # type: ignore[no-untyped-call,unused-ignore]


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line that names the nearest valid key.

    Args:
        command: Command that the parser is for; None for the parser of all commands.
        kwargs: Arguments of jsonargparse's parser.
    """

    def __init__(self, *args: Any, command: str | None = None, **kwargs: Any) -> None:
        self.command = command
        # An abbreviated flag is usually a mistyped one.
        defaults = {"parser_mode": _PARSER_MODE, "formatter_class": _FixedWidthHelp, "allow_abbrev": False}
        super().__init__(*args, **{**defaults, **kwargs})

    @override
    def add_class_arguments(self, theclass: Any, nested_key: str | None = None, **kwargs: Any) -> list[str]:
        if theclass is SnakeJSONLDataModule:
            kwargs["skip"] = {"tokenizer"}  # an object that only Python callers can pass
        names: list[str] = super().add_class_arguments(theclass, nested_key, **kwargs)
        return names

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the error as one line, without the usage.

        Raises:
            UserError: Always.
        """
        raise_user_error(ex)
        raise UserError(self._one_line(message)) from ex

    def _one_line(self, message: str) -> str:
        lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
        text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", " ".join(lines)[:600])
        if group := re.fullmatch(r'Key "(\w+)\.([\w.]+)" not found in namespace\.', text):
            return f"{group[1]} is a group of keys, not a value. Set its keys, such as {group[1]}.{group[2]}."
        known = self._known_keys()
        for quoted, flag in re.findall(r"""["']([\w.]+)["']|--([\w.]+)""", text):
            key = quoted or flag
            if key not in known and (hint := _nearest_key(key, known)):
                return f"{text.rstrip('.')}.{hint}"
        return text

    def _known_keys(self) -> list[str]:
        parsers: list[argparse.ArgumentParser] = [self, *command_parsers(self).values()]
        actions = [action for parser in parsers for action in parser_actions(parser)]
        return [action.dest for action in actions if action.dest and action.dest != "help"]


def _nearest_key(key: str, known: list[str]) -> str:
    if hint := did_you_mean(key, known):
        return hint
    # jsonargparse may name a key relative to its group.
    return next((f" Did you mean '{k}'?" for k in known if did_you_mean(key, [k.rsplit(".", 1)[-1]])), "")


def raise_user_error(error: BaseException | None) -> None:
    """Raise the ``UserError`` among an error and its causes, if there is one."""
    while error is not None:
        if isinstance(error, UserError):
            raise error
        error = error.__cause__ or error.__context__


def append_repeated(arguments: list[str], option: str) -> list[str]:
    """Rewrite ``--option A --option B`` as ``--option A --option+ B``, which jsonargparse collects into a list."""
    return list(_append_repeated(arguments, option))


def _append_repeated(arguments: list[str], option: str) -> Iterator[str]:
    is_first = True
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name == option:
            yield f"{name}{'' if is_first else '+'}{equals}{value}"
            is_first = False
        else:
            yield argument


def config_names(config: Namespace) -> list[str]:
    """Return the config files that a command was given, shipped ones by their short name."""
    shipped = {path.resolve(): name for name, path in shipped_configs().items()}
    given = [Path(str(path)) for path in config.get("config") or []]
    return [shipped.get(path.resolve(), str(path)) for path in given]
