"""What plays: anything that answers boards with moves, many boards at a time. Imports no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from snake_lora_pl.game.board import Board, Move
from snake_lora_pl.game.teachers import Teacher, get_seeded_teacher


class Answer(NamedTuple):
    """What a policy says of one board.

    Attributes:
        move: The move it names; None where nothing could be read.
        words: Its own words, shown beside the board and checked for claims.
    """

    move: Move | None
    completion: str


class Policy(Protocol):
    """Anything that plays. Games are played in lockstep, so it is asked for many boards at once."""

    @property
    def name(self) -> str:
        """What to call it in a table."""

    @property
    def reading(self) -> str:
        """How its moves are read: ``generate``, ``score``, ``score+mask`` (illegal moves barred), or ``code``."""

    def playing(self) -> AbstractContextManager[None]:
        """Entered once before a series of games: whoever answers faster with something kept keeps it as long."""

    def answer(self, boards: Sequence[Board], seeds: Sequence[int]) -> list[Answer]:
        """One answer for each board.

        Args:
            boards: Positions of games that are not over.
            seeds: Seed of the game that each belongs to, for a policy that draws.
        """


class TeacherPolicy:
    """A teacher as a policy; where it finds no legal move it takes the first that is no reversal, and dies.

    Args:
        name: A registered teacher.

    Raises:
        ValueError: If there is none of that name; the message lists those there are.
    """

    reading = "code"

    def __init__(self, name: str) -> None:
        self.name = name
        self._make_teacher = get_seeded_teacher(name)
        self._teachers: dict[int, Teacher] = {}

    def playing(self) -> AbstractContextManager[None]:
        """A teacher keeps nothing."""
        return contextlib.nullcontext()

    def answer(self, boards: Sequence[Board], seeds: Sequence[int]) -> list[Answer]:
        """The teacher's move on each board; a teacher that draws draws from the game's seed."""
        answers = []
        for board, seed in zip(boards, seeds, strict=True):
            if seed not in self._teachers:
                self._teachers[seed] = self._make_teacher(seed)
            move = self._teachers[seed](board)
            answers.append(Answer(board.fallback_move() if move is None else move, ""))
        return answers
