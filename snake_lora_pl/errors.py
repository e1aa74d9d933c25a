"""The one exception that stands for a mistake of the user's.

Every room may raise it; only the command line catches it. It prints the message as one line and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend: the message says where, what was found and what to do, on one line.

    Messages that report several rows at once may hold further lines, one a row. It is a ValueError so that Python
    callers need not know this class.
    """


def one_line(error: BaseException, max_chars: int = 300) -> str:
    """Type and message of an exception of another library, fit for one line."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text[:max_chars]}" if text else type(error).__name__


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return `` Did you mean '...'?`` for the known name nearest to ``name``, or an empty string if none is near."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" Did you mean '{nearest[0]}'?" if nearest else ""
