"""The styles of the ``heuristics-v0.04`` files with an ASCII board: bfs-1024, -2048, -4096, bfs-safe-greedy-4096.

An ASCII board shows the head as ``H``, the body as ``S`` and the apple as ``A``, but not the order of the body. The
order follows from the board itself if only one order is possible, else from the preceding row of the same game.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from snake_lora_pl.game.board import MAX_GRID_SIZE, Board, Cell, Move
from snake_lora_pl.game.search import apple_distance, shortest_moves
from snake_lora_pl.game.text.metrics import FILE_ORDER, measure, write_metrics
from snake_lora_pl.game.text.style import NUMBER, PromptState, apple_of

_HEADER_PATTERN = re.compile(
    rf"Snake on (?P<size>{NUMBER})x(?P=size) grid\.\n"
    rf"Head: \[(?P<head_x>{NUMBER}), (?P<head_y>{NUMBER})\], "
    rf"Apple: \[(?P<apple_x>{NUMBER}), (?P<apple_y>{NUMBER})\], Length: (?P<length>{NUMBER})\.\n",
    re.ASCII,
)
# Bounded by the largest grid, so that a board of millions of lines is not read to its end.
_BOARD_PATTERN = re.compile(rf"Board:\n(?P<rows>(?:[.SHA](?: [.SHA]){{0,{MAX_GRID_SIZE - 1}}}\n){{1,{MAX_GRID_SIZE}}})")
# Bounds the search for the order of the body to milliseconds; a dense body can have exponentially many partial orders.
_MAX_SEARCH_STEPS = 10_000


@dataclass(frozen=True, slots=True)
class AsciiBoard:
    """A position without the order of the body.

    Attributes:
        size: Cells along one side of the grid.
        head: The head's cell.
        apple: The apple's cell.
        body: The snake's cells, including the head's.
    """

    size: int
    head: Cell
    apple: Cell
    body: frozenset[Cell]

    def orders(self, limit: int) -> list[tuple[Cell, ...]]:
        """Return possible orders of the body, from head to tail.

        Args:
            limit: Number of orders after which the search stops.

        Raises:
            ValueError: If the search exceeds its number of steps.
        """
        found: list[tuple[Cell, ...]] = []
        num_steps = 0
        stack: list[tuple[Cell, ...]] = [(self.head,)]
        while stack and len(found) < limit:
            num_steps += 1
            if num_steps > _MAX_SEARCH_STEPS:
                raise ValueError(f"the search for the order of a body of {len(self.body)} cells takes too long")
            body = stack.pop()
            if len(body) == len(self.body):
                found.append(body)
                continue
            x, y = body[-1]
            around = ((x, y + 1), (x + 1, y), (x, y - 1), (x - 1, y))
            stack.extend((*body, cell) for cell in around if cell in self.body and cell not in body)
        return found

    def board(self) -> Board:
        """Return the position, if the body has exactly one possible order.

        Raises:
            ValueError: If it has several, or none.
        """
        orders = self.orders(limit=2)
        if len(orders) != 1:
            raise ValueError(f"the body of the ASCII board has {'several possible orders' if orders else 'no order'}")
        return Board(self.size, orders[0], self.apple)

    def board_after(self, previous: Board) -> Board | None:
        """Return the position, if it can directly follow another one; None if it cannot."""
        body = (self.head, *previous.body)[: len(self.body)]
        if self.size != previous.size or len(self.body) < previous.length or set(body) != self.body:
            return None
        try:
            return Board(self.size, body, self.apple)
        except ValueError:
            return None


@dataclass(frozen=True)
class AsciiBoardStyle:
    """Prompts with an ASCII board; completions with path, distance and, in some styles, metrics.

    Attributes:
        name: The style's name.
        algorithm: The name of the algorithm in the completion.
        claim: An adjective for the path, followed by a space, or an empty string.
        has_metrics: Whether the completion contains a block of metrics.
    """

    name: str
    algorithm: str
    claim: str
    has_metrics: bool

    def write_prompt(self, board: Board) -> str:
        """Return the prompt that describes a board.

        Raises:
            ValueError: If the board has no apple.
        """
        apple = apple_of(board)
        symbols = dict.fromkeys(board.body, "S") | {board.head: "H", apple: "A"}
        size = board.size
        rows = [" ".join([symbols.get((x, y), ".") for x in range(size)]) for y in range(size - 1, -1, -1)]
        return (
            f"Snake on {size}x{size} grid.\n"
            f"Head: {list(board.head)}, Apple: {list(apple)}, Length: {board.length}.\n"
            "Board:\n" + "\n".join(rows) + "\nChoose next move (UP, DOWN, LEFT, RIGHT):"
        )

    def write_completion(self, board: Board, move: Move) -> str:
        """Return the rationale of a move, followed by the move as the conclusion.

        The files contain moves on shortest paths only; the rationale of other moves states that they are not.

        Raises:
            ValueError: If the board has no apple.
        """
        metrics = measure(board, move)
        num_steps = apple_distance(board)
        path = "no path to apple" if num_steps is None else f"{self.claim}path to apple ({num_steps} steps)"
        rationale = "No step of a shortest path"
        if move in shortest_moves(board):
            rationale = f"{self.claim}shortest path to apple".capitalize()
        block = ""
        if self.has_metrics:
            free_space = ", ".join(f"{side.name}={metrics.free_space[side]}" for side in FILE_ORDER)
            block = write_metrics(metrics, "Manhattan distance", free_space) + "\n"
        return (
            f"{self.algorithm}: Found {path}\n"
            f"Moving {move.name} from {list(board.head)}\n"
            f"Distance: {metrics.manhattan_distance}, Free cells: {board.size**2 - board.length}\n"
            f"Rationale: {rationale}\n"
            "\n"
            f"{block}"
            f"Conclusion: {move.name}"
        )

    def read_prompt(self, text: str) -> Board:
        """Return the board of a prompt of this style, anywhere in the text.

        Raises:
            ValueError: If the text contains no such prompt, or its position is invalid or ambiguous.
        """
        return read_ascii_board(text).board()

    def read_state(self, text: str) -> PromptState | None:
        """Return grid size, head and length of a prompt of this style; None if the text contains none."""
        match = _HEADER_PATTERN.search(text)
        if match is None:
            return None
        return PromptState(int(match["size"]), (int(match["head_x"]), int(match["head_y"])), int(match["length"]))


ASCII_BOARD_STYLES = (
    AsciiBoardStyle("bfs-1024", "BFS", "", has_metrics=False),
    AsciiBoardStyle("bfs-2048", "BFS", "", has_metrics=False),
    AsciiBoardStyle("bfs-4096", "BFS", "", has_metrics=True),
    AsciiBoardStyle("bfs-safe-greedy-4096", "SAFE-GREEDY", "safe ", has_metrics=True),
)


def read_ascii_board(text: str) -> AsciiBoard:
    """Return the ASCII board of the prompt in a text.

    Raises:
        ValueError: If the text contains none, or the board contradicts the numbers in the prompt.
    """
    header = _HEADER_PATTERN.search(text)
    rows = None if header is None else _BOARD_PATTERN.match(text, header.end())
    if header is None or rows is None:
        raise ValueError(f"the text contains no ASCII board: {text[:80]!r}")
    size = int(header["size"])
    lines = [line.split(" ") for line in rows["rows"].splitlines()[::-1]]
    if len(lines) != size or any(len(line) != size for line in lines):
        raise ValueError(f"the ASCII board is not {size}x{size}")
    cells: dict[str, list[Cell]] = {"S": [], "H": [], "A": [], ".": []}
    for y, line in enumerate(lines):
        for x, symbol in enumerate(line):
            cells[symbol].append((x, y))
    head = (int(header["head_x"]), int(header["head_y"]))
    apple = (int(header["apple_x"]), int(header["apple_y"]))
    length = int(header["length"])
    if cells["H"] != [head] or cells["A"] != [apple] or len(cells["S"]) + 1 != length:
        raise ValueError("the ASCII board contradicts the prompt's head, apple or length")
    return AsciiBoard(size, head, apple, frozenset([head, *cells["S"]]))
