"""The styles of the ``heuristics-v0.04`` files that draw the board: bfs-1024, -2048, -4096 and bfs-safe-greedy-4096.

Their drawing, ``S`` for the body and ``H`` for the head, lacks the body's order. It follows from the drawing alone
where the body can lie in one way only, and from the rows before in a file that holds whole games.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from snake_lora_pl.game.board import MAX_GRID_SIZE, Board, Cell, Move
from snake_lora_pl.game.search import apple_distance, shortest_moves
from snake_lora_pl.game.text.metrics import measure, write_metrics
from snake_lora_pl.game.text.style import NUMBER, PromptState, apple_of, register_style

_HEADER_PATTERN = re.compile(
    rf"Snake on (?P<size>{NUMBER})x(?P=size) grid\.\n"
    rf"Head: \[(?P<head_x>{NUMBER}), (?P<head_y>{NUMBER})\], "
    rf"Apple: \[(?P<apple_x>{NUMBER}), (?P<apple_y>{NUMBER})\], Length: (?P<length>{NUMBER})\.\n",
    re.ASCII,
)
# As many rows and columns as a grid may have: a drawing of millions of lines is not read to its end.
_BOARD_PATTERN = re.compile(rf"Board:\n(?P<rows>(?:[.SHA](?: [.SHA]){{0,{MAX_GRID_SIZE - 1}}}\n){{1,{MAX_GRID_SIZE}}})")
# Steps that the search for the body's order may take: milliseconds. A body that is a dense tangle may need ages.
_MAX_SEARCH_STEPS = 10_000


@dataclass(frozen=True, slots=True)
class Drawing:
    """A drawn board: all of a position but the body's order.

    Attributes:
        size: Cells along one side of the grid.
        head: The head's cell.
        apple: The apple's cell.
        body: The snake's cells, the head's among them.
    """

    size: int
    head: Cell
    apple: Cell
    body: frozenset[Cell]

    def orders(self, limit: int) -> list[tuple[Cell, ...]]:
        """Ways in which the body may lie, from head to tail.

        Args:
            limit: Ways after which the search stops.

        Raises:
            ValueError: If the search would take too long.
        """
        found: list[tuple[Cell, ...]] = []
        num_steps = 0
        stack: list[tuple[Cell, ...]] = [(self.head,)]
        while stack and len(found) < limit:
            num_steps += 1
            if num_steps > _MAX_SEARCH_STEPS:
                raise ValueError(f"the body of {len(self.body)} cells is too tangled to find its order in a drawing")
            body = stack.pop()
            if len(body) == len(self.body):
                found.append(body)
                continue
            x, y = body[-1]
            around = ((x, y + 1), (x + 1, y), (x, y - 1), (x - 1, y))
            stack.extend((*body, cell) for cell in around if cell in self.body and cell not in body)
        return found

    def board(self) -> Board:
        """The position, where the body can lie in one way only.

        Raises:
            ValueError: If it can lie in several, or in none.
        """
        orders = self.orders(limit=2)
        if len(orders) != 1:
            ways = "in several ways" if orders else "in no way"
            raise ValueError(f"a drawing lacks the body's order, and this one's body can lie {ways}")
        return Board(self.size, orders[0], self.apple)

    def board_after(self, previous: Board) -> Board | None:
        """The position, where it is the one right after another; None where it cannot be that."""
        body = (self.head, *previous.body)[: len(self.body)]
        if self.size != previous.size or len(self.body) < previous.length or set(body) != self.body:
            return None
        try:
            return Board(self.size, body, self.apple)
        except ValueError:
            return None


@dataclass(frozen=True)
class DrawnStyle:
    """A drawn board in the prompt; path, distance and, in some styles, metrics in the completion.

    Attributes:
        name: The style's name.
        algorithm: Who speaks.
        claim: What it claims of its path beside being the shortest, followed by a space; or nothing.
        has_metrics: Whether the completion holds a block of metrics.
    """

    name: str
    algorithm: str
    claim: str
    has_metrics: bool

    def write_prompt(self, board: Board) -> str:
        """The board as a prompt.

        Raises:
            ValueError: If the board has no apple.
        """
        apple = apple_of(board)
        signs = dict.fromkeys(board.body, "S") | {board.head: "H", apple: "A"}
        size = board.size
        rows = [" ".join([signs.get((x, y), ".") for x in range(size)]) for y in range(size - 1, -1, -1)]
        return (
            f"Snake on {size}x{size} grid.\n"
            f"Head: {list(board.head)}, Apple: {list(apple)}, Length: {board.length}.\n"
            "Board:\n" + "\n".join(rows) + "\nChoose next move (UP, DOWN, LEFT, RIGHT):"
        )

    def write_completion(self, board: Board, move: Move) -> str:
        """What is to be said of the move, and the move as the conclusion.

        The files hold moves on shortest paths alone; of others it is said that they are none.

        Raises:
            ValueError: If the board has no apple.
        """
        metrics = measure(board, move)
        num_steps = apple_distance(board)
        path = "no path to apple" if num_steps is None else f"{self.claim}path to apple ({num_steps} steps)"
        shortest = move in shortest_moves(board)
        rationale = f"{self.claim}shortest path to apple".capitalize() if shortest else "No step of a shortest path"
        block = ""
        if self.has_metrics:
            free_space = ", ".join(f"{name}={metrics.free_space[Move[name]]}" for name in _FREE_SPACE_ORDER)
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
        """The board of a drawn prompt, wherever it stands in the text.

        Raises:
            ValueError: If the text holds no such prompt, one whose position cannot occur, or one whose body can lie in
                several ways.
        """
        return read_drawing(text).board()

    def read_state(self, text: str) -> PromptState | None:
        """Grid size, head and length of a drawn prompt; None where the text holds none."""
        match = _HEADER_PATTERN.search(text)
        if match is None:
            return None
        return PromptState(int(match["size"]), (int(match["head_x"]), int(match["head_y"])), int(match["length"]))


_FREE_SPACE_ORDER = ("UP", "DOWN", "LEFT", "RIGHT")

register_style(DrawnStyle("bfs-1024", "BFS", "", has_metrics=False))
register_style(DrawnStyle("bfs-2048", "BFS", "", has_metrics=False))
register_style(DrawnStyle("bfs-4096", "BFS", "", has_metrics=True))
register_style(DrawnStyle("bfs-safe-greedy-4096", "SAFE-GREEDY", "safe ", has_metrics=True))


def read_drawing(text: str) -> Drawing:
    """The drawn board of the prompt that a text contains.

    Raises:
        ValueError: If the text holds none, or one that contradicts itself.
    """
    header = _HEADER_PATTERN.search(text)
    rows = None if header is None else _BOARD_PATTERN.match(text, header.end())
    if header is None or rows is None:
        raise ValueError(f"no drawn board in the text: {text[:80]!r}")
    size = int(header["size"])
    lines = [line.split(" ") for line in rows["rows"].splitlines()[::-1]]
    if len(lines) != size or any(len(line) != size for line in lines):
        raise ValueError(f"the drawn board is not {size}x{size}")
    cells: dict[str, list[Cell]] = {"S": [], "H": [], "A": [], ".": []}
    for y, line in enumerate(lines):
        for x, sign in enumerate(line):
            cells[sign].append((x, y))
    head = (int(header["head_x"]), int(header["head_y"]))
    apple = (int(header["apple_x"]), int(header["apple_y"]))
    length = int(header["length"])
    if cells["H"] != [head] or cells["A"] != [apple] or len(cells["S"]) + 1 != length:
        raise ValueError("the drawn board does not show the head, apple and length that the prompt names")
    return Drawing(size, head, apple, frozenset([head, *cells["S"]]))
