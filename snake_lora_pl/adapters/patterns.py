"""An allow list for regular expressions over layer names.

Python's ``re`` needs exponential time for some patterns, such as nested repetitions, and an adapter's config may be
untrusted input. Only a small subset of the syntax is accepted; a group cannot be repeated.
"""

from __future__ import annotations

import re

_MAX_CHARS = 500
_MAX_REPETITIONS = 4
_MAX_GROUPS = 4
# An escaped character, a character class or a literal, optionally repeated.
_ATOM = r"(?:\\[.dw]|\[\^?[\w.-]+\]|[\w.-])(?:[*+?]\??)?"
_ALLOWED = re.compile(rf"(?:{_ATOM}|\((?:\?[:=!])?|[)|^$])*", re.ASCII)
_REPETITION = re.compile(r"(?<![\\(])[*+?]\??")


def problem_with_pattern(pattern: str) -> str | None:
    r"""Return why a regular expression over layer names is rejected; None if it is accepted.

    Accepted are names with ``.``, ``\.``, ``\d``, ``\w`` and ``[...]``, each optionally followed by ``*``, ``+`` or
    ``?``, and ``( ) | ^ $``.
    """
    if len(pattern) > _MAX_CHARS:
        return f"longer than {_MAX_CHARS} characters"
    if not _ALLOWED.fullmatch(pattern):
        return r"not one of the accepted patterns: names with . \d \w [...], repeated by * + ?, and ( ) | ^ $"
    if len(_REPETITION.findall(pattern)) > _MAX_REPETITIONS:
        return f"a pattern with more than {_MAX_REPETITIONS} repetitions"
    if pattern.count("(") > _MAX_GROUPS:
        return f"a pattern with more than {_MAX_GROUPS} groups"
    try:
        re.compile(pattern)
    except re.error as error:
        return f"not a regular expression ({error})"
    return None
