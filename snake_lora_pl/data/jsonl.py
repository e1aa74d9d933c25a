"""Reader of JSONL rows: one at a time, validated, every error with ``path:line``.

A row is a JSON object on one line with the non-empty strings ``prompt`` and ``completion``. Other keys are ignored,
except ``game`` and ``seed``, strings or numbers that identify the row's game, and ``weight``. The
reader knows nothing of tokens.
"""

from __future__ import annotations

import gzip
import json
import logging
import math
import sys
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypeAlias

from snake_lora_pl.data.data_files import PathSpec, expand_paths, os_error_reason
from snake_lora_pl.data.row_errors import RowErrors
from snake_lora_pl.errors import UserError

logger = logging.getLogger(__name__)

OnBadRow: TypeAlias = Literal["error", "skip"]

MAX_ROW_BYTES = 10 * 2**20

_CHUNK_BYTES = 2**20
_GZIP_MAGIC = b"\x1f\x8b"
_UTF8_BOM = b"\xef\xbb\xbf"
_TRAINING_KEYS = ("prompt", "completion")


class Row(NamedTuple):
    """A valid row and its place in a file.

    Attributes:
        prompt: Input of the model.
        completion: Expected output; empty if the reader does not require it.
        game: Identifier of the row's game, unique within the file; None if the row does not name its game, or if the
            reader does not require completions.
        path: The file, as the user named it.
        line: Line number, from 1.
        weight: Relative frequency with which training draws the row.
    """

    prompt: str
    completion: str
    game: str | None
    path: str
    line: int
    weight: float = 1.0

    @property
    def source(self) -> str:
        """The row's ``path:line``."""
        return f"{self.path}:{self.line}"


def read_rows(
    paths: Sequence[Path],
    on_bad_row: OnBadRow = "error",
    *,
    require_completion: bool = True,
    errors: RowErrors | None = None,
) -> Iterator[Row]:
    """Read rows one at a time, in constant memory whatever the length of a file or of a line.

    Blank lines, byte order marks (also in the middle of concatenated files), CRLF and a missing last newline are
    accepted. gzip is detected by content. A row with a duplicate key is invalid, because readers disagree on which
    value counts. Numbers that JSON lacks (``NaN``) are accepted in ignored keys, because Python writes them.

    Args:
        paths: Files, as ``expand_paths`` returns them.
        on_bad_row: ``error`` raises after all files have been read, so that every invalid row is reported, and yields
            no row after the first invalid one; ``skip`` skips invalid rows.
        require_completion: Whether a row without a completion is invalid.
        errors: Collects the errors of rows; the caller then raises or logs them.

    Yields:
        The valid rows, in file order.

    Raises:
        UserError: If a file cannot be read, or if a row is invalid and ``on_bad_row`` is ``error``.
    """
    collected = RowErrors() if errors is None else errors
    required = _TRAINING_KEYS if require_completion else ("prompt",)
    any_invalid = False
    for path in paths:
        for line, content in _read_lines(path):
            try:
                row = _parse(content, str(path), line, required)
            except _InvalidRowError as error:
                collected.add(f"{path}:{line}", error.reason, str(error))
                any_invalid = True
                continue
            if on_bad_row == "skip" or not any_invalid:
                yield row
    if errors is None and collected:
        if on_bad_row == "error":
            collected.raise_if_any()
        logger.warning("skipped %s", collected)


def read_rows_at(path: Path, lines: Collection[int]) -> list[Row]:
    """Return the rows on some lines of a file, in file order, without parsing the other lines.

    Args:
        path: A file whose rows on these lines are valid.
        lines: Line numbers, from 1.

    Raises:
        UserError: If the file cannot be read.
    """
    wanted = set(lines)
    last = max(wanted, default=0)
    rows = []
    for line, content in _read_lines(path):
        if line > last:
            break
        if line in wanted:
            rows.append(_parse(content, str(path), line, _TRAINING_KEYS))
    return rows


def peek_row(spec: PathSpec, *, require_completion: bool = True) -> Row | None:
    """Return the first valid row without reading further; None if there is none."""
    return next(read_rows(expand_paths(spec), "skip", require_completion=require_completion), None)


def count_lines(paths: Sequence[Path]) -> int:
    """Return the number of lines that are not blank, without parsing them.

    Raises:
        UserError: If a file cannot be read.
    """
    return sum(1 for path in paths for _ in _read_lines(path))


def read_error(path: Path, error: OSError) -> UserError:
    """Return the error to raise for a data file that the operating system cannot read."""
    return UserError(f"{path}: cannot be read ({os_error_reason(error)}). Check the file and its permissions.")


class _InvalidRowError(Exception):
    """Error of one row.

    Args:
        reason: Category of the error, the same for all rows that share it.
        problem: What was found in this row.
        fix: What to do, as an imperative clause.
    """

    def __init__(self, reason: str, problem: str, fix: str) -> None:
        super().__init__(f"{problem}. {fix} or set data.on_bad_row=skip.")
        self.reason = reason


def _read_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yield number and content of every line that is not blank; the content of an overlong line is None."""
    try:
        with open(path, "rb") as file:
            compressed = path.suffix == ".gz" or file.peek(2)[:2] == _GZIP_MAGIC
            yield from _split_lines(gzip.GzipFile(fileobj=file) if compressed else file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: cannot be decompressed ({error}). Compress or copy the file again.") from error
    except OSError as error:
        raise read_error(path, error) from error


def _split_lines(file: BinaryIO | gzip.GzipFile) -> Iterator[tuple[int, bytes | None]]:
    number = 0
    while piece := file.readline(_CHUNK_BYTES):
        number += 1
        pieces = [piece]
        num_bytes = len(piece)
        while not piece.endswith(b"\n") and (piece := file.readline(_CHUNK_BYTES)):
            num_bytes += len(piece)
            # The rest of a longer line is read but not kept: a file may be a single line of many gigabytes.
            if num_bytes <= MAX_ROW_BYTES + len(b"\r\n"):
                pieces.append(piece)
        # Concatenated files have byte order marks on later lines too.
        line = b"".join(pieces).rstrip(b"\r\n").removeprefix(_UTF8_BOM)
        if max(num_bytes - len(b"\r\n"), len(line)) > MAX_ROW_BYTES:
            yield number, None
        elif line.strip():
            yield number, line


def _parse(content: bytes | None, path: str, line: int, required: tuple[str, ...]) -> Row:
    if content is None:
        raise _InvalidRowError("too large", f"over {MAX_ROW_BYTES // 2**20} MiB", "Shorten the row, split the file")
    fields = _decode(content)
    for key in required:
        _check_text(fields, key)
    if "completion" not in required:
        return Row(fields["prompt"], "", None, path, line)
    return Row(fields["prompt"], fields["completion"], _game_id(fields), path, line, _weight(fields))


def _decode(content: bytes) -> dict[str, Any]:
    try:
        fields = _DECODER.decode(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        found = f"byte 0x{content[error.start]:02x} at {error.start}"
        raise _InvalidRowError("not UTF-8", f"not UTF-8 ({found})", "Save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        found = f"{error.msg} at column {error.colno}"
        raise _InvalidRowError("bad JSON", f"bad JSON ({found})", "Write one JSON object per line") from None
    except RecursionError:
        raise _InvalidRowError("bad JSON", "bad JSON (nested too deeply)", "Flatten the row") from None
    except ValueError as error:  # an integer with thousands of digits
        raise _InvalidRowError("bad JSON", f"bad JSON ({error})", "Shorten the number") from None
    if not isinstance(fields, dict):
        fix = 'Write {"prompt": ..., "completion": ...}'
        raise _InvalidRowError("not an object", f"not a JSON object but {_type_name(fields)}", fix)
    return fields


def _check_text(fields: dict[str, Any], key: str) -> None:
    if key not in fields:
        found = ", ".join(_printable(name) for name in list(fields)[:8]) or "no keys"
        raise _InvalidRowError("missing key", f"missing key '{key}' (found: {found})", "Rename the key")
    text = fields[key]
    if not isinstance(text, str):
        raise _InvalidRowError("not a string", f"key '{key}' is {_type_name(text)}, not a string", "Write text")
    if not text.strip():
        raise _InvalidRowError("empty", f"key '{key}' is empty", "Fill it in")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            surrogate = f"\\u{ord(text[error.start]):04x}"
            raise _InvalidRowError(
                "lone surrogate", f"key '{key}' contains the lone surrogate {surrogate}", "Escape whole characters"
            ) from None


def _game_id(fields: dict[str, Any]) -> str | None:
    """Return the game's identifier, which includes the seed because generators number the games of each seed from 0."""
    if "game" not in fields:
        return None
    seed = _identifier(fields, "seed") if "seed" in fields else None
    return f"{seed}/{_identifier(fields, 'game')}"


def _identifier(fields: dict[str, Any], key: str) -> str:
    """Return a string or a number as text that is the same for equal numbers, such as 3 and 3.0."""
    value = fields[key]
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value) if value.is_integer() else value)
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)
    found = str(value) if isinstance(value, float) else _type_name(value)
    # Without an identifier, neighboring positions of one game could train and validate.
    raise _InvalidRowError(
        "bad game", f"key '{key}' is {found}, not a string or a finite number", "Write one, remove the key"
    )


def _weight(fields: dict[str, Any]) -> float:
    weight = fields.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        problem = f"key 'weight' is {_type_name(weight)}, not a number"
    elif not 0 < weight <= sys.float_info.max:
        problem = f"key 'weight' is {_shorten(weight)}, not positive and finite"
    else:
        return float(weight)
    raise _InvalidRowError("invalid weight", problem, "Write a positive number, remove the key")


def _shorten(number: float) -> str:
    text = str(number)
    return text if len(text) <= 30 else f"{text[:30]}..."


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        duplicate = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _InvalidRowError("duplicate key", f"duplicate key '{_printable(duplicate)}'", "Remove one")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_object_without_duplicates)


def _printable(name: str) -> str:
    """Return the beginning of a key with control characters escaped."""
    return json.dumps(name[:40])[1:-1]


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
