"""Replay of a recorded game as a self-contained HTML page."""

from __future__ import annotations

import html
import json
import re
from importlib import resources

from snake_lora_pl.game.replay.recording import Recording

_PLACEHOLDER = re.compile(r"__(TITLE|GAME|BOARD)__")


def render_html(recording: Recording) -> str:
    """Render a page that plays a game, with controls, keyboard shortcuts and the player's completion for each move.

    The page loads no other resources. Titles and completions are untrusted input and are shown as text only.
    """
    game = {
        "title": recording.title,
        "size": recording.size,
        "end": None if recording.end is None else recording.end.value,
        "frames": [
            {
                "head": frame.board.head,
                "trail": frame.board.trail,
                "apple": frame.board.apple,
                "move": None if frame.move is None else frame.move.name,
                "completion": frame.completion,
            }
            for frame in recording.frames
        ],
    }
    values = {"TITLE": html.escape(recording.title), "GAME": json_for_script(game), "BOARD": board_script()}
    template = resources.files(__package__).joinpath("player.html").read_text(encoding="utf-8")
    # In one pass, so that placeholders in a title or a completion are not replaced.
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def board_script() -> str:
    """Return the JavaScript function that draws a position on a canvas: ``drawBoard(canvas, game, index)``."""
    return resources.files(__package__).joinpath("board.js").read_text(encoding="utf-8").strip()


def json_for_script(value: object) -> str:
    """Return JSON that can be embedded in a ``<script>`` element: it contains no ``<``, ``>`` or ``&``."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
