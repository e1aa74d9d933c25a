"""A context that restores the registry of adapter types."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from snake_lora_pl.adapters import registry


@contextlib.contextmanager
def restored_registry() -> Iterator[None]:
    """Remove on exit whatever was registered inside the context."""
    before = dict(registry._ADAPTER_TYPES)
    try:
        yield
    finally:
        registry._ADAPTER_TYPES.clear()
        registry._ADAPTER_TYPES.update(before)
