"""Keys and tokens: what counts as one, and how it stays out of what is written or printed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

_NAME = re.compile(r"(^|_)(api_?key|token|password|secret)$", re.IGNORECASE)
_SHORTEST = 8  # of the values that are looked for in texts; what is shorter stands in many a word
MASK = "***"


def without_secrets(config: Any) -> Any:
    """Plain values, nested as they may be, without the entries whose names say that they are secret."""
    if isinstance(config, Mapping):
        return {name: without_secrets(value) for name, value in config.items() if not _NAME.search(str(name))}
    return [without_secrets(value) for value in config] if isinstance(config, list) else config


def mask_secrets(text: str, arguments: Sequence[str]) -> str:
    """A text in which nothing stands that the environment or a command line gave as a secret."""
    given = [value for name, value in os.environ.items() if _NAME.search(name)]
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name.startswith("--") and _NAME.search(name.rsplit(".", 1)[-1].lstrip("-")):
            given.append(value if equals else following)
    for secret in sorted(given, key=len, reverse=True):
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, MASK)
    return text
