"""Examples on disk: one directory per JSONL file, mapped into memory and never loaded as a whole.

The arrays are plain files in the machine's byte order:

    tokens.bin       uint16 or uint32   concatenated ids of all examples
    offsets.bin      int64              start of each example in tokens, and the end of the last one
    num_prompt.bin   int32              number of leading ids of each example that belong to the prompt
    line.bin         int64              line number of the row
    game.bin         int32              game of the row, from 0
    prompt_hash.bin  uint64             hash of the prompt's text, to find duplicates
    weight.bin       float64            relative frequency with which training draws the row
    stratum.bin      int64              see ``draw_weights.StratumReader``; UNKNOWN unless rows are balanced
    meta.json                           counts, which also detect a damaged directory
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from snake_lora_pl.data.encoding import Example
from snake_lora_pl.data.jsonl import Row

# Increment with every change of the format or of how games are counted.
FORMAT_VERSION = 3

_ARRAYS: dict[str, npt.DTypeLike] = {
    "offsets": np.int64,
    "num_prompt": np.int32,
    "line": np.int64,
    "game": np.int32,
    "prompt_hash": np.uint64,
    "weight": np.float64,
    "stratum": np.int64,
}


class ExampleFile:
    """Examples of one JSONL file, mapped into memory.

    Args:
        directory: Directory that an ``ExampleFileWriter`` filled.
        path: The JSONL file, as the user named it.

    Attributes:
        content_hash: Hash of the JSONL file's bytes.
        num_games: Number of games.
        skipped: Number of skipped rows by reason.
        has_weights: Whether any row has a weight other than 1.

    Raises:
        OSError, ValueError, KeyError: If the directory is missing or damaged.
    """

    def __init__(self, directory: Path, path: Path) -> None:
        self._directory = directory
        self.path = path
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        num_rows: int = meta["num_rows"]
        self.content_hash: str = meta["content_hash"]
        self.num_games: int = meta["num_games"]
        self.skipped: dict[str, int] = meta["skipped"]
        self.has_weights: bool = meta["has_weights"]
        arrays = {
            name: _map_array(directory / f"{name}.bin", dtype, num_rows + (name == "offsets"))
            for name, dtype in _ARRAYS.items()
        }
        self.offsets = arrays["offsets"]
        self.num_prompt = arrays["num_prompt"]
        self.line = arrays["line"]
        self.game = arrays["game"]
        self.prompt_hash = arrays["prompt_hash"]
        self.weight = arrays["weight"]
        self.stratum = arrays["stratum"]
        self._tokens = _map_array(directory / "tokens.bin", np.dtype(meta["token_dtype"]), meta["num_tokens"])
        if self.offsets[0] != 0 or self.offsets[-1] != meta["num_tokens"]:
            raise ValueError("offsets do not match tokens")

    def __len__(self) -> int:
        return len(self.line)

    def __getitem__(self, index: int) -> Example:
        """Return one example, its ids a view of the mapped file."""
        ids = self._tokens[self.offsets[index] : self.offsets[index + 1]]
        return Example(ids, int(self.num_prompt[index]), f"{self.path}:{self.line[index]}")

    def with_largest_id(self) -> Example:
        """Return an example that contains the largest token id of the file, which is not empty."""
        position = int(self._tokens.argmax())
        return self[int(np.searchsorted(self.offsets, position, side="right")) - 1]

    def __reduce__(self) -> tuple[type[ExampleFile], tuple[Path, Path]]:
        """Pickle the paths instead of the arrays: a worker process maps the same files."""
        return type(self), (self._directory, self.path)


class Examples:
    """Examples of several JSONL files as one sequence.

    Args:
        files: The files, in order.
        file_weights: Weight of each file, which multiplies the weights of its rows; None for equal weights.

    Attributes:
        content_hash: Hash of the JSONL files, in order.
        num_games: Number of games in all files; no game spans two files.
        skipped: Number of skipped rows by reason.
    """

    def __init__(self, files: Sequence[ExampleFile], file_weights: Sequence[float] | None = None) -> None:
        self._files = list(files)
        self._file_weights = np.ones(len(self._files)) if file_weights is None else np.array(file_weights, np.float64)
        self._starts = np.cumsum([0, *(len(file) for file in files)])
        self.content_hash = hash_text(*(file.content_hash for file in files))
        self.num_games = sum(file.num_games for file in files)
        self.skipped: Counter[str] = Counter()
        for file in files:
            self.skipped.update(file.skipped)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Example:
        file_index = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._files[file_index][index - int(self._starts[file_index])]

    def lengths(self) -> npt.NDArray[np.int32]:
        """Return the number of tokens of each example."""
        return _concatenate([np.diff(file.offsets).astype(np.int32) for file in self._files], np.int32)

    def with_largest_id(self) -> Example:
        """Return an example that contains the largest token id of all; there is at least one example."""
        return max((file.with_largest_id() for file in self._files if len(file)), key=lambda one: max(one.input_ids))

    def games(self) -> npt.NDArray[np.int32]:
        """Return the game of each example, numbered from 0 across files."""
        firsts = np.cumsum([0, *(file.num_games for file in self._files)])
        games = [
            file.game + np.int32(first) if first else file.game
            for file, first in zip(self._files, firsts, strict=False)
        ]
        return _concatenate(games, np.int32)

    def prompt_hashes(self) -> npt.NDArray[np.uint64]:
        """Return the hash of each example's prompt."""
        return _concatenate([file.prompt_hash for file in self._files], np.uint64)

    def has_weights(self) -> bool:
        """Return whether weights of rows or of files differ."""
        return len(set(self._file_weights)) > 1 or any(file.has_weights for file in self._files)

    def weights(self) -> npt.NDArray[np.float64]:
        """Return the weight of each example: its row's times its file's, relative to the largest of each."""
        largest = max((float(file.weight.max(initial=0)) for file in self._files), default=1)
        file_weights = self._file_weights / self._file_weights.max(initial=0)
        return _concatenate(
            [file.weight / largest * weight for file, weight in zip(self._files, file_weights, strict=True)], np.float64
        )

    def strata(self) -> npt.NDArray[np.int64]:
        """Return the stratum of each example."""
        return _concatenate([file.stratum for file in self._files], np.int64)


class ExampleFileWriter:
    """Writer of the directory that ``ExampleFile`` reads.

    Args:
        directory: An empty directory.
        vocabulary_size: Number of token ids; up to 2**16, each id takes two bytes.
    """

    def __init__(self, directory: Path, vocabulary_size: int) -> None:
        self._directory = directory
        self._token_dtype = np.dtype(np.uint16 if vocabulary_size <= 2**16 else np.uint32)
        self._files = {name: open(directory / f"{name}.bin", "wb") for name in ("tokens", *_ARRAYS)}
        self._num_rows = 0
        self._num_tokens = 0
        self._has_weights = False
        self._append("offsets", [0])

    def __enter__(self) -> ExampleFileWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            file.close()

    def write(self, rows: Sequence[tuple[Row, int, Example]], strata: Sequence[int]) -> None:
        """Append rows, each with its game and its example, and their strata."""
        ids = [np.asarray(example.input_ids, self._token_dtype) for _, _, example in rows]
        lengths = [len(one) for one in ids]
        self._files["tokens"].write(_concatenate(ids, self._token_dtype).tobytes())
        self._append("offsets", self._num_tokens + np.cumsum(lengths, dtype=np.int64))
        self._append("num_prompt", [example.num_prompt for _, _, example in rows])
        self._append("line", [row.line for row, _, _ in rows])
        self._append("game", [game for _, game, _ in rows])
        self._append("prompt_hash", [hash_prompt(row.prompt) for row, _, _ in rows])
        self._append("weight", [row.weight for row, _, _ in rows])
        self._append("stratum", strata)
        self._has_weights = self._has_weights or any(row.weight != 1 for row, _, _ in rows)
        self._num_rows += len(rows)
        self._num_tokens += sum(lengths)

    def finish(self, *, content_hash: str, num_games: int, skipped: dict[str, int]) -> None:
        """Write ``meta.json``; the arguments are attributes of ``ExampleFile``."""
        for file in self._files.values():
            file.flush()
        meta = {
            "content_hash": content_hash,
            "num_games": num_games,
            "skipped": skipped,
            "has_weights": self._has_weights,
            "num_rows": self._num_rows,
            "num_tokens": self._num_tokens,
            "token_dtype": self._token_dtype.name,
        }
        (self._directory / "meta.json").write_text(json.dumps(meta), encoding="utf-8")

    def _append(self, name: str, values: npt.ArrayLike) -> None:
        self._files[name].write(np.asarray(values, _ARRAYS[name]).tobytes())


def hash_text(*parts: str) -> str:
    """Return a hash of strings; file names that are not UTF-8 are allowed."""
    return hashlib.blake2b("\0".join(parts).encode(errors="surrogateescape"), digest_size=16).hexdigest()


def hash_prompt(prompt: str) -> int:
    """Return the hash of a prompt in ``prompt_hash.bin``."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "little")


def _map_array(path: Path, dtype: npt.DTypeLike, length: int) -> npt.NDArray[Any]:
    expected_bytes = np.dtype(dtype).itemsize * length
    if (found_bytes := path.stat().st_size) != expected_bytes:
        raise ValueError(f"{path.name} has {found_bytes} bytes instead of {expected_bytes}")
    return np.memmap(path, dtype, mode="r", shape=(length,)) if length else np.empty(0, dtype)


def _concatenate(arrays: Sequence[npt.NDArray[Any]], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Concatenate arrays; a single array is returned without a copy, so that it stays mapped."""
    if len(arrays) == 1:
        return arrays[0]
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)
