"""Prompts and completions: every text format of boards and moves is written and read in this package only.

A style writes a board as a prompt and a move as a completion that explains it. ``parsing`` reads the move from a
completion, and the board from any text that contains a prompt, so the template around the prompt does not matter.
"""

from snake_lora_pl.game.text.ascii_board import ASCII_BOARD_STYLES, AsciiBoardStyle
from snake_lora_pl.game.text.bfs_512 import Bfs512
from snake_lora_pl.game.text.claims import CLAIM_NAMES, Claims, check_claims, check_completion, read_claims
from snake_lora_pl.game.text.compact import Compact
from snake_lora_pl.game.text.move_lines import MOVE_LINES_STYLES, MoveLines
from snake_lora_pl.game.text.parsing import (
    BoardReader,
    find_move,
    find_style,
    read_announced_move,
    read_board,
    read_grid_size,
    read_move,
    read_moves,
    read_state,
    starts_new_game,
)
from snake_lora_pl.game.text.style import (
    STYLES,
    MoveStatingStyle,
    OrientedStyle,
    PromptMoves,
    PromptState,
    Style,
    get_style,
    register_style,
)

__all__ = [
    "CLAIM_NAMES",
    "STYLES",
    "AsciiBoardStyle",
    "Bfs512",
    "BoardReader",
    "Claims",
    "Compact",
    "MoveLines",
    "MoveStatingStyle",
    "OrientedStyle",
    "PromptMoves",
    "PromptState",
    "Style",
    "check_claims",
    "check_completion",
    "find_move",
    "find_style",
    "get_style",
    "read_announced_move",
    "read_board",
    "read_claims",
    "read_grid_size",
    "read_move",
    "read_moves",
    "read_state",
    "register_style",
    "starts_new_game",
]

# Texts are searched for prompts of the styles in this order.
for _style in (Bfs512(), *ASCII_BOARD_STYLES, Compact(), *MOVE_LINES_STYLES):
    register_style(_style)
