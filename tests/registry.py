"""A registry of kinds that is left as it was found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from snake_lora_pl.adapters import registry as kinds


@contextlib.contextmanager
def restored_registry() -> Iterator[None]:
    """Undo what was registered inside."""
    before = dict(kinds._KINDS)
    try:
        yield
    finally:
        kinds._KINDS.clear()
        kinds._KINDS.update(before)
