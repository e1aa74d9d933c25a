"""Boards and moves as text. Every format that a prompt or a completion can have is written and read here alone.

A style writes a board as a prompt and a move as a completion that explains it. The readers take any text that contains
a prompt, so that templates around it do not matter. Importing this package registers the styles there are.
"""

# Importing a style's module registers it; in this order they are looked for in a text.
from snake_lora_pl.game.text.bfs_512 import Bfs512
from snake_lora_pl.game.text.claims import CLAIM_NAMES, Claims, check_claims, check_completion, read_claims
from snake_lora_pl.game.text.compact import Compact
from snake_lora_pl.game.text.drawn import DrawnStyle
from snake_lora_pl.game.text.reading import (
    BoardReader,
    read_announced_move,
    read_board,
    read_grid_size,
    read_move,
    read_state,
    starts_new_game,
)
from snake_lora_pl.game.text.style import STYLES, PromptState, Style, get_style, register_style

__all__ = [
    "CLAIM_NAMES",
    "STYLES",
    "Bfs512",
    "BoardReader",
    "Claims",
    "Compact",
    "DrawnStyle",
    "PromptState",
    "Style",
    "check_claims",
    "check_completion",
    "get_style",
    "read_announced_move",
    "read_board",
    "read_claims",
    "read_grid_size",
    "read_move",
    "read_state",
    "register_style",
    "starts_new_game",
]
