"""A recorded game as one HTML page that needs nothing else."""

from __future__ import annotations

import html
import json
import re
from importlib import resources

from snake_lora_pl.game.replay.recording import Recording

_PLACEHOLDER = re.compile(r"__(TITLE|GAME|BOARD)__")


def render_html(recording: Recording) -> str:
    """A page that plays a game: step, pause, speed, keys, and the player's words beside the board.

    The page loads nothing and runs no code but its own; whatever the words hold is shown as text.

    Args:
        recording: The game.

    Returns:
        The page.
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
                "words": frame.words,
            }
            for frame in recording.frames
        ],
    }
    values = {"TITLE": html.escape(recording.title), "GAME": json_for_script(game), "BOARD": board_script()}
    template = resources.files(__package__).joinpath("player.html").read_text(encoding="utf-8")
    # In one pass: a title or words that look like a placeholder stay what they are.
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def board_script() -> str:
    """JavaScript that draws a position on a canvas: ``drawBoard(canvas, game, index)``."""
    return resources.files(__package__).joinpath("board.js").read_text(encoding="utf-8").strip()


def json_for_script(value: object) -> str:
    """JSON that cannot end the element it stands in, nor begin another."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
