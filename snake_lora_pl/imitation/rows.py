"""Rows of a round, and their JSONL file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from snake_lora_pl.data.jsonl import Row
from snake_lora_pl.durable import explain_failed_writes, open_durably
from snake_lora_pl.errors import UserError
from snake_lora_pl.game import Style
from snake_lora_pl.imitation.settings import ImitationSettings
from snake_lora_pl.imitation.visits import STATE_TYPES, VisitedGame


class RoundRow(TypedDict):
    """A visited state as a training row.

    Attributes:
        prompt: The state.
        completion: The teacher's answer.
        game: Number of the game among all games of all rounds.
        seed: Seed of the game.
        step: Number of moves played before.
        weight: How often the row is drawn, relative to others.
        reason: The type of state that the weight belongs to.
    """

    prompt: str
    completion: str
    game: int
    seed: int
    step: int
    weight: float
    reason: str


def rows_of(game: VisitedGame, style: Style, settings: ImitationSettings) -> list[RoundRow]:
    """Return the rows of the states of a game that have a weight."""
    rows: list[RoundRow] = []
    for state in game.states:
        # The first of several types of the same weight, in the order of STATE_TYPES.
        reason = max((name for name in STATE_TYPES if name in state.types), key=settings.weight_of)
        if weight := settings.weight_of(reason):
            rows.append(
                {
                    "prompt": style.write_prompt(state.board),
                    "completion": style.write_completion(state.board, state.teacher_move),
                    "game": game.index,
                    "seed": game.seed,
                    "step": state.step,
                    "weight": weight,
                    "reason": reason,
                }
            )
    return rows


def encode_rows(rows: Sequence[RoundRow]) -> bytes:
    """Return the content of the file of a round."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write_round(path: Path, content: bytes) -> None:
    """Write the file of a round, atomically.

    Raises:
        UserError: If the file cannot be written.
    """
    with explain_failed_writes(path, "the rows of the round"), open_durably(path) as file:
        file.write(content)


def read_round(path: Path, sha256: str) -> list[RoundRow]:
    """Return the rows of a round that a checkpoint was trained with.

    Args:
        path: The file.
        sha256: Hash of the content, from the checkpoint.

    Raises:
        UserError: If the file is missing or differs.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}), but the checkpoint was trained with its rows. Copy the "
            "directory rounds of the checkpoint's run there."
        ) from error
    if content_hash(content) != sha256:
        raise UserError(
            f"{path}: changed since the checkpoint was written. Copy the directory rounds of the checkpoint's run "
            "there, or resume from a newer checkpoint."
        )
    rows: list[RoundRow] = [json.loads(line) for line in content.splitlines()]
    return rows


def content_hash(content: bytes) -> str:
    """Return the SHA-256 of the content of a file."""
    return hashlib.sha256(content).hexdigest()


def as_data_rows(rows: Sequence[RoundRow], path: Path) -> list[Row]:
    """Return rows as the data module reads them."""
    return [
        Row(row["prompt"], row["completion"], f"{row['seed']}/{row['game']}", str(path), line, row["weight"])
        for line, row in enumerate(rows, start=1)
    ]


def state_of_round(step: int, content: bytes) -> dict[str, Any]:
    """Return the state of a round for checkpoints."""
    return {"step": step, "sha256": content_hash(content)}
