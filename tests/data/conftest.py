"""Small JSONL files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from snake_lora_pl.data.datamodule import SnakeJSONLDataModule

PROMPT = (
    "You are playing Snake on a {size}x{size} grid. The coordinate system is (0,0) at bottom-left to "
    "({last},{last}) at top-right. Movement: UP=y+1, DOWN=y-1, RIGHT=x+1, LEFT=x-1.\n\nCurrent game state:\n"
    "- Snake head position: ({x}, {y})\n- Apple position: ({ax}, {ay})\n- Snake body positions: []\n"
    "- Snake length: 1\n\nWhat is the best move to make? Consider:\n1. Path to the apple\n"
    "2. Avoiding collisions with walls and snake body\n3. Maximizing score and survival\n\n"
    "Choose from: UP, DOWN, LEFT, RIGHT"
)


def position(x: int, y: int, move: str, size: int = 10, apple: tuple[int, int] = (9, 9)) -> dict[str, Any]:
    """Return a ``bfs-512`` row with a snake of length 1."""
    prompt = PROMPT.format(size=size, last=size - 1, x=x, y=y, ax=apple[0], ay=apple[1])
    return {"prompt": prompt, "completion": f"Moving {move} from [{x}, {y}]\n\nConclusion: The move is: {move}"}


def games_of_steps(*num_steps: int) -> list[dict[str, Any]]:
    """Return games that move to the right, each in another row of the board, so that no two share a prompt."""
    return [position(x, y, "RIGHT") for y, steps in enumerate(num_steps) for x in range(steps)]


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes objects, or lines given as bytes, to a JSONL file."""

    def write(rows: Sequence[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write


@pytest.fixture
def make(tiny_tokenizer) -> Callable[..., SnakeJSONLDataModule]:
    """Return a function that creates a data module with the tiny tokenizer."""

    def make_datamodule(train_path: Any = None, **settings: Any) -> SnakeJSONLDataModule:
        settings = {"batch_size": 4, "tokenizer": tiny_tokenizer, **settings}
        return SnakeJSONLDataModule(train_path=None if train_path is None else str(train_path), **settings)

    return make_datamodule


@pytest.fixture
def rows_path(write_rows) -> Path:
    """Path of 41 rows in 7 games."""
    return write_rows(games_of_steps(6, 5, 7, 6, 5, 6, 6))
