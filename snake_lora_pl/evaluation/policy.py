"""Policies: the protocol of everything that plays, and teachers as policies. Imports no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, Protocol, TypeAlias, get_args

from snake_lora_pl.game.board import Board, Move
from snake_lora_pl.game.teachers import Teacher, get_seeded_teacher

Reading: TypeAlias = Literal["generate", "score"]
"""Method of reading a move from a language model; see ``LanguageModelPolicy``."""

READINGS: tuple[Reading, ...] = get_args(Reading)


def reading_problems(reading: str, *, legal_mask: bool) -> list[str]:
    """Return the problems with the settings ``play.reading`` and ``play.legal_mask``; empty without problems."""
    problems = []
    if reading not in READINGS:
        problems.append(f"play.reading must be {' or '.join(READINGS)} (found: {reading})")
    if legal_mask and reading != "score":
        problems.append(
            f"play.legal_mask=true needs play.reading=score (found: {reading}), because a mask compares moves"
        )
    return problems


class Answer(NamedTuple):
    """A policy's answer to one board.

    Attributes:
        move: The move; None if the completion names none.
        completion: The output text, shown with the board and checked for claims.
    """

    move: Move | None
    completion: str


class Policy(Protocol):
    """Anything that plays. Games are played in lockstep, so a policy answers many boards at once."""

    @property
    def name(self) -> str:
        """Name of the policy in tables."""

    @property
    def reading(self) -> str:
        """Method of reading its moves: ``generate``, ``score``, ``score+mask`` (legal moves only), or ``code``."""

    def playing(self) -> AbstractContextManager[None]:
        """Return a context for a series of games, in which the policy may cache what answers share."""

    def answer(self, boards: Sequence[Board], seeds: Sequence[int]) -> list[Answer]:
        """Answer each board.

        Args:
            boards: Positions of games that are not over.
            seeds: Seed of the game of each board, for policies that draw random numbers.
        """


class TeacherPolicy:
    """A teacher as a policy. Without a legal move it takes the first move that is not a reversal, which ends the game.

    Args:
        name: A registered teacher.

    Raises:
        ValueError: If there is no such teacher; the message lists the known ones.
    """

    reading = "code"

    def __init__(self, name: str) -> None:
        self.name = name
        self._make_teacher = get_seeded_teacher(name)
        self._teachers: dict[int, Teacher] = {}

    def playing(self) -> AbstractContextManager[None]:
        """Return an empty context."""
        return contextlib.nullcontext()

    def answer(self, boards: Sequence[Board], seeds: Sequence[int]) -> list[Answer]:
        """Return the teacher's move on each board; its random numbers depend on the game's seed."""
        return [Answer(self.move(board, seed), "") for board, seed in zip(boards, seeds, strict=True)]

    def move(self, board: Board, seed: int) -> Move:
        """Return the teacher's move on one board."""
        if seed not in self._teachers:
            self._teachers[seed] = self._make_teacher(seed)
        return self._teachers[seed](board) or board.fallback_move()
