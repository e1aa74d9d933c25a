"""Private names of argparse, which jsonargparse inherits; no other module of the package uses one."""

from __future__ import annotations

import argparse


def parser_actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return the actions of a parser, those of its groups included.

    argparse publishes no list of the options that were added to a parser.
    https://github.com/python/cpython/blob/v3.13.0/Lib/argparse.py
    """
    return parser._actions


def command_parsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of a parser's subcommands by name."""
    mappings = [action.choices for action in parser_actions(parser) if isinstance(action.choices, dict)]
    return {name: command for choices in mappings for name, command in choices.items()}
