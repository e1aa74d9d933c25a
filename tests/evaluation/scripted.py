"""Policies with known answers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from snake_lora_pl.evaluation.policy import Answer
from snake_lora_pl.game import Board, get_teacher, read_move

bfs = get_teacher("bfs")


class ScriptedPolicy:
    """Answers each board by a function of the board, and records the number of boards in each call."""

    reading = "code"

    def __init__(self, complete: Callable[[Board], str], name: str = "scripted") -> None:
        self.name = name
        self._complete = complete
        self.batch_sizes: list[int] = []

    def playing(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def answer(self, boards: Sequence[Board], seeds: Sequence[int]) -> list[Answer]:
        self.batch_sizes.append(len(boards))
        return [Answer(read_move(completion), completion) for completion in map(self._complete, boards)]


def nonsense(board: Board) -> str:
    return "42"


def like_bfs(board: Board) -> str:
    """Return the move of the teacher ``bfs`` without any other text."""
    return (bfs(board) or board.fallback_move()).name
