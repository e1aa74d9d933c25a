"""Teachers: path-finding players that write the training data, each a function from a board to a move.

A teacher depends on the board alone, so it can be asked about any position, including those it would not reach itself.
It returns None if there is no legal move. Only ``random_legal`` draws random numbers and takes a seed.

To add a teacher, decorate a function with ``register_teacher("name")`` and import its module.
"""

from snake_lora_pl.game.teachers.hamiltonian import hamiltonian, hamiltonian_shortcuts
from snake_lora_pl.game.teachers.pathfinding import astar, bfs, greedy
from snake_lora_pl.game.teachers.random_legal import random_legal
from snake_lora_pl.game.teachers.registry import (
    TEACHERS,
    SeededTeacher,
    Teacher,
    get_seeded_teacher,
    get_teacher,
    register_seeded_teacher,
    register_teacher,
)
from snake_lora_pl.game.teachers.safe_greedy import safe_greedy

__all__ = [
    "TEACHERS",
    "SeededTeacher",
    "Teacher",
    "astar",
    "bfs",
    "get_seeded_teacher",
    "get_teacher",
    "greedy",
    "hamiltonian",
    "hamiltonian_shortcuts",
    "random_legal",
    "register_seeded_teacher",
    "register_teacher",
    "safe_greedy",
]
