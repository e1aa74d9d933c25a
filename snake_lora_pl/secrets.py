"""Detection and masking of API keys, tokens and passwords.

Everything that a run prints or writes is masked here: ``mask_secrets`` for error messages, ``mask_arguments`` for
command lines, ``redact_config`` for configs. A secret is recognized by its name, by its form, or by its value if the
environment holds it under the name of a secret.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

MASK = "***"
_MIN_SECRET_CHARS = 8  # shorter values occur inside ordinary words

_SECRET_NAMES = (
    "api_key", "apikey", "access_key", "secret_key", "private_key", "token", "password", "passwd", "secret"
)  # fmt: skip
_SECRET_NAME_PATTERN = (
    "api_?key|access_?key|secret_?key|private_?key|token|password|passwd|passphrase|secret|credentials?|authorization"
)
_SECRET_NAME = re.compile(rf"(^|_)({_SECRET_NAME_PATTERN})$", re.IGNORECASE)
_MISTYPED_CUTOFF = 0.8  # similarity from which on a name counts as a mistyped name of a secret

_URL_LOGIN = re.compile(r"(:/{1,2})[^/\s@'\"]+@")
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_NAMED_SECRET = re.compile(
    rf"\b(?P<name>(?:\w*_)?(?:{_SECRET_NAME_PATTERN})['\"]?\s*[:=]\s*['\"]?)[^\s'\",}}\]]{{{_MIN_SECRET_CHARS},}}",
    re.IGNORECASE,
)


def redact_config(config: Any) -> Any:
    """Return a nested config without the entries named like secrets, and with secrets in other values masked."""
    if isinstance(config, Mapping):
        return {name: redact_config(value) for name, value in config.items() if not _SECRET_NAME.search(str(name))}
    if isinstance(config, str):
        return _mask(config, _environment_secrets())
    return [redact_config(value) for value in config] if isinstance(config, list) else config


def mask_secrets(text: str, arguments: Sequence[str]) -> str:
    """Mask the secrets in a text.

    Args:
        text: The text.
        arguments: The command line, whose secrets are masked, too. An option with a name close to that of a secret
            counts as one, because it may be mistyped.
    """
    secrets = _environment_secrets()
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        name, equals, value = argument.partition("=")
        if name.startswith("--") and _may_be_secret(name.rsplit(".", 1)[-1].lstrip("-")):
            secrets.append(value if equals else following)
    return _NAMED_SECRET.sub(rf"\g<name>{MASK}", _mask(text, secrets))


def mask_arguments(arguments: Sequence[str]) -> list[str]:
    """Mask the secrets in a command line."""
    return [mask_secrets(argument, arguments) for argument in arguments]


def _environment_secrets() -> list[str]:
    return [value for name, value in os.environ.items() if _SECRET_NAME.search(name)]


def _may_be_secret(name: str) -> bool:
    last_words = ["_".join(name.lower().split("_")[-number:]) for number in (1, 2)]
    return bool(_SECRET_NAME.search(name)) or any(
        difflib.get_close_matches(words, _SECRET_NAMES, n=1, cutoff=_MISTYPED_CUTOFF) for words in last_words
    )


def _mask(text: str, secrets: Sequence[str]) -> str:
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _MIN_SECRET_CHARS:
            text = text.replace(secret, MASK)
    return _HUB_TOKEN.sub(MASK, _URL_LOGIN.sub(rf"\1{MASK}@", text))
