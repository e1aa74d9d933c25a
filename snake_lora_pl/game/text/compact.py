"""The style ``compact``: a short prompt with the features of each move, and the bare move as the completion.

With the tokenizers of Llama and SmolLM2 the completion is a single token, so one forward pass compares all four moves.
"""

from __future__ import annotations

import re

from snake_lora_pl.game.board import Board, Move
from snake_lora_pl.game.features import MoveFeatures, move_features
from snake_lora_pl.game.text.style import NUMBER, PromptState, apple_line, apple_of

_PATTERN = re.compile(
    rf"Snake(?P<size>{NUMBER});(?P<head_x>{NUMBER}),(?P<head_y>{NUMBER});"
    rf"(?P<apple_x>{NUMBER}),(?P<apple_y>{NUMBER});(?P<trail>[URDL]*)\n",
    re.ASCII,
)


class Compact:
    """Prompts with the position, the features of each move and the offset of the apple; bare moves as completions.

    The first line is ``Snake{size};{head};{apple};{trail}``, where the last part is ``Board.trail``. Then follows one
    line for each move, with the first of these that applies:

    - ``wall`` or ``body``: the move is not legal;
    - ``trap N``: the tail is unreachable after the move, and N free cells are reachable;
    - ``bait N``: the move begins a shortest path to the apple, but the tail is unreachable after eating; N steps to the
      tail;
    - ``apple N``: N steps to the apple through free cells after the move, 0 if the move eats it;
    - ``tail N``: no path leads to the apple; N steps to the tail.

    The last line is the offset of the apple from the head, in the order in which BFS tries the axes: ``apple DOWN 2
    LEFT 5``. It comes last because models learn first from the text nearest to the completion.
    """

    name = "compact"

    def write_prompt(self, board: Board) -> str:
        """Return the prompt that describes a board.

        Raises:
            ValueError: If the board has no apple.
        """
        apple_x, apple_y = apple_of(board)
        head_x, head_y = board.head
        lines = [f"Snake{board.size};{head_x},{head_y};{apple_x},{apple_y};{board.trail}"]
        lines += [f"{move.name} {_describe(features)}" for move, features in move_features(board).items()]
        lines += [apple_line(board)]
        return "\n".join(lines)

    def write_completion(self, board: Board, move: Move) -> str:
        """Return the name of the move."""
        return move.name

    def read_prompt(self, text: str) -> Board:
        """Return the board of a prompt of this style, anywhere in the text. Only the first line is read.

        Raises:
            ValueError: If the text contains no such prompt, or its position is invalid.
        """
        match = _PATTERN.search(text)
        if match is None:
            raise ValueError(f"the text contains no {self.name} prompt: {text[:80]!r}")
        head = (int(match["head_x"]), int(match["head_y"]))
        apple = (int(match["apple_x"]), int(match["apple_y"]))
        return Board.from_trail(int(match["size"]), head, match["trail"], apple)

    def read_state(self, text: str) -> PromptState | None:
        """Return grid size, head and length of a prompt of this style; None if the text contains none."""
        match = _PATTERN.search(text)
        if match is None:
            return None
        return PromptState(int(match["size"]), (int(match["head_x"]), int(match["head_y"])), len(match["trail"]) + 1)


def _describe(features: MoveFeatures) -> str:
    if features.obstacle is not None:
        return features.obstacle
    if features.tail_distance is None:
        return f"trap {features.num_reachable}"
    if features.is_bait:
        return f"bait {features.tail_distance}"
    if features.apple_distance is not None:
        return f"apple {features.apple_distance}"
    return f"tail {features.tail_distance}"
