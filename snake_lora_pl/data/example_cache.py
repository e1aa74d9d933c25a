"""Encoded rows on disk: built once in a stream, opened at once ever after, mapped into memory and never loaded whole.

A directory holds the rows of one file under one set of settings; its name is a hash of all that made them. Its arrays
are plain files in the machine's byte order:

    tokens.bin       uint16 or uint32   the ids of all rows, one after the other
    offsets.bin      int64              where each row begins in tokens, and the end of the last
    num_prompt.bin   int32              how many ids of each row are the prompt's
    line.bin         int64              the row's line number in the file
    game.bin         int32              the row's game, counted from 0
    prompt_hash.bin  uint64             a hash of the prompt's text, to find the same prompt again
    meta.json                           counts, by which a damaged directory is known
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from snake_lora_pl.data.encoding import TOO_LONG, Encoder, Example, Refusal
from snake_lora_pl.data.jsonl import Complaints, OnBadRow, Row, describe_counts, read_rows, unreadable
from snake_lora_pl.durable import directory_durably, exclusive, open_durably, remove_leftovers
from snake_lora_pl.errors import UserError
from snake_lora_pl.game.text import PromptState, read_move, read_state, starts_new_game
from snake_lora_pl.paths import CACHE_ENV, cache_dir, encoded_rows_dir

logger = logging.getLogger(__name__)

# To be raised with every change to what is written here or to how games are told apart.
FORMAT_VERSION = 1

_ROWS_PER_CHUNK = 1024
_CHARS_PER_CHUNK = 2**24
_HASH_CHUNK_BYTES = 2**22
_PROGRESS_EVERY_S = 10.0
# A file changed within the resolution of its time stamps keeps them, so those of a fresh file prove nothing yet.
_STAMPS_SETTLE_S = 2.0

_ARRAYS: dict[str, npt.DTypeLike] = {
    "offsets": np.int64,
    "num_prompt": np.int32,
    "line": np.int64,
    "game": np.int32,
    "prompt_hash": np.uint64,
}


class EncodedFile:
    """The encoded rows of one file, mapped into memory.

    Args:
        directory: What ``_build`` wrote.
        path: The rows' file, as the user named it.

    Attributes:
        content_hash: Hash of the file's bytes.
        num_games: Games among the rows.
        skipped: Rows left out, by reason.

    Raises:
        OSError, ValueError, KeyError: If the directory is not there or is damaged.
    """

    def __init__(self, directory: Path, path: Path) -> None:
        self._directory = directory
        self.path = path
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        num_rows: int = meta["num_rows"]
        self.content_hash: str = meta["content_hash"]
        self.num_games: int = meta["num_games"]
        self.skipped: dict[str, int] = meta["skipped"]
        arrays = {
            name: _map_array(directory / f"{name}.bin", dtype, num_rows + (name == "offsets"))
            for name, dtype in _ARRAYS.items()
        }
        self.offsets = arrays["offsets"]
        self.num_prompt = arrays["num_prompt"]
        self.line = arrays["line"]
        self.game = arrays["game"]
        self.prompt_hash = arrays["prompt_hash"]
        self._tokens = _map_array(directory / "tokens.bin", np.dtype(meta["token_dtype"]), meta["num_tokens"])
        if self.offsets[0] != 0 or self.offsets[-1] != meta["num_tokens"]:
            raise ValueError("offsets do not match tokens")

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.line)

    def __getitem__(self, index: int) -> Example:
        """One row, its ids a view of the file."""
        ids = self._tokens[self.offsets[index] : self.offsets[index + 1]]
        return Example(ids, int(self.num_prompt[index]), f"{self.path}:{self.line[index]}")

    def __reduce__(self) -> tuple[type[EncodedFile], tuple[Path, Path]]:
        """Pickle the name, not the rows: a worker process maps the same file."""
        return type(self), (self._directory, self.path)


class EncodedRows:
    """The encoded rows of several files as one sequence.

    Args:
        files: The files, in order.

    Attributes:
        content_hash: Hash of the rows' files, in order.
        num_games: Games in all files; a game lies within one file.
        skipped: Rows left out, by reason.
    """

    def __init__(self, files: Sequence[EncodedFile]) -> None:
        self._files = list(files)
        self._starts = np.cumsum([0, *(len(file) for file in files)])
        self.content_hash = _hash_text(*(file.content_hash for file in files))
        self.num_games = sum(file.num_games for file in files)
        self.skipped: Counter[str] = Counter()
        for file in files:
            self.skipped.update(file.skipped)

    def __len__(self) -> int:
        """Number of rows."""
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Example:
        """One row."""
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._files[which][index - int(self._starts[which])]

    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each row."""
        return _join([np.diff(file.offsets).astype(np.int32) for file in self._files], np.int32)

    def num_targets(self) -> int:
        """Tokens to be learned in all rows together, EOS included."""
        return sum(int(file.offsets[-1]) - int(file.num_prompt.sum(dtype=np.int64)) for file in self._files)

    def games(self) -> npt.NDArray[np.int32]:
        """The game of each row, counted from 0 over all files."""
        firsts = np.cumsum([0, *(file.num_games for file in self._files)])
        return _join(
            [
                file.game + np.int32(first) if first else file.game
                for file, first in zip(self._files, firsts, strict=False)
            ],
            np.int32,
        )

    def prompt_hashes(self) -> npt.NDArray[np.uint64]:
        """A hash of each row's prompt."""
        return _join([file.prompt_hash for file in self._files], np.uint64)


def open_encoded_rows(
    paths: Sequence[Path], encoder: Encoder, on_bad_row: OnBadRow = "error", max_rows: int | None = None
) -> EncodedRows:
    """The encoded rows of some files, from the cache where they lie there, else built.

    Args:
        paths: Files, as ``expand_paths`` returns them.
        encoder: What encodes the rows; its settings are part of the cache's key.
        on_bad_row: What becomes of bad rows, see ``read_rows``.
        max_rows: Rows to read from the beginning of each file; None reads all.

    Returns:
        At least one row.

    Raises:
        UserError: If rows are bad or too long and are not to be left out (all files are looked through first), if there
            are none, or if the cache cannot be written.
    """
    fingerprint = encoder.fingerprint()
    complaints = Complaints()
    files = [_open_or_build(path, encoder, fingerprint, on_bad_row, max_rows, complaints) for path in paths]
    complaints.raise_if_any()
    rows = EncodedRows([file for file in files if file is not None])
    if len(rows) == 0:
        names = ", ".join(str(path) for path in paths[:3]) + (", ..." if len(paths) > 3 else "")
        left_out = f" ({describe_counts(rows.skipped)} left out)" if rows.skipped else ""
        raise UserError(f"{names}: no rows{left_out}. Write one JSON object with 'prompt' and 'completion' a line.")
    return rows


def hash_file(path: Path) -> str:
    """Hash of a file's bytes, remembered so that a second start need not read a large file again.

    What is remembered counts as long as the file is the same one with the same size and times; the time of the last
    change of status is among them, which no program can set back.
    """
    before = path.stat()
    stamps = [
        str(path.absolute()),
        before.st_dev,
        before.st_ino,
        before.st_size,
        before.st_mtime_ns,
        before.st_ctime_ns,
    ]
    memory = encoded_rows_dir("content_hashes") / _hash_text(*map(str, stamps))
    with contextlib.suppress(OSError, UnicodeDecodeError):
        remembered = memory.read_text(encoding="ascii")
        if len(remembered) == 2 * 32:
            return remembered
    now = time.time()
    digest = hashlib.blake2b(digest_size=32)
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise unreadable(path, error) from error
    _check_unchanged(path, before)
    if now - max(before.st_mtime, before.st_ctime) > _STAMPS_SETTLE_S:
        with report_cache_errors(), open_durably(memory, "w", encoding="ascii") as file:
            file.write(digest.hexdigest())
    return digest.hexdigest()


@contextlib.contextmanager
def report_cache_errors() -> Iterator[None]:
    """Turn what the file system refuses to the cache into what the user can do about it."""
    try:
        yield
    except OSError as error:
        cure = "Free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Mend its permissions"
        raise UserError(
            f"cannot write to the cache {cache_dir()} ({error.strerror or error}). "
            f"{cure}, or set {CACHE_ENV} to a directory that can be written to."
        ) from error


class GameCounter:
    """Tells games apart, row by row, in one file.

    Rows that name their game belong to it wherever they stand. Of the others, a game begins where the position does not
    follow from the row before. A row whose prompt is of no known format is a game of its own.
    """

    def __init__(self) -> None:
        self.num_games = 0
        self._named: dict[str, int] = {}
        self._current = 0
        self._previous: tuple[PromptState, Row] | None = None

    def game_of(self, row: Row) -> int:
        """The row's game, counted from 0."""
        if row.game is not None:
            self._previous = None
            if row.game not in self._named:
                self._named[row.game] = self._new_game()
            return self._named[row.game]
        state = read_state(row.prompt)
        if state is None or not self._goes_on(state):
            self._current = self._new_game()
        self._previous = None if state is None else (state, row)
        return self._current

    def _goes_on(self, state: PromptState) -> bool:
        if self._previous is None:
            return False
        previous, row = self._previous
        return not starts_new_game(previous, read_move(row.completion), state)

    def _new_game(self) -> int:
        self.num_games += 1
        return self.num_games - 1


def _open_or_build(
    path: Path,
    encoder: Encoder,
    fingerprint: str,
    on_bad_row: OnBadRow,
    max_rows: int | None,
    complaints: Complaints,
) -> EncodedFile | None:
    """The file's encoded rows; None where a complaint was taken down."""
    content_hash = hash_file(path)
    limit = [] if max_rows is None else [str(max_rows)]
    directory = encoded_rows_dir(_hash_text(str(FORMAT_VERSION), content_hash, fingerprint, on_bad_row, *limit))
    encoded = _open(directory, path)
    if encoded is None:
        before = path.stat()
        with report_cache_errors(), exclusive(directory):
            # Where another process was waited for, it has built them.
            encoded = _open(directory, path)
            if encoded is None:
                remove_leftovers(directory.parent, directory.name)
                try:
                    _build(directory, path, content_hash, encoder, on_bad_row, max_rows, complaints)
                except _RowsRefusedError:
                    return None
                encoded = EncodedFile(directory, path)
        _check_unchanged(path, before)
    elif encoded.skipped:
        logger.warning("%s: left out %s", path, describe_counts(encoded.skipped))
    return encoded


def _open(directory: Path, path: Path) -> EncodedFile | None:
    if not directory.exists():
        return None
    try:
        return EncodedFile(directory, path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: the cache of encoded rows is damaged (%s) and is built again", directory, error)
        return None


class _RowsRefusedError(Exception):
    """Rows of a file were refused, so that what was encoded of it is thrown away."""


def _build(
    directory: Path,
    path: Path,
    content_hash: str,
    encoder: Encoder,
    on_bad_row: OnBadRow,
    max_rows: int | None,
    complaints: Complaints,
) -> None:
    """Encode a file's rows in a stream, into a directory that appears as a whole or not at all.

    Raises:
        _RowsRefusedError: If a complaint was taken down; nothing is kept then.
    """
    bad_rows = Complaints() if on_bad_row == "skip" else complaints
    num_before = sum(complaints.counts.values())
    num_too_long = 0
    games = GameCounter()
    progress = _Progress(path)
    with directory_durably(directory) as temporary, _Writer(temporary, len(encoder.tokenizer)) as writer:
        for rows in _chunks(islice(read_rows([path], on_bad_row, complaints=bad_rows), max_rows)):
            encoded: list[tuple[Row, int, Example]] = []
            for row, example in zip(rows, encoder.encode(rows), strict=True):
                # Rows that are left out count too: they are part of a game's course.
                game = games.game_of(row)
                if isinstance(example, Example):
                    encoded.append((row, game, example))
                elif example.reason == TOO_LONG and encoder.on_overflow == "drop":
                    num_too_long += 1
                else:
                    _complain(example, complaints if example.reason == TOO_LONG else bad_rows)
            writer.write(encoded)
            progress.update(len(rows))
        if sum(complaints.counts.values()) > num_before:
            raise _RowsRefusedError
        skipped = dict(bad_rows.counts) if on_bad_row == "skip" else {}
        if num_too_long:
            skipped[TOO_LONG] = num_too_long
        writer.finish(content_hash=content_hash, num_games=games.num_games, skipped=skipped)
    if on_bad_row == "skip" and bad_rows:
        logger.warning("%s: skipped %s", path, bad_rows)
    if num_too_long:
        logger.warning("%s: dropped %d rows over data.max_length=%d", path, num_too_long, encoder.max_length)
    progress.finish()


def _complain(refusal: Refusal, complaints: Complaints) -> None:
    complaints.add(refusal.source, refusal.reason, refusal.message)


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows in lists that are long enough for the tokenizer's threads and bounded in bytes."""
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


class _Writer:
    """Appends encoded rows to the arrays of a directory."""

    def __init__(self, directory: Path, vocabulary_size: int) -> None:
        self._directory = directory
        self._token_dtype = np.dtype(np.uint16 if vocabulary_size <= 2**16 else np.uint32)
        self._files = {name: open(directory / f"{name}.bin", "wb") for name in ("tokens", *_ARRAYS)}
        self._num_rows = 0
        self._num_tokens = 0
        self._append("offsets", [0])

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            file.close()

    def write(self, rows: Sequence[tuple[Row, int, Example]]) -> None:
        """Append rows, each with its game."""
        lengths = [len(example.input_ids) for _, _, example in rows]
        ids = [np.asarray(example.input_ids, self._token_dtype) for _, _, example in rows]
        self._files["tokens"].write(_join(ids, self._token_dtype).tobytes())
        self._append("offsets", self._num_tokens + np.cumsum(lengths, dtype=np.int64))
        self._append("num_prompt", [example.num_prompt for _, _, example in rows])
        self._append("line", [row.line for row, _, _ in rows])
        self._append("game", [game for _, game, _ in rows])
        self._append("prompt_hash", [_hash_prompt(row.prompt) for row, _, _ in rows])
        self._num_rows += len(rows)
        self._num_tokens += sum(lengths)

    def finish(self, **meta: Any) -> None:
        """Write down what the directory holds."""
        for file in self._files.values():
            file.flush()
        meta |= {"num_rows": self._num_rows, "num_tokens": self._num_tokens, "token_dtype": self._token_dtype.name}
        (self._directory / "meta.json").write_text(json.dumps(meta), encoding="utf-8")

    def _append(self, name: str, values: npt.ArrayLike) -> None:
        self._files[name].write(np.asarray(values, _ARRAYS[name]).tobytes())


class _Progress:
    """Says now and then how far a long build is."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_rows = 0
        self._start = self._said = time.monotonic()

    def update(self, num_rows: int) -> None:
        self._num_rows += num_rows
        if time.monotonic() - self._said > _PROGRESS_EVERY_S:
            self._said = time.monotonic()
            self._say("encoding")

    def finish(self) -> None:
        self._say("encoded")

    def _say(self, verb: str) -> None:
        rate = self._num_rows / max(time.monotonic() - self._start, 1e-9)
        logger.info("%s: %s, %s rows so far, %s rows/s", self._path, verb, f"{self._num_rows:,}", f"{rate:,.0f}")


def _check_unchanged(path: Path, before: os.stat_result) -> None:
    after = path.stat()
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise UserError(f"{path}: changed while it was read. Run again when nothing writes to it any more.")


def _map_array(path: Path, dtype: npt.DTypeLike, length: int) -> npt.NDArray[Any]:
    expected_bytes = np.dtype(dtype).itemsize * length
    if (found_bytes := path.stat().st_size) != expected_bytes:
        raise ValueError(f"{path.name} has {found_bytes} bytes, not {expected_bytes}")
    return np.memmap(path, dtype, mode="r", shape=(length,)) if length else np.empty(0, dtype)


def _join(arrays: Sequence[npt.NDArray[Any]], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Arrays end to end; one alone stays as it is, mapped if it was."""
    if len(arrays) == 1:
        return arrays[0]
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)


def _hash_prompt(prompt: str) -> int:
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "little")


def _hash_text(*parts: str) -> str:
    # A file's name may be any bytes; Python carries those that are not UTF-8 as lone surrogates.
    return hashlib.blake2b("\0".join(parts).encode(errors="surrogateescape"), digest_size=16).hexdigest()
