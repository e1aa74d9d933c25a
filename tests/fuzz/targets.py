"""Properties of the readers of untrusted input, for any input; Hypothesis and Atheris both call these functions."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import yaml
from jsonargparse import get_loader

from snake_lora_pl.adapters.card import model_card
from snake_lora_pl.adapters.metadata import parse_metadata
from snake_lora_pl.data.jsonl import read_rows
from snake_lora_pl.data.row_errors import RowErrors
from snake_lora_pl.errors import UserError
from snake_lora_pl.game.text import (
    STYLES,
    check_claims,
    find_style,
    read_board,
    read_grid_size,
    read_move,
    read_moves,
    read_state,
)
from snake_lora_pl.paths import find_config
from snake_lora_pl.untrusted import load_yaml, printable


def rows(content: bytes) -> None:
    """Check that rows equal their JSON, that each line is a row or an error, and that only ``UserError`` is raised."""
    errors = RowErrors()
    with _file(content) as path:
        try:
            good = list(read_rows([path], "skip", errors=errors))
        except UserError:  # damaged gzip
            return
    lines = content.split(b"\n")
    if not content.startswith(b"\x1f\x8b"):
        # A byte order mark and a line of white space are not rows.
        filled = [line for line in lines if line.removeprefix(b"\xef\xbb\xbf").strip()]
        assert len(good) + len(errors) == len(filled)
        for row in good:
            expected = json.loads(lines[row.line - 1].decode("utf-8-sig"))
            assert (row.prompt, row.completion) == (expected["prompt"], expected["completion"])
    for row in good:
        assert row.prompt.strip()
        assert row.completion.strip()
        (row.prompt + row.completion).encode()
    assert printable(str(errors)).replace("\n", "").isprintable()


def prompts(text: str) -> None:
    """Check that reading a text as board and as completion raises nothing and gives consistent results."""
    board, state, move = read_board(text), read_state(text), read_move(text)
    assert read_grid_size(text) == (None if state is None else state.grid_size)
    moves = read_moves(text)
    assert moves is None or moves.traps <= moves.legal
    assert find_style(text) is not None or (board is None and moves is None)
    if board is None or board.apple is None:
        return
    assert state is not None
    assert (board.size, board.head, board.length) == state
    check_claims(board, move, text)
    compact = STYLES["compact"]
    assert compact.read_prompt(compact.write_prompt(board)) == board


def metadata(text: str) -> None:
    """Check that metadata raises ``ValueError``, or can be written, read again and rendered as a model card."""
    try:
        read = parse_metadata(text)
    except ValueError:
        return
    assert parse_metadata(json.dumps(asdict(read))) == read
    model_card(read)


def configs(text: str) -> None:
    """Check that a name finds a config or raises ``UserError``, and that a config is bounded or invalid YAML."""
    with contextlib.suppress(UserError):
        assert find_config(text).is_file()
    with contextlib.suppress(yaml.YAMLError):
        assert _count(load_yaml(text, get_loader("yaml"))) < 1_000_000


TARGETS: dict[str, Callable[[bytes], None] | Callable[[str], None]] = {
    "rows": rows,
    "prompts": prompts,
    "metadata": metadata,
    "configs": configs,
}


def _count(value: object) -> int:
    inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return 1 + sum(map(_count, inner))


@contextlib.contextmanager
def _file(content: bytes) -> Iterator[Path]:
    handle, name = tempfile.mkstemp(suffix=".jsonl")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        yield Path(name)
    finally:
        os.unlink(name)
