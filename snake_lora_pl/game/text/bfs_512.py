"""The style ``bfs-512`` of the ``heuristics-v0.04`` files: coordinates in the prompt, metrics in the completion."""

from __future__ import annotations

import re

from snake_lora_pl.game.board import Board, Move
from snake_lora_pl.game.text.metrics import FILE_ORDER, measure, write_metrics
from snake_lora_pl.game.text.style import NUMBER, PromptState, apple_of

_PROMPT = """\
You are playing Snake on a {size}x{size} grid. \
The coordinate system is (0,0) at bottom-left to ({last},{last}) at top-right. \
Movement: UP=y+1, DOWN=y-1, RIGHT=x+1, LEFT=x-1.

Current game state:
- Snake head position: ({head_x}, {head_y})
- Apple position: ({apple_x}, {apple_y})
- Snake body positions: [{rest}]
- Snake length: {length}

What is the best move to make? Consider:
1. Path to the apple
2. Avoiding collisions with walls and snake body
3. Maximizing score and survival

Choose from: UP, DOWN, LEFT, RIGHT"""


def _pattern_of(template: str) -> re.Pattern[str]:
    """Return the pattern that matches the output of ``template.format``, with a named group for each field."""
    pattern = re.escape(template)
    for field in dict.fromkeys(re.findall(r"{(\w+)}", template)):
        placeholder = rf"\{{{field}\}}"
        content = r"[\d, \[\]]*" if field == "rest" else NUMBER
        pattern = pattern.replace(placeholder, f"(?P<{field}>{content})", 1).replace(placeholder, f"(?P={field})")
    return re.compile(pattern, re.ASCII)


_PATTERN = _pattern_of(_PROMPT)
_CELL_PATTERN = re.compile(rf"\[({NUMBER}), ({NUMBER})\]", re.ASCII)


class Bfs512:
    """Prompts that list the coordinates of head, apple and body; completions that state the metrics of the position."""

    name = "bfs-512"

    def write_prompt(self, board: Board) -> str:
        """Return the prompt that describes a board.

        Raises:
            ValueError: If the board has no apple.
        """
        apple_x, apple_y = apple_of(board)
        return _PROMPT.format(
            size=board.size,
            last=board.size - 1,
            head_x=board.head[0],
            head_y=board.head[1],
            apple_x=apple_x,
            apple_y=apple_y,
            rest=", ".join([f"[{x}, {y}]" for x, y in board.body[1:]]),
            length=board.length,
        )

    def write_completion(self, board: Board, move: Move) -> str:
        """Return the metrics of the position, followed by the move as the conclusion.

        Raises:
            ValueError: If the board has no apple.
        """
        metrics = measure(board, move)
        free_space = {side.name.lower(): metrics.free_space[side] for side in FILE_ORDER}
        return (
            f"Moving {move.name} from {list(board.head)}\n"
            "\n"
            f"{write_metrics(metrics, 'Manhattan distance to apple', str(free_space))}"
            "\n"
            f"Conclusion: The move is: {move.name}"
        )

    def read_prompt(self, text: str) -> Board:
        """Return the board of a prompt of this style, anywhere in the text.

        Raises:
            ValueError: If the text contains no such prompt, or its position is invalid.
        """
        match = _PATTERN.search(text)
        if match is None:
            raise ValueError(f"the text contains no {self.name} prompt: {text[:80]!r}")
        rest = tuple((int(x), int(y)) for x, y in _CELL_PATTERN.findall(match["rest"]))
        length = int(match["length"])
        if length != len(rest) + 1:
            raise ValueError(f"the prompt states length {length} but lists {len(rest)} body cells after the head")
        head = (int(match["head_x"]), int(match["head_y"]))
        return Board(int(match["size"]), (head, *rest), (int(match["apple_x"]), int(match["apple_y"])))

    def read_state(self, text: str) -> PromptState | None:
        """Return grid size, head and length of a prompt of this style; None if the text contains none."""
        match = _PATTERN.search(text)
        if match is None:
            return None
        head = (int(match["head_x"]), int(match["head_y"]))
        return PromptState(int(match["size"]), head, int(match["length"]))
