"""Games to look at: in a terminal, as a GIF, as a page that plays them. Rich and Pillow are imported where needed."""

from snake_lora_pl.game.replay.gif import render_gif
from snake_lora_pl.game.replay.html import board_script, json_for_script, render_html
from snake_lora_pl.game.replay.recording import Frame, Recording, record
from snake_lora_pl.game.replay.terminal import show

__all__ = ["Frame", "Recording", "board_script", "json_for_script", "record", "render_gif", "render_html", "show"]
