"""Cache of encoded files: each JSONL file is encoded once in a stream, and mapped into memory from then on.

The key of an entry is a hash of everything that determines its content: the file's bytes, the encoder, the handling of
invalid rows and the format.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from snake_lora_pl.data.draw_weights import UNKNOWN, StratumReader
from snake_lora_pl.data.encoding import TOO_LONG, Encoder, Example
from snake_lora_pl.data.example_files import FORMAT_VERSION, ExampleFile, ExampleFileWriter, Examples, hash_text
from snake_lora_pl.data.game_counter import GameCounter
from snake_lora_pl.data.jsonl import OnBadRow, Row, read_error, read_rows
from snake_lora_pl.data.row_errors import RowErrors, format_counts
from snake_lora_pl.durable import directory_durably, exclusive, open_durably, remove_leftovers
from snake_lora_pl.errors import UserError
from snake_lora_pl.paths import CACHE_ENV, cache_dir, encoded_rows_dir

logger = logging.getLogger(__name__)

_ROWS_PER_CHUNK = 1024
_CHARS_PER_CHUNK = 2**24
_HASH_CHUNK_BYTES = 2**22
_PROGRESS_INTERVAL_S = 10.0
# A second change within the resolution of time stamps does not change them: hashes of fresh files are not cached.
_TIMESTAMP_RESOLUTION_S = 2.0


def open_examples(
    paths: Sequence[Path],
    encoder: Encoder,
    on_bad_row: OnBadRow = "error",
    max_rows: int | None = None,
    *,
    file_weights: Sequence[float] | None = None,
    with_strata: bool = False,
) -> Examples:
    """Return the examples of some JSONL files; those that are not in the cache are encoded.

    Args:
        paths: Files, as ``expand_paths`` returns them.
        encoder: Encoder of the rows; its settings are part of the cache key.
        on_bad_row: How to handle invalid rows, see ``read_rows``.
        max_rows: Number of rows to read from the beginning of each file; None reads all.
        file_weights: Weight of each file; None for equal weights.
        with_strata: Whether to read the stratum of each row from its prompt, which takes as long as encoding it.

    Returns:
        At least one example.

    Raises:
        UserError: If rows are invalid or too long and are not to be skipped (reported after all files have been read),
            if there are no rows, or if the cache cannot be written.
    """
    cache = _Cache(encoder, encoder.fingerprint(), on_bad_row, max_rows, with_strata, RowErrors())
    files = [cache.open(path) for path in paths]
    cache.errors.raise_if_any()
    examples = Examples([file for file in files if file is not None], file_weights)
    if len(examples) == 0:
        names = ", ".join(str(path) for path in paths[:3]) + (", ..." if len(paths) > 3 else "")
        skipped = f" (skipped: {format_counts(examples.skipped)})" if examples.skipped else ""
        raise UserError(f"{names}: no rows{skipped}. Write one JSON object with 'prompt' and 'completion' per line.")
    return examples


def hash_file(path: Path) -> str:
    """Return a hash of a file's bytes; it is cached, so that a large file is not read at every start.

    A cached hash is valid while device, inode, size, mtime and ctime of the file are the same; ctime cannot be set by a
    program.
    """
    before = path.stat()
    identity = (before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns, before.st_ctime_ns)
    hash_path = encoded_rows_dir("content_hashes") / hash_text(str(path.absolute()), *map(str, identity))
    with contextlib.suppress(OSError, UnicodeDecodeError):
        cached = hash_path.read_text(encoding="ascii")
        if len(cached) == 2 * 32:
            return cached
    now = time.time()
    digest = hashlib.blake2b(digest_size=32)
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise read_error(path, error) from error
    _check_unchanged(path, before)
    if now - max(before.st_mtime, before.st_ctime) > _TIMESTAMP_RESOLUTION_S:
        with report_cache_errors(), open_durably(hash_path, "w", encoding="ascii") as file:
            file.write(digest.hexdigest())
    return digest.hexdigest()


@contextlib.contextmanager
def report_cache_errors() -> Iterator[None]:
    """Raise a ``UserError`` with a fix if the cache cannot be written."""
    try:
        yield
    except OSError as error:
        fix = "Free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Change its permissions"
        raise UserError(
            f"cannot write to the cache {cache_dir()} ({error.strerror or error}). "
            f"{fix}, or set {CACHE_ENV} to a writable directory."
        ) from error


class _RowsRejectedError(Exception):
    """Rows of a file were rejected, so its examples are discarded."""


@dataclass(frozen=True)
class _Cache:
    """Entries of the cache under one set of settings.

    Attributes:
        errors: Collects the errors of rows in all files.
    """

    encoder: Encoder
    fingerprint: str
    on_bad_row: OnBadRow
    max_rows: int | None
    with_strata: bool
    errors: RowErrors

    def open(self, path: Path) -> ExampleFile | None:
        """Return the examples of a file, encoded if necessary; None if ``errors`` were found."""
        content_hash = hash_file(path)
        options = [] if self.max_rows is None else [str(self.max_rows)]
        options += ["strata"] if self.with_strata else []
        directory = encoded_rows_dir(
            hash_text(str(FORMAT_VERSION), content_hash, self.fingerprint, self.on_bad_row, *options)
        )
        examples = _open(directory, path)
        if examples is None:
            before = path.stat()
            with report_cache_errors(), exclusive(directory):
                # Another process may have built the entry while this one waited for the lock.
                examples = _open(directory, path)
                if examples is None:
                    remove_leftovers(directory.parent, directory.name)
                    try:
                        self.build(directory, path, content_hash)
                    except _RowsRejectedError:
                        return None
                    examples = ExampleFile(directory, path)
            _check_unchanged(path, before)
        elif examples.skipped:
            logger.warning("%s: skipped %s", path, format_counts(examples.skipped))
        return examples

    def build(self, directory: Path, path: Path, content_hash: str) -> None:
        """Encode the rows of a file in a stream, into a directory that is created atomically.

        Raises:
            _RowsRejectedError: If ``errors`` were found; no directory is created then.
        """
        encoder = self.encoder
        invalid_rows = RowErrors() if self.on_bad_row == "skip" else self.errors
        num_errors_before = len(self.errors)
        num_too_long = 0
        games, strata = GameCounter(), StratumReader()
        progress = _Progress(path)
        rows = islice(read_rows([path], self.on_bad_row, errors=invalid_rows), self.max_rows)
        with directory_durably(directory) as temporary, ExampleFileWriter(temporary, len(encoder.tokenizer)) as writer:
            for chunk in _chunks(rows):
                encoded: list[tuple[Row, int, Example]] = []
                encoded_strata: list[int] = []
                for row, example in zip(chunk, encoder.encode(chunk), strict=True):
                    # Skipped rows are counted too: the next position of their game follows from them.
                    game = games.game_of(row)
                    stratum = strata.read(row.prompt) if self.with_strata else UNKNOWN
                    if isinstance(example, Example):
                        encoded.append((row, game, example))
                        encoded_strata.append(stratum)
                    elif example.reason == TOO_LONG and encoder.on_overflow == "drop":
                        num_too_long += 1
                    else:
                        (self.errors if example.reason == TOO_LONG else invalid_rows).add(*example)
                writer.write(encoded, encoded_strata)
                progress.update(len(chunk))
            if len(self.errors) > num_errors_before:
                raise _RowsRejectedError
            skipped = dict(invalid_rows.counts) if self.on_bad_row == "skip" else {}
            if num_too_long:
                skipped[TOO_LONG] = num_too_long
            writer.finish(content_hash=content_hash, num_games=games.num_games, skipped=skipped)
        if self.on_bad_row == "skip" and invalid_rows:
            logger.warning("%s: skipped %s", path, invalid_rows)
        if num_too_long:
            logger.warning("%s: dropped %d rows over data.max_length=%d", path, num_too_long, encoder.max_length)
        progress.log()


def _open(directory: Path, path: Path) -> ExampleFile | None:
    if not directory.exists():
        return None
    try:
        return ExampleFile(directory, path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: damaged cache entry (%s); encoding the rows again", directory, error)
        return None


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Yield lists of rows, long enough for the tokenizer's threads and bounded in bytes."""
    chunk: list[Row] = []
    num_chars = 0
    for row in rows:
        chunk.append(row)
        num_chars += len(row.prompt) + len(row.completion)
        if len(chunk) == _ROWS_PER_CHUNK or num_chars >= _CHARS_PER_CHUNK:
            yield chunk
            chunk, num_chars = [], 0
    if chunk:
        yield chunk


class _Progress:
    """Log of the progress of encoding, every few seconds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_rows = 0
        self._start_s = self._last_log_s = time.monotonic()

    def update(self, num_rows: int) -> None:
        self._num_rows += num_rows
        if time.monotonic() - self._last_log_s > _PROGRESS_INTERVAL_S:
            self._last_log_s = time.monotonic()
            self.log()

    def log(self) -> None:
        rate = self._num_rows / max(time.monotonic() - self._start_s, 1e-9)
        logger.info("%s: encoded %s rows, %s rows/s", self._path, f"{self._num_rows:,}", f"{rate:,.0f}")


def _check_unchanged(path: Path, before: os.stat_result) -> None:
    after = path.stat()
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise UserError(f"{path}: changed while it was read. Run again when no program writes to it.")
