"""Regular expressions that name layers, looked at before anything matches them: some never come to an end.

Python's ``re`` tries every way in which a text can be cut between the repetitions of a pattern. Where repetitions stand
within repetitions these double with every letter, so that ``(a+)+!`` on a name of forty letters outlives its reader.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable
from typing import Any

# What `re` itself reads a pattern with; it has no public name.
_parser = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

# A name of 60 letters is cut between four repetitions in half a million ways.
_MAX_REPETITIONS = 4
_MAX_LETTERS = 500
_MANY = 8  # repetitions up to this number are as good as written out


def problem_with_pattern(pattern: str) -> str | None:
    """Why a regular expression cannot be matched against layers' names; None where it can.

    Args:
        pattern: The regular expression, as a user or an adapter's file has it.
    """
    if len(pattern) > _MAX_LETTERS:
        return f"longer than {_MAX_LETTERS} letters"
    try:
        re.compile(pattern)
        repetitions = list(_repetitions(_parser.parse(pattern)))
    except (re.error, RecursionError, OverflowError) as error:
        return f"no regular expression ({error})"
    if any(repetitions):
        return "a repetition of what itself varies in length, which may take for ever; name the layers instead"
    if len(repetitions) > _MAX_REPETITIONS:
        return f"more than {_MAX_REPETITIONS} repetitions, which may take for ever; name the layers instead"
    return None


def _repetitions(parsed: Any) -> Iterable[bool]:
    """For each repetition without a small bound, whether what it repeats can itself match in more than one way."""
    for operation, argument in parsed:
        if str(operation) in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            _, most, inner = argument
            if int(most) > _MANY:
                yield _varies(inner)
            yield from _repetitions(inner)
        else:
            for inner in _parts(argument):
                yield from _repetitions(inner)


def _varies(parsed: Any) -> bool:
    for operation, argument in parsed:
        name = str(operation)
        if name == "BRANCH" or (name.endswith("_REPEAT") and argument[0] != argument[1]):
            return True
        inner = [argument[2]] if name.endswith("_REPEAT") else _parts(argument)
        if any(_varies(part) for part in inner):
            return True
    return False


def _parts(argument: Any) -> list[Any]:
    """The patterns within an operation's argument, whatever the operation."""
    if isinstance(argument, _parser.SubPattern):
        return [argument]
    if isinstance(argument, (list, tuple)):
        return [part for item in argument for part in _parts(item)]
    return []
