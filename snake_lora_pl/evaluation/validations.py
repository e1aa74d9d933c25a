"""What each validation has to show, and the file that holds it: ``validations.jsonl``, a line a validation.

Imports no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from snake_lora_pl.durable import open_durably
from snake_lora_pl.game import Move, check_completion, read_board, read_move

MOVES = tuple(move.name for move in Move)
NO_MOVE = "none"
"""Stands for a move that could not be read."""


class JudgedRow(NamedTuple):
    """A validation row with the model's own completion of its prompt.

    Attributes:
        source: ``path:line`` of the row.
        prompt: Its prompt, as the file has it.
        teacher: Its completion, the teacher's words.
        words: The model's words.
        is_right: Whether they conclude with the teacher's move; None where the teacher concludes with none.
        is_legal: Whether that move is legal; None where the prompt does not tell the whole board.
        claims: For each thing that the words claim, whether it is so.
    """

    source: str
    prompt: str
    teacher: str
    words: str
    is_right: bool | None
    is_legal: bool | None
    claims: dict[str, bool]

    @classmethod
    def of(cls, source: str, prompt: str, teacher: str, words: str) -> JudgedRow:
        """Judge a completion."""
        wanted, said, board = read_move(teacher), read_move(words), read_board(prompt)
        return cls(
            source,
            prompt,
            teacher,
            words,
            is_right=None if wanted is None else said == wanted,
            is_legal=None if board is None else said in board.legal_moves(),
            claims={} if board is None or board.apple is None else check_completion(board, words),
        )


class Validation(NamedTuple):
    """What one validation has to show.

    Attributes:
        step: Optimizer steps done.
        epoch: The epoch, from 0.
        rows: The sample rows: the same ones at each validation of a run.
        decisions: Over all validation rows, how often each move of the teacher (``MOVES``) met each of the model
            (``MOVES`` and ``NO_MOVE``) under teacher forcing; None where the module counts none.
    """

    step: int
    epoch: int
    rows: Sequence[JudgedRow]
    decisions: list[list[int]] | None

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON."""
        return self._asdict() | {"rows": [row._asdict() for row in self.rows]}


def add_validation(path: str | os.PathLike[str], validation: Validation) -> None:
    """Add a line to the file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(_line(validation.to_json()))


def keep_validations(path: str | os.PathLike[str], last_step: int) -> None:
    """Drop from the file what comes after a step, and whatever a kill has left of a line."""
    kept = [validation for validation in read_validations(path) if validation["step"] <= last_step]
    with open_durably(path, "w", encoding="utf-8") as file:
        file.writelines(map(_line, kept))


def read_validations(path: str | os.PathLike[str]) -> Iterable[dict[str, Any]]:
    """The validations in the file as plain JSON, the last one of each step, without a last line that was cut off."""
    with open(path, encoding="utf-8") as file:
        return {validation["step"]: validation for validation in _whole_lines(file)}.values()


def _whole_lines(file: Iterable[str]) -> Iterator[dict[str, Any]]:
    for text in file:
        if text.endswith("\n"):
            yield json.loads(text)


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n"
