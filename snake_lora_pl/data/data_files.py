"""Paths and globs of data files."""

from __future__ import annotations

import glob
import logging
import math
import os
import stat
from collections.abc import Iterable, Sequence
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
    return list(_distinct_files((name, 1.0) for name in _names(spec)))


def expand_weighted_paths(spec: PathSpec) -> dict[Path, float]:
    """Return the weight of each file that a path, a glob or a list of them names; ``PATH@2`` has weight 2, others 1.

    A file whose whole name exists is that file, even if the name ends in ``@`` and a number.

    Args:
        spec: As in ``expand_paths``, each path or glob followed by ``@`` and a weight or not.

    Raises:
        UserError: As ``expand_paths``, and if a weight is not positive and finite, or a file has two weights.
    """
    return _distinct_files(map(_split_weight, _names(spec)))


def _names(spec: PathSpec) -> list[str]:
    return [os.fspath(one) for one in ([spec] if isinstance(spec, (str, os.PathLike)) else spec)]


def _split_weight(name: str) -> tuple[str, float]:
    path, separator, suffix = name.rpartition("@")
    if not separator or os.path.lexists(os.path.expanduser(name)):
        return name, 1.0
    try:
        weight = float(suffix)
    except ValueError:
        return name, 1.0
    if not 0 < weight < math.inf:
        raise UserError(
            f"{path}: the weight must be positive and finite (found: {suffix}). Write, for example, {path}@2."
        )
    return path, weight


def _distinct_files(weighted_names: Iterable[tuple[str, float]]) -> dict[Path, float]:
    found: dict[tuple[int, int], Path] = {}
    weights: dict[Path, float] = {}
    for name, weight in weighted_names:
        for path in _expand(name):
            info = _stat_regular_file(path)
            first = found.setdefault((info.st_dev, info.st_ino), path)
            if first is path:
                weights[path] = weight
            elif weights[first] == weight:
                logger.warning("%s: same file as %s; its rows are read once", path, first)
            else:
                raise UserError(f"{path}: named with the weights {weights[first]:g} and {weight:g}. Name it once.")
    if not found:
        raise UserError("empty list of data files. Name a path, a glob such as 'shards/*.jsonl', or a list of them.")
    return weights


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
