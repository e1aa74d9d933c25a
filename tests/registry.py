"""A registry of kinds that is left as it was found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from snake_lora_pl.adapters.factory import AdapterFactory


@contextlib.contextmanager
def restored_registry() -> Iterator[None]:
    """Undo what was registered inside."""
    before = dict(AdapterFactory._kinds)
    try:
        yield
    finally:
        AdapterFactory._kinds.clear()
        AdapterFactory._kinds.update(before)
