"""Texts that take seconds of imports to make, cached until a file of the package or a library changes."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from snake_lora_pl.durable import open_durably
from snake_lora_pl.paths import cache_dir, shipped_configs

_PACKAGE_DIR = Path(__file__).parents[1]
# Libraries whose options and whose layout a help text shows.
_LIBRARIES = ("lightning", "jsonargparse", "shtab")


def cached_text(name: str, render: Callable[[], str]) -> str:
    """Return a text from the user's cache, or render and cache it.

    A cache that cannot be read or written is ignored.

    Args:
        name: Name of the text, part of a file name.
        render: Makes the text; the result must depend on nothing but the code.
    """
    directory = cache_dir() / "help"
    path = directory / f"{name}-{_code_hash()}.txt"
    with contextlib.suppress(OSError, ValueError):
        return path.read_text(encoding="utf-8")
    text = render()
    with contextlib.suppress(OSError):
        with open_durably(path, "w", encoding="utf-8") as file:
            file.write(text)
        for outdated in directory.glob(f"{name}-*.txt"):
            if outdated != path:
                outdated.unlink()
    return text


def _code_hash() -> str:
    """Return a hash of the versions, the shipped configs, and the name, time and size of each file of the package."""
    digest = hashlib.sha256(f"{sys.version} {' '.join(shipped_configs())}".encode())
    for library in ("snake_lora_pl", *_LIBRARIES):
        with contextlib.suppress(metadata.PackageNotFoundError):
            digest.update(f"{library} {metadata.version(library)}\n".encode())
    for path in sorted(_PACKAGE_DIR.rglob("*.py")):
        status = path.stat()
        digest.update(f"{path.relative_to(_PACKAGE_DIR)} {status.st_mtime_ns} {status.st_size}\n".encode())
    return digest.hexdigest()[:16]
