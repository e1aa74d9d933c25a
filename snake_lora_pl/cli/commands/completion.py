"""``completion``: a script with which a shell completes commands, options, choices, shipped configs and files."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Sequence
from typing import Any

from snake_lora_pl.cli.argparse_internals import parser_actions
from snake_lora_pl.cli.commands.light_parser import CommandParser
from snake_lora_pl.cli.text_cache import cached_text
from snake_lora_pl.errors import UserError
from snake_lora_pl.paths import shipped_configs
from snake_lora_pl.program import LIGHT_COMMANDS, LIGHTNING_COMMANDS, SCRIPT

SHELLS = ("bash", "zsh")

_TAKES_PATHS = re.compile(r"\b(\w*_path|\w*_dir|adapter|base_model|converter|files|out|root)$")
# Shell function that completes to shipped configs and files.
_CONFIG_FUNCTION = "_snake_lora_config_file"
_CONFIG_FUNCTIONS = {
    "bash": '{name}() {{ compgen -W "{configs}" -- "$1"; compgen -f -- "$1"; }}',
    "zsh": "{name}() {{ _alternative 'shipped:shipped config:({configs})' 'files:file:_files' }}",
}


def run(arguments: Sequence[str]) -> int:
    """Print the script.

    Returns:
        The exit code.

    Raises:
        UserError: If the shell is not one of ``SHELLS``.
    """
    options = build_parser().parse(arguments)
    if options.shell not in SHELLS:
        raise UserError(f"completion: unknown shell '{options.shell}'. Shells: {', '.join(SHELLS)}.")
    print(cached_text(f"completion-{options.shell}", lambda: completion_script(options.shell)))
    return 0


def build_parser() -> CommandParser:
    """Return the parser of this command."""
    parser = CommandParser(
        "completion", epilog=f'For this session: eval "$({SCRIPT} completion bash)". Completes {SCRIPT}.'
    )
    parser.add_argument("shell", metavar="SHELL", help=f"one of {', '.join(SHELLS)}")
    return parser


def completion_script(shell: str) -> str:
    """Return a script that makes ``shell`` complete ``SCRIPT``, from the parsers of all commands."""
    import shtab

    from snake_lora_pl.cli.commands.memory import training_parsers
    from snake_lora_pl.console import configure_logging

    configure_logging()
    parsers: dict[str, argparse.ArgumentParser] = {**training_parsers()}
    for command in LIGHT_COMMANDS:
        parsers[command] = importlib.import_module(f"snake_lora_pl.cli.commands.{command}").build_parser()
    program = argparse.ArgumentParser(SCRIPT)
    subparsers = program.add_subparsers()
    for command, description in (LIGHTNING_COMMANDS | LIGHT_COMMANDS).items():
        subparser = subparsers.add_parser(command, help=description, add_help=False, parents=[parsers[command]])
        for action in parser_actions(subparser):
            _set_completion(action, shtab.FILE)
    function = _CONFIG_FUNCTIONS[shell].format(name=_CONFIG_FUNCTION, configs=" ".join(shipped_configs()))
    script: str = shtab.complete(program, shell, preamble=function)
    return script


def _set_completion(action: argparse.Action, files: dict[str, Any]) -> None:
    if "--config" in action.option_strings:
        action.complete = dict.fromkeys(SHELLS, _CONFIG_FUNCTION)  # type: ignore[attr-defined]
    elif action.choices is None and isinstance(action.metavar, str) and action.metavar.startswith("{"):
        # jsonargparse shows the values of a Literal, an Enum and a bool as the metavar.
        action.choices = action.metavar.strip("{}").split(",")
    elif action.choices is None and _TAKES_PATHS.search(action.dest):
        action.complete = files  # type: ignore[attr-defined]
    if action.help not in (None, argparse.SUPPRESS):
        action.help = str(action.help).partition(". ")[0]  # a shell shows one line
