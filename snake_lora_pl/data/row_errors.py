"""Errors of single rows, collected so that one message reports all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from snake_lora_pl.errors import UserError

MAX_ERRORS_SHOWN = 20


class RowErrors:
    """Errors of single rows, in constant memory: counts by reason and the first messages.

    Attributes:
        counts: Number of rows by reason.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._messages: list[str] = []

    def add(self, source: str, reason: str, message: str) -> None:
        """Add the error of one row.

        Args:
            source: The row's ``path:line``.
            reason: Category of the error, such as ``missing key``.
            message: What was found in the row, and what to do.
        """
        self.counts[reason] += 1
        if len(self._messages) < MAX_ERRORS_SHOWN:
            self._messages.append(f"{source}: {message}")

    def __len__(self) -> int:
        return self.counts.total()

    def __str__(self) -> str:
        """Return a line with counts by reason, and a line for each of the first errors."""
        num_hidden = len(self) - len(self._messages)
        more = [f"... and {num_hidden:,} more"] if num_hidden else []
        rows = "row" if len(self) == 1 else "rows"
        return "\n".join([f"{len(self):,} invalid {rows} ({format_counts(self.counts)})", *self._messages, *more])

    def raise_if_any(self) -> None:
        """Raise an error that reports the first 20 rows and the number of others.

        Raises:
            UserError: If there are errors.
        """
        if self.counts:
            raise UserError(str(self))


def format_counts(counts: Mapping[str, int]) -> str:
    """Return counts by reason, most frequent first, such as ``3 missing key, 1 bad JSON``."""
    return ", ".join(f"{count:,} {reason}" for reason, count in Counter(counts).most_common())
