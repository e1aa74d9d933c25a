"""``compact``: a style of our own, made to learn from in few tokens.

The prompt is the position in one line, then a line for each direction that says what the snake senses there. The
completion is the move and nothing else. With the tokenizers of Llama and SmolLM2 that is one token, so the answer
decides itself at once, and four of them can be compared in one forward pass.
"""

from __future__ import annotations

import re

from snake_lora_pl.game.board import Board, Move
from snake_lora_pl.game.senses import Sense, sense
from snake_lora_pl.game.text.style import NUMBER, PromptState, apple_of, register_style

_PATTERN = re.compile(
    rf"Snake(?P<size>{NUMBER});(?P<head_x>{NUMBER}),(?P<head_y>{NUMBER});"
    rf"(?P<apple_x>{NUMBER}),(?P<apple_y>{NUMBER});(?P<trail>[URDL]*)\n",
    re.ASCII,
)


class Compact:
    """The position in one line, the senses of each direction in a word and a number or two, and the bare move.

    The first line is ``Snake{size};{head};{apple};{trail}``, the last being ``Board.trail``. A direction is blocked by
    a ``wall`` or by the ``body``, or it is open: ``apple`` and the steps to it, ``bait`` in its place where the snake
    would shut itself in by eating; ``tail`` and the steps to it, or ``trap`` and the room that is left where the tail
    is cut off.
    """

    name = "compact"

    def write_prompt(self, board: Board) -> str:
        """The board as a prompt.

        Raises:
            ValueError: If the board has no apple.
        """
        apple_x, apple_y = apple_of(board)
        head_x, head_y = board.head
        senses = [f"{move.name} {_describe(sensed)}" for move, sensed in sense(board).items()]
        return "\n".join([f"Snake{board.size};{head_x},{head_y};{apple_x},{apple_y};{board.trail}", *senses])

    def write_completion(self, board: Board, move: Move) -> str:
        """The move."""
        return move.name

    def read_prompt(self, text: str) -> Board:
        """The board of a prompt of this style, wherever it stands in the text; what is sensed is not looked at.

        Raises:
            ValueError: If the text holds no such prompt, or one whose position cannot occur.
        """
        match = _PATTERN.search(text)
        if match is None:
            raise ValueError(f"no {self.name} prompt in the text: {text[:80]!r}")
        head = (int(match["head_x"]), int(match["head_y"]))
        apple = (int(match["apple_x"]), int(match["apple_y"]))
        return Board.from_trail(int(match["size"]), head, match["trail"], apple)

    def read_state(self, text: str) -> PromptState | None:
        """Grid size, head and length of a prompt of this style; None where the text holds none."""
        match = _PATTERN.search(text)
        if match is None:
            return None
        return PromptState(int(match["size"]), (int(match["head_x"]), int(match["head_y"])), len(match["trail"]) + 1)


def _describe(sensed: Sense) -> str:
    if sensed.obstacle is not None:
        return sensed.obstacle
    words = []
    if sensed.apple_distance is not None:
        words.append(f"{'bait' if sensed.is_bait else 'apple'}{sensed.apple_distance}")
    words.append(f"trap{sensed.room}" if sensed.tail_distance is None else f"tail{sensed.tail_distance}")
    return " ".join(words)


register_style(Compact())
