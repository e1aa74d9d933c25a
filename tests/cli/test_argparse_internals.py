from __future__ import annotations

import argparse

from snake_lora_pl.cli.argparse_internals import command_parsers, parser_actions


def test_actions_include_those_of_groups() -> None:
    parser = argparse.ArgumentParser()
    first = parser.add_argument("--first")
    second = parser.add_argument_group("group").add_argument("--second")
    assert parser_actions(parser)[1:] == [first, second]


def test_argparse_publishes_no_list_of_actions() -> None:
    """A public list would make the private name unnecessary."""
    parser = argparse.ArgumentParser()
    public = [value for name, value in vars(parser).items() if not name.startswith("_")]
    assert not any(isinstance(value, list) and parser_actions(parser)[0] in value for value in public)


def test_command_parsers_are_found_by_name() -> None:
    parser = argparse.ArgumentParser()
    fit = parser.add_subparsers().add_parser("fit")
    assert command_parsers(parser) == {"fit": fit}
    assert command_parsers(fit) == {}
