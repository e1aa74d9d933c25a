"""Teachers by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from snake_lora_pl.game.board import Board, Move

Teacher: TypeAlias = Callable[[Board], "Move | None"]
SeededTeacher: TypeAlias = Callable[[int], Teacher]

TEACHERS: dict[str, SeededTeacher] = {}
"""Name -> what makes the teacher from a seed. Most teachers are one function, whatever the seed."""


def register_teacher(name: str) -> Callable[[Teacher], Teacher]:
    """Decorator that makes a teacher known by a name.

    Raises:
        ValueError: If the name is taken.
    """

    def register(teacher: Teacher) -> Teacher:
        # A partial of functions that can be imported can be sent to another process.
        register_seeded_teacher(name)(partial(_whatever_the_seed, teacher))
        return teacher

    return register


def register_seeded_teacher(name: str) -> Callable[[SeededTeacher], SeededTeacher]:
    """Decorator that makes a teacher that draws known by a name; what it decorates makes the teacher from a seed.

    Raises:
        ValueError: If the name is taken.
    """

    def register(make: SeededTeacher) -> SeededTeacher:
        if name in TEACHERS:
            raise ValueError(f"a teacher named {name!r} is registered already; choose another name")
        TEACHERS[name] = make
        return make

    return register


def get_teacher(name: str, seed: int = 0) -> Teacher:
    """The teacher of a name.

    Args:
        name: One of ``TEACHERS``.
        seed: What a teacher that draws draws from; others take no notice. For games that can be played again, ask for a
            teacher for each game, with the game's seed.

    Raises:
        ValueError: If there is none of that name; the message lists those there are.
    """
    return get_seeded_teacher(name)(seed)


def get_seeded_teacher(name: str) -> SeededTeacher:
    """What makes the teacher of a name from a seed.

    Raises:
        ValueError: If there is none of that name; the message lists those there are.
    """
    if name not in TEACHERS:
        near = difflib.get_close_matches(name, TEACHERS, n=1)
        hint = f". Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown teacher {name!r}; known teachers: {', '.join(sorted(TEACHERS))}{hint}")
    return TEACHERS[name]


def _whatever_the_seed(teacher: Teacher, seed: int) -> Teacher:
    return teacher
