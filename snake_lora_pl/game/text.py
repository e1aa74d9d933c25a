"""Boards and moves as text. Every format that a prompt or a completion can have is written and read here alone.

A style writes a board as a prompt and a move as a completion that explains it. The readers take any text that contains
a prompt, so that templates around it do not matter.
"""

from __future__ import annotations

import re
from typing import NamedTuple, Protocol

from snake_lora_pl.game.board import Board, Cell, Move


class PromptState(NamedTuple):
    """What every ``heuristics-v0.04`` prompt says of its position, whether or not it carries the body's order."""

    grid_size: int
    head: Cell
    length: int


class Style(Protocol):
    """One format of prompt and completion."""

    name: str

    def write_prompt(self, board: Board) -> str:
        """The board as a prompt."""

    def write_completion(self, board: Board, move: Move) -> str:
        """What the style says of a move on a board, ending in the conclusion."""

    def read_prompt(self, text: str) -> Board:
        """The board of a prompt of this style, wherever it stands in the text.

        Raises:
            ValueError: If the text holds no such prompt, or one whose position cannot occur.
        """


_BFS_512_PROMPT = """\
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


# A bound, because ``int`` refuses thousands of digits and a prompt may come from anywhere.
_NUMBER = r"\d{1,6}"


def _pattern_of(template: str) -> re.Pattern[str]:
    """The expression that reads what ``template.format`` wrote: a named group for each field."""
    pattern = re.escape(template)
    for field in dict.fromkeys(re.findall(r"{(\w+)}", template)):
        hole = rf"\{{{field}\}}"
        content = r"[\d, \[\]]*" if field == "rest" else _NUMBER
        pattern = pattern.replace(hole, f"(?P<{field}>{content})", 1).replace(hole, f"(?P={field})")
    return re.compile(pattern, re.ASCII)


_BFS_512_PATTERN = _pattern_of(_BFS_512_PROMPT)
# bfs-1024, bfs-2048, bfs-4096 and bfs-safe-greedy-4096 begin alike; their drawn board lacks the body's order.
_DRAWN_BOARD_PATTERN = re.compile(
    rf"Snake on (?P<size>{_NUMBER})x(?P=size) grid\.\n"
    rf"Head: \[(?P<head_x>{_NUMBER}), (?P<head_y>{_NUMBER})\], "
    rf"Apple: \[{_NUMBER}, {_NUMBER}\], Length: (?P<length>{_NUMBER})\.\n",
    re.ASCII,
)
_CELL_PATTERN = re.compile(rf"\[({_NUMBER}), ({_NUMBER})\]", re.ASCII)
_CONCLUSION = "Conclusion: "
_CONCLUSION_PATTERN = re.compile(r"Conclusion: (?:The move is: )?(UP|RIGHT|DOWN|LEFT)[ \t\r]*(?:\n|\Z)")


class Bfs512:
    """``bfs-512`` of the ``heuristics-v0.04`` files: coordinates, and a completion that reasons in metrics.

    What the metrics mean is what the upstream program wrote, its peculiarities included:

    - Valid moves: the grid's edge and the whole body block, the tail's cell too; reversal is not looked at, as the neck
      is body anyway. In the order UP, RIGHT, DOWN, LEFT.
    - Apple direction: where the apple lies, by axis; both ends of an axis are 0 where the coordinates agree.
    - Danger assessment: relative to the chosen move. Straight is that move's own cell, wall or body; left and right
      look at walls only.
    - Free space: cells in a straight run from the head until edge or body.
    """

    name = "bfs-512"

    def write_prompt(self, board: Board) -> str:
        """The board as a prompt.

        Raises:
            ValueError: If the board has no apple, for the format has no words for that.
        """
        apple_x, apple_y = _apple(board)
        return _BFS_512_PROMPT.format(
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
        """The metrics of the position and the move as the conclusion.

        Raises:
            ValueError: If the board has no apple.
        """
        apple_x, apple_y = _apple(board)
        x, y = board.head
        runs = {direction: _straight_run(board, direction) for direction in Move}
        left = (x - move.dy, y + move.dx)
        right = (x + move.dy, y - move.dx)
        return (
            f"Moving {move.name} from [{x}, {y}]\n"
            "\n"
            "Metrics:\n"
            f"- Valid moves: {[direction.name for direction, run in runs.items() if run]}\n"
            f"- Manhattan distance to apple: {abs(apple_x - x) + abs(apple_y - y)}\n"
            f"- Apple direction: {{'up': {apple_y > y:d}, 'down': {apple_y < y:d}, "
            f"'left': {apple_x < x:d}, 'right': {apple_x > x:d}}}\n"
            f"- Danger assessment: {{'straight': {runs[move] == 0:d}, "
            f"'left': {not board.contains(left):d}, 'right': {not board.contains(right):d}}}\n"
            f"- Free space: {{'up': {runs[Move.UP]}, 'down': {runs[Move.DOWN]}, "
            f"'left': {runs[Move.LEFT]}, 'right': {runs[Move.RIGHT]}}}\n"
            "\n"
            f"Conclusion: The move is: {move.name}"
        )

    def read_prompt(self, text: str) -> Board:
        """The board of a prompt of this style, wherever it stands in the text.

        Raises:
            ValueError: If the text holds no such prompt, or one whose position cannot occur.
        """
        match = _BFS_512_PATTERN.search(text)
        if match is None:
            raise ValueError(f"no {self.name} prompt in the text: {text[:80]!r}")
        rest = tuple((int(x), int(y)) for x, y in _CELL_PATTERN.findall(match["rest"]))
        length = int(match["length"])
        if length != len(rest) + 1:
            raise ValueError(f"the prompt says length {length} but lists {len(rest)} cells behind the head")
        head = (int(match["head_x"]), int(match["head_y"]))
        return Board(int(match["size"]), (head, *rest), (int(match["apple_x"]), int(match["apple_y"])))


STYLES: dict[str, Style] = {}


def register_style(style: Style) -> Style:
    """Make a style known by its name.

    Raises:
        ValueError: If the name is taken.
    """
    if style.name in STYLES:
        raise ValueError(f"a style named {style.name!r} is registered already; choose another name")
    STYLES[style.name] = style
    return style


def get_style(name: str) -> Style:
    """The style of a name.

    Raises:
        ValueError: If there is none; the message lists those there are.
    """
    if name not in STYLES:
        raise ValueError(f"unknown style {name!r}; known styles: {', '.join(sorted(STYLES))}")
    return STYLES[name]


register_style(Bfs512())


def read_move(completion: str) -> Move | None:
    """The move of the last line that reads ``Conclusion: The move is: X`` or ``Conclusion: X``; None without one."""
    start = completion.rfind(_CONCLUSION)
    while start >= 0:
        match = _CONCLUSION_PATTERN.match(completion, start)
        if match is not None and (start == 0 or completion[start - 1] == "\n"):
            return Move[match[1]]
        start = completion.rfind(_CONCLUSION, 0, start)
    return None


def read_board(text: str) -> Board | None:
    """The board of the prompt that a text contains, whatever its style.

    Returns:
        The board, or None where no known style that carries the body's order is found, or an impossible position.
    """
    for style in STYLES.values():
        try:
            return style.read_prompt(text)
        except ValueError:
            continue
    return None


def read_state(text: str) -> PromptState | None:
    """Grid size, head and length of the ``heuristics-v0.04`` prompt that a text contains; None without one.

    It reads more formats than ``read_board`` and is faster: the body's order is not needed.
    """
    match = _BFS_512_PATTERN.search(text) or _DRAWN_BOARD_PATTERN.search(text)
    if match is None:
        return None
    size, head_x, head_y, length = match.group("size", "head_x", "head_y", "length")
    return PromptState(int(size), (int(head_x), int(head_y)), int(length))


def read_grid_size(text: str) -> int | None:
    """Cells along one side of the grid in the prompt that a text contains; None without a known prompt."""
    state = read_state(text)
    return None if state is None else state.grid_size


def starts_new_game(previous: PromptState | None, move: Move | None, state: PromptState) -> bool:
    """Whether a row begins a new game, judged by the row before it.

    Rows of ``heuristics-v0.04`` carry no game id, and the last move of each game is missing. A new game begins where
    the head is not where the last row's move would have put it, or the length fell, or the grid is another one.

    Args:
        previous: The position of the row before, None for the first row.
        move: The move of the row before. Where it could not be read, None: then any neighbouring cell will do.
        state: The position of this row.
    """
    if previous is None or state.grid_size != previous.grid_size or state.length < previous.length:
        return True
    dx = state.head[0] - previous.head[0]
    dy = state.head[1] - previous.head[1]
    if move is None:
        return abs(dx) + abs(dy) != 1
    return (dx, dy) != (move.dx, move.dy)


def _apple(board: Board) -> Cell:
    if board.apple is None:
        raise ValueError("a board without an apple cannot be written: the game is over")
    return board.apple


def _straight_run(board: Board, direction: Move) -> int:
    """Cells from the head, straight on, until the edge or the body."""
    dx, dy = direction.dx, direction.dy
    x, y = board.head
    run = 0
    while True:
        x += dx
        y += dy
        if not (0 <= x < board.size and 0 <= y < board.size) or (x, y) in board.body:
            return run
        run += 1
