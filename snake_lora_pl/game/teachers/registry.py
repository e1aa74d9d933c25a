"""Registry of teachers by name. ``register_teacher`` adds one, also from outside this package."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from snake_lora_pl.game import registry
from snake_lora_pl.game.board import Board, Move

Teacher: TypeAlias = Callable[[Board], "Move | None"]
"""A function from a board to a legal move, or to None if there is no legal move."""

SeededTeacher: TypeAlias = Callable[[int], Teacher]
"""A function that makes a teacher from a seed."""

TEACHERS: dict[str, SeededTeacher] = {}


def register_teacher(name: str) -> Callable[[Teacher], Teacher]:
    """Return a decorator that registers a deterministic teacher.

    Raises:
        ValueError: If the name is taken.
    """

    def register(teacher: Teacher) -> Teacher:
        # Partials of importable functions can be pickled, so that teachers can be sent to other processes.
        register_seeded_teacher(name)(partial(_ignore_seed, teacher))
        return teacher

    return register


def register_seeded_teacher(name: str) -> Callable[[SeededTeacher], SeededTeacher]:
    """Return a decorator that registers a function that makes a randomized teacher from a seed.

    Raises:
        ValueError: If the name is taken.
    """

    def register(make: SeededTeacher) -> SeededTeacher:
        registry.add(TEACHERS, name, make, "teacher")
        return make

    return register


def get_teacher(name: str, seed: int = 0) -> Teacher:
    """Return a teacher by name.

    Args:
        name: A key of ``TEACHERS``.
        seed: Seed of a randomized teacher; deterministic teachers ignore it. To make games reproducible, get one
            teacher for each game, with the game's seed.

    Raises:
        ValueError: If the name is unknown; the message lists the known names.
    """
    return get_seeded_teacher(name)(seed)


def get_seeded_teacher(name: str) -> SeededTeacher:
    """Return the function that makes the teacher of a name from a seed.

    Raises:
        ValueError: If the name is unknown; the message lists the known names.
    """
    return registry.look_up(TEACHERS, name, "teacher")


def _ignore_seed(teacher: Teacher, seed: int) -> Teacher:
    return teacher
