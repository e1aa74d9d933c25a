"""``completion``: a script that lets a shell complete verbs, options, their choices and the shipped configs.

The options of the verbs that need Lightning are read off their help texts, which were made ahead: nothing heavy is
imported.
"""

from __future__ import annotations

import argparse
import importlib
import re

import shtab

from snake_lora_pl.cli.commands.parser import Parser
from snake_lora_pl.errors import UserError
from snake_lora_pl.paths import shipped_configs
from snake_lora_pl.program import LIGHT_VERBS, LIGHTNING_VERBS, SCRIPT, help_path

SHELLS = ("bash", "zsh")

# An option stands two columns in, its help behind it or on lines further in.
_OPTION = re.compile(r"^ {2}(-\S.*?)(?: {2,}(\S.*))?\n((?: {8,}.*\n)*)", flags=re.MULTILINE)
_NAME = re.compile(r"(?:^|, )(--?[A-Za-z][\w.+]*)")
_CHOICES = re.compile(r"\{(.+)\}$")
_PATHS = re.compile(r"\b(\w*_path|\w*_dir|adapter|base_model|converter|files|out|root)\+?$")
# Completes to shipped configs and to files.
_CONFIG_FUNCTION = "_snake_lora_config_file"
_CONFIG_FUNCTIONS = {
    "bash": '{name}() {{ compgen -W "{configs}" -- "$1"; compgen -f -- "$1"; }}',
    "zsh": "{name}() {{ _alternative 'shipped:shipped config:({configs})' 'files:file:_files' }}",
}


def run(arguments: list[str]) -> int:
    """Print the script.

    Returns:
        The exit code.

    Raises:
        UserError: If the shell is none of ``SHELLS``.
    """
    options = build_parser().parse(arguments)
    if options.shell not in SHELLS:
        raise UserError(f"completion: no script for '{options.shell}'. Shells: {', '.join(SHELLS)}.")
    print(completion_script(options.shell))
    return 0


def build_parser() -> Parser:
    """The arguments of this verb."""
    parser = Parser("completion", epilog=f'For this session: eval "$({SCRIPT} completion bash)". Completes {SCRIPT}.')
    parser.add_argument("shell", metavar="SHELL", help=f"one of {', '.join(SHELLS)}")
    return parser


def completion_script(shell: str) -> str:
    """A script that makes ``shell`` complete ``SCRIPT``."""
    program = argparse.ArgumentParser(SCRIPT)
    verbs = program.add_subparsers()
    for verb, text in LIGHTNING_VERBS.items():
        _add_options(verbs.add_parser(verb, help=text, add_help=False), help_path(verb).read_text(encoding="utf-8"))
    for verb, text in LIGHT_VERBS.items():
        parser = importlib.import_module(f"snake_lora_pl.cli.commands.{verb}").build_parser()
        verbs.add_parser(verb, help=text, add_help=False, parents=[parser])
    for parser in verbs.choices.values():
        for action in parser._actions:
            _say_what_completes(action)
    function = _CONFIG_FUNCTIONS[shell].format(name=_CONFIG_FUNCTION, configs=" ".join(shipped_configs()))
    return shtab.complete(program, shell, preamble=function)


def _add_options(parser: argparse.ArgumentParser, help_text: str) -> None:
    for usage, first_line, more_lines in _OPTION.findall(help_text):
        names = _NAME.findall(usage)
        text = " ".join([first_line, *more_lines.split()]).strip().partition(". ")[0].replace("%", "%%")
        value = usage.removeprefix(", ".join(names)).strip()
        choices = _CHOICES.search(usage)
        if not value:
            parser.add_argument(*names, help=text, action="store_true")
        elif choices:
            parser.add_argument(*names, help=text, choices=choices[1].split(","))
        else:
            parser.add_argument(*names, help=text, nargs="?" if value.endswith("]") else None)


def _say_what_completes(action: argparse.Action) -> None:
    if "--config" in action.option_strings:
        action.complete = dict.fromkeys(SHELLS, _CONFIG_FUNCTION)  # type: ignore[attr-defined]
    elif action.choices is None and _PATHS.search(action.dest):
        action.complete = shtab.FILE  # type: ignore[attr-defined]
