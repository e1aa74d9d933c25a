"""Players that search: each is a function from a board to a move. Knows nothing of text or models.

A teacher looks at the board alone, so any position can be put to it, also one that it would not have reached itself.
It answers None where no legal move is left. ``random_legal`` has a seed beside; it alone gives two answers to one
position.
"""

from snake_lora_pl.game.teachers.hamiltonian import hamiltonian, hamiltonian_shortcuts
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
from snake_lora_pl.game.teachers.towards_apple import astar, bfs, greedy

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
