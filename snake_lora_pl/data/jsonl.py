"""Rows from JSONL files: read one at a time, checked, every complaint with ``path:line``.

The reader knows nothing of tokens. A row is a JSON object on a line of its own with non-empty strings ``prompt`` and
``completion``; other keys are ignored, save ``game`` and ``seed``, which say what game a row is of.
"""

from __future__ import annotations

import difflib
import glob
import gzip
import json
import logging
import os
import stat
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypeAlias

from snake_lora_pl.errors import UserError
from snake_lora_pl.game.text import read_grid_size

logger = logging.getLogger(__name__)

OnBadRow: TypeAlias = Literal["error", "skip"]
PathSpec: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]"

MAX_ROW_BYTES = 10 * 2**20
MAX_COMPLAINTS_SHOWN = 20

_CHUNK_BYTES = 2**20
_GZIP_MAGIC = b"\x1f\x8b"
_UTF8_BOM = b"\xef\xbb\xbf"
_SKIP = "set data.on_bad_row=skip"


class Row(NamedTuple):
    """One checked row and where it stands.

    Attributes:
        prompt: What the model is asked.
        completion: What it is to answer; empty only where the reader was told not to require it.
        game: What the row says of its game, None where it says nothing. Unique within a file only.
        path: The file, as the user named it.
        line: Line number in it, from 1.
    """

    prompt: str
    completion: str
    game: str | None
    path: str
    line: int

    @property
    def source(self) -> str:
        """Where the row stands, as ``path:line``."""
        return f"{self.path}:{self.line}"


class Complaints:
    """What is wrong with single rows, collected so that all of it is reported at once in constant memory."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._shown: list[str] = []

    def add(self, source: str, reason: str, message: str) -> None:
        """Take down one complaint.

        Args:
            source: Where the row stands, as ``path:line``.
            reason: What kind of complaint it is, the same for all rows of the kind.
            message: What was found in this row, and what to do.
        """
        self.counts[reason] += 1
        if len(self._shown) < MAX_COMPLAINTS_SHOWN:
            self._shown.append(f"{source}: {message}")

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.counts)

    def __str__(self) -> str:
        """The number by reason, then the first complaints, a line each."""
        total = sum(self.counts.values())
        more = [f"... and {total - len(self._shown):,} more"] if total > len(self._shown) else []
        rows = "row" if total == 1 else "rows"
        return "\n".join([f"{total:,} bad {rows} ({describe_counts(self.counts)})", *self._shown, *more])

    def raise_if_any(self) -> None:
        """Stop over the complaints taken down.

        Raises:
            UserError: If there are any; its lines are the first 20 and a count of the others.
        """
        if self:
            raise UserError(str(self))


def describe_counts(counts: Mapping[str, int]) -> str:
    """Counts by reason in a few words, most frequent first: ``3 missing key, 1 bad JSON``."""
    return ", ".join(f"{count:,} {reason}" for reason, count in Counter(counts).most_common())


def expand_paths(spec: PathSpec) -> list[Path]:
    """The files that a path, a glob or a list of them names.

    The files of a glob come sorted by name. A file named twice, also by two names, counts once.

    Args:
        spec: A path or a glob (``shards/*.jsonl``, ``**`` for all depths), or several; ``~`` is the user's home.

    Returns:
        Regular files that exist, in the order named.

    Raises:
        UserError: If a path names nothing, a directory, or something that is no regular file.
    """
    specs = [spec] if isinstance(spec, (str, os.PathLike)) else list(spec)
    found: dict[tuple[int, int], Path] = {}
    for one in specs:
        for path in _expand(os.fspath(one)):
            info = _regular_file(path)
            first = found.setdefault((info.st_dev, info.st_ino), path)
            if first is not path:
                logger.warning("%s: is the same file as %s; its rows are read once", path, first)
    if not found:
        raise UserError("no data files were named. Give a path, a glob such as 'shards/*.jsonl', or a list of them.")
    return list(found.values())


def _expand(name: str) -> list[Path]:
    if not name.strip():
        raise UserError("an empty path was given for a data file. Name a .jsonl file.")
    name = os.path.expanduser(name)
    if not glob.has_magic(name) or os.path.lexists(name):
        return [Path(name)]
    paths = [Path(match) for match in sorted(glob.glob(name, recursive=True)) if not os.path.isdir(match)]
    if not paths:
        raise UserError(f"{name}: no file matches (working directory {os.getcwd()}). Check the pattern.")
    return paths


def _regular_file(path: Path) -> os.stat_result:
    try:
        info = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file (working directory {os.getcwd()}).{_nearest_name(path)}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name.
        raise UserError(f"{path!s}: cannot be read ({_reason(error)}). Name a readable .jsonl file.") from None
    if stat.S_ISDIR(info.st_mode):
        raise UserError(f"{path}: is a directory. Name the files in it, for example '{path}/*.jsonl'.")
    if not stat.S_ISREG(info.st_mode):
        raise UserError(f"{path}: is no regular file (a pipe or a device). Save the rows to a .jsonl file first.")
    return info


def _nearest_name(path: Path) -> str:
    try:
        names = os.listdir(path.parent)
    except OSError:
        return f" The directory {path.parent} is not there either."
    nearest = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean {path.parent / nearest[0]}?" if nearest else " Check the path."


def read_rows(
    paths: Sequence[Path],
    on_bad_row: OnBadRow = "error",
    *,
    require_completion: bool = True,
    complaints: Complaints | None = None,
) -> Iterator[Row]:
    """Read rows one at a time, in constant memory whatever the length of a file or of a line.

    Blank lines are passed over; byte order marks (of files that were joined, too), CRLF and a missing last newline
    are fine. Files compressed with gzip are known by their content. A row in which a key stands twice is bad, since
    readers disagree on which one counts. Numbers that JSON lacks (``NaN``) are let through in the keys that are
    ignored, for Python writes them.

    Args:
        paths: Files, as ``expand_paths`` returns them.
        on_bad_row: ``error`` reads on to the end to find every bad row, without yielding any further row, and then
            raises; ``skip`` leaves bad rows out.
        require_completion: Whether a row without a completion is bad.
        complaints: Collects what is wrong with rows. Where it is given, it is left to the caller to raise or to log.

    Yields:
        The good rows, in file order.

    Raises:
        UserError: If a file cannot be read, or if rows are bad and ``on_bad_row`` is ``error``.
    """
    own = complaints is None
    complaints = Complaints() if complaints is None else complaints
    required = ("prompt", "completion") if require_completion else ("prompt",)
    any_bad = False
    for path in paths:
        for line, raw in _read_lines(path):
            try:
                row = _parse(raw, str(path), line, required)
            except _BadRowError as error:
                complaints.add(f"{path}:{line}", error.reason, error.message)
                any_bad = True
                continue
            if on_bad_row == "skip" or not any_bad:
                yield row
    if own and complaints:
        if on_bad_row == "error":
            complaints.raise_if_any()
        logger.warning("skipped %s", complaints)


def read_rows_at(path: Path, lines: Collection[int]) -> list[Row]:
    """The rows on some lines of a file, in file order; the others are run over without being parsed.

    Args:
        path: A file whose rows on these lines are good.
        lines: Line numbers, counted from 1.

    Raises:
        UserError: If the file cannot be read.
    """
    wanted = set(lines)
    last = max(wanted, default=0)
    rows = []
    for line, raw in _read_lines(path):
        if line > last:
            break
        if line in wanted:
            rows.append(_parse(raw, str(path), line, ("prompt", "completion")))
    return rows


def unreadable(path: Path, error: OSError) -> UserError:
    """The error for a file of rows that the system does not let be read."""
    return UserError(f"{path}: cannot be read ({_reason(error)}). Check the file and its permissions.")


def peek_row(spec: PathSpec, *, require_completion: bool = True) -> Row | None:
    """The first good row of some files, read without looking at the rest; None where there is none."""
    return next(read_rows(expand_paths(spec), "skip", require_completion=require_completion), None)


def peek_grid_size(train_path: PathSpec) -> int | None:
    """Cells along one side of the grid in the first good row; None where its prompt says nothing of a grid.

    Raises:
        UserError: If a file cannot be read.
    """
    row = peek_row(train_path, require_completion=False)
    return None if row is None else read_grid_size(row.prompt)


def count_lines(paths: Sequence[Path]) -> int:
    """Lines of some files that are not blank, at the speed of reading them.

    Raises:
        UserError: If a file cannot be read.
    """
    return sum(1 for path in paths for _ in _read_lines(path))


class _BadRowError(Exception):
    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


def _read_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Number and bytes of every line that is not blank; None stands for a line that is too long to be a row."""
    try:
        with open(path, "rb") as file:
            compressed = path.suffix == ".gz" or file.peek(2)[:2] == _GZIP_MAGIC
            yield from _split_lines(gzip.GzipFile(fileobj=file) if compressed else file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path}: cannot be decompressed ({error}). Compress the file again, or copy it anew."
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error


def _split_lines(file: BinaryIO | gzip.GzipFile) -> Iterator[tuple[int, bytes | None]]:
    number = 0
    while piece := file.readline(_CHUNK_BYTES):
        number += 1
        pieces = [piece]
        num_bytes = len(piece)
        while not piece.endswith(b"\n") and (piece := file.readline(_CHUNK_BYTES)):
            num_bytes += len(piece)
            # Beyond the limit the line is only run through: a file may be one line of many gigabytes.
            if num_bytes <= MAX_ROW_BYTES + len(b"\r\n"):
                pieces.append(piece)
        # Not on the first line only: files are joined with `cat`.
        line = b"".join(pieces).rstrip(b"\r\n").removeprefix(_UTF8_BOM)
        if max(num_bytes - len(b"\r\n"), len(line)) > MAX_ROW_BYTES:
            yield number, None
        elif line.strip():
            yield number, line


def _parse(raw: bytes | None, path: str, line: int, required: tuple[str, ...]) -> Row:
    if raw is None:
        raise _BadRowError(
            "too large", f"a row of more than {MAX_ROW_BYTES // 2**20} MiB. Shorten it, split the file, or {_SKIP}."
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadRowError(
            "not UTF-8",
            f"not UTF-8 (byte 0x{raw[error.start]:02x} at {error.start}). Save the file as UTF-8, or {_SKIP}.",
        ) from None
    try:
        fields = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _BadRowError(
            "bad JSON", f"bad JSON ({error.msg} at column {error.colno}). Write one JSON object a line, or {_SKIP}."
        ) from None
    except RecursionError:
        raise _BadRowError("bad JSON", f"JSON nested too deeply. Make the row flat, or {_SKIP}.") from None
    except ValueError as error:  # An integer with thousands of digits.
        raise _BadRowError("bad JSON", f"bad JSON ({error}). Mend the row, or {_SKIP}.") from None
    if not isinstance(fields, dict):
        raise _BadRowError(
            "not an object", f'not a JSON object but {_kind(fields)}. Write {{"prompt": ..., ...}}, or {_SKIP}.'
        )
    for key in required:
        _check_text(fields, key)
    completion = fields["completion"] if "completion" in required else ""
    return Row(fields["prompt"], completion, _game_id(fields), path, line)


def _check_text(fields: dict[str, Any], key: str) -> None:
    if key not in fields:
        found = ", ".join(_printable(name) for name in list(fields)[:8]) or "no keys"
        raise _BadRowError("missing key", f"missing key '{key}' (found: {found}). Rename the key or {_SKIP}.")
    text = fields[key]
    if not isinstance(text, str):
        raise _BadRowError("not a string", f"key '{key}' is {_kind(text)}, not a string. Write text, or {_SKIP}.")
    if not text.strip():
        raise _BadRowError("empty", f"key '{key}' is empty. Fill it in, or {_SKIP}.")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _BadRowError(
                "lone surrogate",
                f"key '{key}' holds half a character (\\u{ord(text[error.start]):04x} without its other half). "
                f"Escape whole characters, or {_SKIP}.",
            ) from None


def _game_id(fields: dict[str, Any]) -> str | None:
    """The game's name in its file. Generators count games from 0 for every seed, so the seed is part of it."""
    game = fields.get("game")
    return f"{fields.get('seed')}/{game}" if isinstance(game, (str, int)) else None


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _BadRowError(
            "duplicate key", f"key '{_printable(twice)}' stands twice in one object. Remove one, or {_SKIP}."
        )
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_object_without_duplicates)


def _printable(name: str) -> str:
    """A key as it can go to any terminal, however long and whatever it holds."""
    return json.dumps(name[:40])[1:-1]


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
