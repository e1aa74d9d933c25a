"""The exception for mistakes of the user, and helpers for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can fix; the command line prints the message on one line and exits with code 2.

    The message states where the mistake is, the value found and what to do. Messages that report several rows may have
    one further line per row. It is a ValueError so that Python callers need not know this class.
    """


def one_line(error: BaseException, max_chars: int = 300) -> str:
    """Return type and message of another library's exception on one line."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text[:max_chars]}" if text else type(error).__name__


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return `` Did you mean '...'?`` for the known name nearest to ``name``, or an empty string if none is near."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" Did you mean '{nearest[0]}'?" if nearest else ""
