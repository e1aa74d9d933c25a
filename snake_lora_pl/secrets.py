"""Keys and tokens: what counts as one, and how it stays out of what is written or printed."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

_NAMES = ("api_key", "apikey", "access_key", "secret_key", "private_key", "token", "password", "passwd", "secret")
_WORDS = (
    "api_?key|access_?key|secret_?key|private_?key|token|password|passwd|passphrase|secret|credentials?|authorization"
)
_NAME = re.compile(rf"(^|_)({_WORDS})$", re.IGNORECASE)
_SHORTEST = 8  # of the values that are looked for in texts; what is shorter stands in many a word
_LIKE_A_NAME = 0.8  # how much of a mistyped name is right
MASK = "***"

# What gives itself away: who logs in, in an address; a token of the hub; the value beside a name.
_LOGIN = re.compile(r"(:/{1,2})[^/\s@'\"]+@")
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_NAMED = re.compile(
    rf"\b(?P<name>(?:\w*_)?(?:{_WORDS})['\"]?\s*[:=]\s*['\"]?)[^\s'\",}}\]]{{{_SHORTEST},}}", re.IGNORECASE
)


def redact_config(config: Any) -> Any:
    """Plain values, nested as they may be, without the entries whose names say that they are secret.

    Of other values what gives itself away is masked, and what the environment holds as a secret.
    """
    if isinstance(config, Mapping):
        return {name: redact_config(value) for name, value in config.items() if not _NAME.search(str(name))}
    if isinstance(config, str):
        return _mask(config, _of_environment())
    return [redact_config(value) for value in config] if isinstance(config, list) else config


def mask_secrets(text: str, arguments: Sequence[str]) -> str:
    """A text in which nothing stands that the environment or a command line gave as a secret, or that looks like one.

    Args:
        text: The text.
        arguments: The command line; a name that is nearly that of a secret was meant to be one.
    """
    given = _of_environment()
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        name, equals, value = argument.partition("=")
        if name.startswith("--") and _is_nearly_secret(name.rsplit(".", 1)[-1].lstrip("-")):
            given.append(value if equals else following)
    return _NAMED.sub(rf"\g<name>{MASK}", _mask(text, given))


def mask_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line as it can be shown."""
    return [mask_secrets(argument, arguments) for argument in arguments]


def _of_environment() -> list[str]:
    return [value for name, value in os.environ.items() if _NAME.search(name)]


def _is_nearly_secret(name: str) -> bool:
    last_words = ["_".join(name.lower().split("_")[-number:]) for number in (1, 2)]
    return bool(_NAME.search(name)) or any(
        difflib.get_close_matches(words, _NAMES, n=1, cutoff=_LIKE_A_NAME) for words in last_words
    )


def _mask(text: str, secrets: Sequence[str]) -> str:
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, MASK)
    return _HUB_TOKEN.sub(MASK, _LOGIN.sub(rf"\1{MASK}@", text))
