"""Snake: rules, path-finding teachers, and the text formats of prompts and completions.

The package imports only the standard library. Rich and Pillow are imported when a replay is rendered. ``env``, the
game as a Gymnasium environment, is the exception: it requires Gymnasium and NumPy and is imported by name only.
"""

from snake_lora_pl.game.board import Board, Cell, End, Move
from snake_lora_pl.game.game import Game
from snake_lora_pl.game.search import apple_distance, shortest_moves
from snake_lora_pl.game.symmetry import SYMMETRIES, Symmetry
from snake_lora_pl.game.teachers import (
    TEACHERS,
    SeededTeacher,
    Teacher,
    get_seeded_teacher,
    get_teacher,
    register_seeded_teacher,
    register_teacher,
)
from snake_lora_pl.game.text import (
    STYLES,
    BoardReader,
    Claims,
    MoveStatingStyle,
    OrientedStyle,
    PromptMoves,
    PromptState,
    Style,
    check_claims,
    check_completion,
    find_style,
    get_style,
    read_announced_move,
    read_board,
    read_claims,
    read_grid_size,
    read_move,
    read_moves,
    read_state,
    register_style,
    starts_new_game,
)

__all__ = [
    "STYLES",
    "SYMMETRIES",
    "TEACHERS",
    "Board",
    "BoardReader",
    "Cell",
    "Claims",
    "End",
    "Game",
    "Move",
    "MoveStatingStyle",
    "OrientedStyle",
    "PromptMoves",
    "PromptState",
    "SeededTeacher",
    "Style",
    "Symmetry",
    "Teacher",
    "apple_distance",
    "check_claims",
    "check_completion",
    "find_style",
    "get_seeded_teacher",
    "get_style",
    "get_teacher",
    "read_announced_move",
    "read_board",
    "read_claims",
    "read_grid_size",
    "read_move",
    "read_moves",
    "read_state",
    "register_seeded_teacher",
    "register_style",
    "register_teacher",
    "shortest_moves",
    "starts_new_game",
]
