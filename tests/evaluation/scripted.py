"""Policies whose every answer is known beforehand."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from snake_lora_pl.evaluation.policy import Answer
from snake_lora_pl.game import Board, get_teacher, read_move

bfs = get_teacher("bfs")


class ScriptedPolicy:
    """Answers each board by a function of it alone, and keeps how many it was asked for at a time."""

    reading = "code"

    def __init__(self, words: Callable[[Board], str], name: str = "scripted") -> None:
        self.name = name
        self._words = words
        self.batch_sizes: list[int] = []

    def playing(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def answer(self, boards: Sequence[Board], seeds: Sequence[int]) -> list[Answer]:
        self.batch_sizes.append(len(boards))
        return [Answer(read_move(words), words) for words in map(self._words, boards)]


def nonsense(board: Board) -> str:
    return "42"


def like_bfs(board: Board) -> str:
    """The move of the teacher ``bfs`` and nothing else."""
    return (bfs(board) or board.fallback_move()).name
