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
    """The position in one line, what each direction holds in a word and a number, the way to the apple; the bare move.

    The first line is ``Snake{size};{head};{apple};{trail}``, the last part being ``Board.trail``. Then a line for each
    direction, the first of these that fits:

    - ``wall`` or ``body``: the move is deadly or none at all;
    - ``trap N``: the tail is cut off after it, and N free cells are left;
    - ``bait N``: a shortest path to the apple leads there, but eating would shut the snake in; N steps to the tail;
    - ``apple N``: N steps from there to the apple through free cells, 0 where the move eats;
    - ``tail N``: no path leads to the apple; N steps to the tail.

    The last line says where the apple lies from the head, one axis after the other as BFS tries them: ``apple DOWN 2
    LEFT 5``. It comes last because what stands nearest to the answer is learnt first.
    """

    name = "compact"

    def write_prompt(self, board: Board) -> str:
        """The board as a prompt.

        Raises:
            ValueError: If the board has no apple.
        """
        apple_x, apple_y = apple_of(board)
        head_x, head_y = board.head
        across, up = apple_x - head_x, apple_y - head_y
        ways = [(Move.UP if up > 0 else Move.DOWN, abs(up)), (Move.LEFT if across < 0 else Move.RIGHT, abs(across))]
        lines = [f"Snake{board.size};{head_x},{head_y};{apple_x},{apple_y};{board.trail}"]
        lines += [f"{move.name} {_describe(sensed)}" for move, sensed in sense(board).items()]
        lines += [" ".join(["apple", *(f"{move.name} {steps}" for move, steps in ways if steps)])]
        return "\n".join(lines)

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
    if sensed.tail_distance is None:
        return f"trap {sensed.room}"
    if sensed.is_bait:
        return f"bait {sensed.tail_distance}"
    if sensed.apple_distance is not None:
        return f"apple {sensed.apple_distance}"
    return f"tail {sensed.tail_distance}"


register_style(Compact())
