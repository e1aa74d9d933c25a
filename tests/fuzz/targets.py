"""What must hold for any input of the readers that strangers write for; hypothesis and Atheris both drive these."""

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
from snake_lora_pl.data.jsonl import Complaints, read_rows
from snake_lora_pl.errors import UserError
from snake_lora_pl.game.text import STYLES, check_claims, read_board, read_grid_size, read_move, read_state
from snake_lora_pl.paths import find_config
from snake_lora_pl.untrusted import load_yaml, printable


def rows(content: bytes) -> None:
    """Rows come out as JSON has them, each line is a row or a complaint, and nothing but a ``UserError`` is raised."""
    complaints = Complaints()
    with _file(content) as path:
        try:
            good = list(read_rows([path], "skip", complaints=complaints))
        except UserError:  # gzip by its first bytes, and damaged
            return
    lines = content.split(b"\n")
    if not content.startswith(b"\x1f\x8b"):
        # A byte order mark and a line of white space are no rows.
        filled = [line for line in lines if line.removeprefix(b"\xef\xbb\xbf").strip()]
        assert len(good) + sum(complaints.counts.values()) == len(filled)
        for row in good:
            read = json.loads(lines[row.line - 1].decode("utf-8-sig"))
            assert (row.prompt, row.completion) == (read["prompt"], read["completion"])
    for row in good:
        assert row.prompt.strip()
        assert row.completion.strip()
        (row.prompt + row.completion).encode()
    assert printable(str(complaints)).replace("\n", "").isprintable()


def prompts(text: str) -> None:
    """A text is read as a board, and judged as a completion, without an exception; what is read fits together."""
    board, state, move = read_board(text), read_state(text), read_move(text)
    assert read_grid_size(text) == (None if state is None else state.grid_size)
    if board is None or board.apple is None:
        return
    assert state is not None
    assert (board.size, board.head, board.length) == state
    check_claims(board, move, text)
    compact = STYLES["compact"]
    assert compact.read_prompt(compact.write_prompt(board)) == board


def metadata(text: str) -> None:
    """Metadata is refused with a ``ValueError``, or is whole: it can be written, read again and put on a card."""
    try:
        read = parse_metadata(text)
    except ValueError:
        return
    assert parse_metadata(json.dumps(asdict(read))) == read
    model_card(read)


def configs(text: str) -> None:
    """A name finds a file or a message; a content is read within bounds or refused as YAML."""
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
