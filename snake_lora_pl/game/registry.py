"""Lookup and registration in a dictionary of named objects."""

from __future__ import annotations

import difflib
from typing import TypeVar

T = TypeVar("T")


def add(registry: dict[str, T], name: str, value: T, noun: str) -> None:
    """Register a value under a name.

    Raises:
        ValueError: If the name is taken.
    """
    if name in registry:
        raise ValueError(f"a {noun} named {name!r} is already registered; choose another name")
    registry[name] = value


def look_up(registry: dict[str, T], name: str, noun: str) -> T:
    """Return the value registered under a name.

    Raises:
        ValueError: If the name is unknown; the message lists the known names and the nearest one.
    """
    if name not in registry:
        nearest = difflib.get_close_matches(name, registry, n=1)
        hint = f". Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"unknown {noun} {name!r}; known {noun}s: {', '.join(sorted(registry))}{hint}")
    return registry[name]
