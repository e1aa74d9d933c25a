"""Replays of recorded games: in a terminal, as a GIF and as an HTML page. Rich and Pillow are imported on first use."""

from snake_lora_pl.game.replay.gif import draw_board, render_gif
from snake_lora_pl.game.replay.html import board_script, json_for_script, render_html
from snake_lora_pl.game.replay.recording import Frame, Recording, record
from snake_lora_pl.game.replay.terminal import draw_grid, show

__all__ = [
    "Frame",
    "Recording",
    "board_script",
    "draw_board",
    "draw_grid",
    "json_for_script",
    "record",
    "render_gif",
    "render_html",
    "show",
]
