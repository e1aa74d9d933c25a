"""Snake itself: rules, players that search, and the text of boards and moves. Imports the standard library alone."""

from snake_lora_pl.game.board import Board, Cell, End, Move
from snake_lora_pl.game.game import Game
from snake_lora_pl.game.symmetry import SYMMETRIES, Symmetry
from snake_lora_pl.game.teachers import (
    TEACHERS,
    Teacher,
    get_teacher,
    register_seeded_teacher,
    register_teacher,
)
from snake_lora_pl.game.text import (
    STYLES,
    BoardReader,
    PromptState,
    Style,
    get_style,
    read_board,
    read_grid_size,
    read_move,
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
    "End",
    "Game",
    "Move",
    "PromptState",
    "Style",
    "Symmetry",
    "Teacher",
    "get_style",
    "get_teacher",
    "read_board",
    "read_grid_size",
    "read_move",
    "read_state",
    "register_seeded_teacher",
    "register_style",
    "register_teacher",
    "starts_new_game",
]
