"""Prompt styles: the interface of a text format, and the registry of formats by name.

To add a style, call ``register_style`` with an object that has the members of ``Style``.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from snake_lora_pl.game import registry
from snake_lora_pl.game.board import Board, Cell, Move
from snake_lora_pl.game.search import tail_distances
from snake_lora_pl.game.symmetry import Symmetry

# Pattern of a number in a text. Bounded, because ``int`` rejects thousands of digits and prompts are untrusted input.
NUMBER = r"\d{1,6}"


class PromptState(NamedTuple):
    """The part of a position that prompts contain, with or without the order of the body.

    Attributes:
        grid_size: Cells along one side of the grid.
        head: The head's cell; None if the prompt does not state it.
        length: Number of the snake's cells.
    """

    grid_size: int
    head: Cell | None
    length: int


class PromptMoves(NamedTuple):
    """The moves of a position, as far as legality and safety go.

    Attributes:
        legal: Legal moves.
        traps: Legal moves after which the tail is unreachable, except one that wins.
    """

    legal: frozenset[Move]
    traps: frozenset[Move]

    @property
    def is_decisive(self) -> bool:
        """True if the position offers a trap and a safe move."""
        return bool(self.traps) and self.traps != self.legal

    @classmethod
    def of(cls, board: Board) -> PromptMoves:
        """Return the moves of a board."""
        legal = frozenset(board.legal_moves())
        safe = {*tail_distances(board), *(move for move in legal if board.fills_board(move))}
        return cls(legal, legal - safe)


class Style(Protocol):
    """A format of prompts and completions."""

    @property
    def name(self) -> str:
        """The name under which the style is registered."""

    def write_prompt(self, board: Board) -> str:
        """Return the prompt that describes a board."""

    def write_completion(self, board: Board, move: Move) -> str:
        """Return the completion that explains a move on a board and concludes with it."""

    def read_prompt(self, text: str) -> Board:
        """Return the board of a prompt of this style, anywhere in the text.

        Raises:
            ValueError: If the text contains no such prompt, or its position is invalid or ambiguous.
        """

    def read_state(self, text: str) -> PromptState | None:
        """Return the state in a prompt of this style, anywhere in the text; None if there is no such prompt."""


@runtime_checkable
class MoveStatingStyle(Style, Protocol):
    """A style whose prompts state what each move is instead of the board. Its ``read_prompt`` always raises."""

    def read_moves(self, text: str) -> PromptMoves | None:
        """Return the moves in a prompt of this style, anywhere in the text; None if there is no such prompt."""


@runtime_checkable
class OrientedStyle(Style, Protocol):
    """A style whose prompts refer to something that does not turn with the board, such as a fixed cycle."""

    def write_transformed(self, board: Board, move: Move, symmetry: Symmetry) -> tuple[str, str]:
        """Return prompt and completion of a position and a move, as if all that they refer to were transformed."""


STYLES: dict[str, Style] = {}


def register_style(style: Style) -> Style:
    """Register a style under its name.

    Raises:
        ValueError: If the name is taken.
    """
    registry.add(STYLES, style.name, style, "style")
    return style


def get_style(name: str) -> Style:
    """Return a style by name.

    Raises:
        ValueError: If the name is unknown; the message lists the known names.
    """
    return registry.look_up(STYLES, name, "style")


def apple_of(board: Board) -> Cell:
    """Return the apple's cell.

    Raises:
        ValueError: If the board has no apple; no format can express that.
    """
    if board.apple is None:
        raise ValueError("cannot write a board without an apple: the game has ended")
    return board.apple


def apple_line(board: Board) -> str:
    """Return the offset of the apple from the head, in the order in which BFS tries the axes: ``apple DOWN 2 LEFT 5``.

    Raises:
        ValueError: If the board has no apple.
    """
    apple_x, apple_y = apple_of(board)
    head_x, head_y = board.head
    dx, dy = apple_x - head_x, apple_y - head_y
    offsets = [(Move.UP if dy > 0 else Move.DOWN, abs(dy)), (Move.LEFT if dx < 0 else Move.RIGHT, abs(dx))]
    return " ".join(["apple", *(f"{move.name} {steps}" for move, steps in offsets if steps)])
