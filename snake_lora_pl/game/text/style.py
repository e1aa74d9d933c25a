"""Prompt styles: the interface of a text format, and the registry of formats by name.

To add a style, call ``register_style`` with an object that has the members of ``Style``.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from snake_lora_pl.game import registry
from snake_lora_pl.game.board import Board, Cell, Move

# Pattern of a number in a text. Bounded, because ``int`` rejects thousands of digits and prompts are untrusted input.
NUMBER = r"\d{1,6}"


class PromptState(NamedTuple):
    """The part of a position that every prompt contains, with or without the order of the body."""

    grid_size: int
    head: Cell
    length: int


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
