"""Record of the validations of a run: ``validations.jsonl``, one line per validation. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from snake_lora_pl.durable import open_durably
from snake_lora_pl.game import Move, check_completion, read_board, read_move, read_moves

MOVES = tuple(move.name for move in Move)
NO_MOVE = "none"
"""Label of a move that could not be read."""


class JudgedRow(NamedTuple):
    """A validation row with the model's completion of its prompt.

    Attributes:
        source: ``path:line`` of the row.
        prompt: Prompt of the row.
        target: Completion of the row, written by the teacher.
        completion: The model's completion.
        is_right: Whether it concludes with the teacher's move; None if the target has no conclusion.
        is_legal: Whether it concludes with a legal move; None if the prompt does not tell which moves are legal.
        claims: Name -> truth of each claim in the completion.
    """

    source: str
    prompt: str
    target: str
    completion: str
    is_right: bool | None
    is_legal: bool | None
    claims: dict[str, bool]

    @classmethod
    def of(cls, source: str, prompt: str, target: str, completion: str) -> JudgedRow:
        """Judge a completion."""
        expected, move, board = read_move(target), read_move(completion), read_board(prompt)
        moves = read_moves(prompt)
        return cls(
            source,
            prompt,
            target,
            completion,
            is_right=None if expected is None else move == expected,
            is_legal=None if moves is None else move in moves.legal,
            claims={} if board is None or board.apple is None else check_completion(board, completion),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain JSON; the file calls target and completion ``teacher`` and ``words``."""
        return {
            "source": self.source,
            "prompt": self.prompt,
            "teacher": self.target,
            "words": self.completion,
            "is_right": self.is_right,
            "is_legal": self.is_legal,
            "claims": self.claims,
        }


class Validation(NamedTuple):
    """Sample rows and confusion matrix of one validation.

    Attributes:
        step: Number of optimizer steps.
        epoch: Epoch, from 0.
        rows: Sample rows, the same ones at each validation of a run.
        decisions: Confusion matrix over all validation rows under teacher forcing: counts of each move of the teacher
            (``MOVES``) and of the model (``MOVES`` and ``NO_MOVE``); None if the module has no move metrics.
    """

    step: int
    epoch: int
    rows: Sequence[JudgedRow]
    decisions: list[list[int]] | None

    def to_json(self) -> dict[str, Any]:
        """Return the validation as plain JSON."""
        return self._asdict() | {"rows": [row.to_json() for row in self.rows]}


def add_validation(path: str | os.PathLike[str], validation: Validation) -> None:
    """Append a validation to the file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(_to_line(validation.to_json()))


def keep_validations(path: str | os.PathLike[str], last_step: int) -> None:
    """Remove the validations after a step from the file, and an incomplete last line."""
    kept = [validation for validation in read_validations(path) if validation["step"] <= last_step]
    with open_durably(path, "w", encoding="utf-8") as file:
        file.writelines(map(_to_line, kept))


def read_validations(path: str | os.PathLike[str]) -> Iterable[dict[str, Any]]:
    """Return the validations in the file as plain JSON, the last one of each step, without an incomplete last line."""
    with open(path, encoding="utf-8") as file:
        return {validation["step"]: validation for validation in _read_complete_lines(file)}.values()


def _read_complete_lines(file: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in file:
        if line.endswith("\n"):
            yield json.loads(line)


def _to_line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n"
