"""Paths and globs of data files."""

from __future__ import annotations

import glob
import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from snake_lora_pl.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

PathSpec: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]"


def expand_paths(spec: PathSpec) -> list[Path]:
    """Return the files that a path, a glob or a list of them names.

    The matches of a glob are sorted by name. A file that is named twice, also under two names, is returned once.

    Args:
        spec: A path or a glob (``shards/*.jsonl``; ``**`` matches any depth), or several; ``~`` is the home directory.

    Returns:
        Existing regular files, in the order named.

    Raises:
        UserError: If a path does not exist, is a directory or is not a regular file, or if a glob matches nothing.
    """
    specs = [spec] if isinstance(spec, (str, os.PathLike)) else list(spec)
    found: dict[tuple[int, int], Path] = {}
    for one in specs:
        for path in _expand(os.fspath(one)):
            info = _stat_regular_file(path)
            first = found.setdefault((info.st_dev, info.st_ino), path)
            if first is not path:
                logger.warning("%s: same file as %s; its rows are read once", path, first)
    if not found:
        raise UserError("empty list of data files. Name a path, a glob such as 'shards/*.jsonl', or a list of them.")
    return list(found.values())


def os_error_reason(error: Exception) -> str:
    """Return the operating system's description of an error without its number and path."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _expand(name: str) -> list[Path]:
    if not name.strip():
        raise UserError(f"empty path of a data file (found: {name!r}). Name a .jsonl file.")
    name = os.path.expanduser(name)
    if not glob.has_magic(name) or os.path.lexists(name):
        return [Path(name)]
    paths = [Path(match) for match in sorted(glob.glob(name, recursive=True)) if not os.path.isdir(match)]
    if not paths:
        raise UserError(f"{name}: no file matches (working directory {os.getcwd()}). Check the pattern.")
    return paths


def _stat_regular_file(path: Path) -> os.stat_result:
    try:
        info = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file (working directory {os.getcwd()}).{_hint(path)}") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise UserError(f"{path!s}: cannot be read ({os_error_reason(error)}). Name a readable .jsonl file.") from None
    if stat.S_ISDIR(info.st_mode):
        raise UserError(f"{path}: is a directory. Name the files in it, for example '{path}/*.jsonl'.")
    if not stat.S_ISREG(info.st_mode):
        raise UserError(f"{path}: not a regular file (a pipe or a device). Save the rows to a .jsonl file first.")
    return info


def _hint(path: Path) -> str:
    try:
        names = os.listdir(path.parent)
    except OSError:
        return f" The directory {path.parent} does not exist either."
    return did_you_mean(path.name, names) or " Check the path."
