"""What a text format is, and the formats by name."""

from __future__ import annotations

import difflib
from typing import NamedTuple, Protocol

from snake_lora_pl.game.board import Board, Cell, Move

# Digits of a number in a text: a bound, because ``int`` refuses thousands of them and a prompt may come from anywhere.
NUMBER = r"\d{1,6}"


class PromptState(NamedTuple):
    """What every prompt says of its position, whether or not it carries the body's order."""

    grid_size: int
    head: Cell
    length: int


class Style(Protocol):
    """One format of prompt and completion."""

    @property
    def name(self) -> str:
        """The style's name."""

    def write_prompt(self, board: Board) -> str:
        """The board as a prompt."""

    def write_completion(self, board: Board, move: Move) -> str:
        """What the style says of a move on a board, ending in the conclusion."""

    def read_prompt(self, text: str) -> Board:
        """The board of a prompt of this style, wherever it stands in the text.

        Raises:
            ValueError: If the text holds no such prompt, or one whose position cannot occur or is not fully told.
        """

    def read_state(self, text: str) -> PromptState | None:
        """What a prompt of this style says at first glance; None where the text holds none."""


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
        near = difflib.get_close_matches(name, STYLES, n=1)
        hint = f". Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown style {name!r}; known styles: {', '.join(sorted(STYLES))}{hint}")
    return STYLES[name]


def apple_of(board: Board) -> Cell:
    """The apple's cell.

    Raises:
        ValueError: If there is none, for no format has words for that.
    """
    if board.apple is None:
        raise ValueError("a board without an apple cannot be written: the game is over")
    return board.apple
