"""Reading what any style wrote: moves, boards, and where one game ends and the next begins."""

from __future__ import annotations

import re

from snake_lora_pl.game.board import Board, Move
from snake_lora_pl.game.text.drawn import read_drawing
from snake_lora_pl.game.text.style import STYLES, PromptState

_ANNOUNCEMENT_PATTERN = re.compile(r"^Moving (UP|RIGHT|DOWN|LEFT)\b", re.MULTILINE)
_CONCLUSION = "Conclusion: "
_CONCLUSION_PATTERN = re.compile(r"Conclusion: (?:The move is: )?(UP|RIGHT|DOWN|LEFT)[ \t\r]*(?:\n|\Z)")


def read_move(completion: str) -> Move | None:
    """The move that a completion concludes with.

    That is the one of the last line that reads ``Conclusion: The move is: X`` or ``Conclusion: X``, or a completion
    that holds nothing but a move's name. Anything else names no move: None.
    """
    start = completion.rfind(_CONCLUSION)
    while start >= 0:
        match = _CONCLUSION_PATTERN.match(completion, start)
        if match is not None and (start == 0 or completion[start - 1] == "\n"):
            return Move[match[1]]
        start = completion.rfind(_CONCLUSION, 0, start)
    return Move.__members__.get(completion.strip(" \t\r\n"))


def read_announced_move(completion: str) -> Move | None:
    """The move that a completion announces, ``Moving X``, before it gives reasons; None where it announces none.

    All that follows, the conclusion too, can be copied from there.
    """
    match = _ANNOUNCEMENT_PATTERN.search(completion)
    return None if match is None else Move[match[1]]


def read_board(text: str) -> Board | None:
    """The board of the prompt that a text contains, whatever its style.

    Returns:
        The board; None where no prompt of a known style is found, or one whose position is impossible or is not fully
        told, as in drawings of a body that can lie in several ways.
    """
    for style in STYLES.values():
        if style.read_state(text) is not None:
            try:
                return style.read_prompt(text)
            except ValueError:
                return None
    return None


def read_state(text: str) -> PromptState | None:
    """Grid size, head and length of the prompt that a text contains; None without one.

    It reads more prompts than ``read_board`` and is faster: the body's order is not needed.
    """
    return next((state for style in STYLES.values() if (state := style.read_state(text)) is not None), None)


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
        move: The move of the row before. Where it could not be read, None: then any neighboring cell will do.
        state: The position of this row.
    """
    if previous is None or state.grid_size != previous.grid_size or state.length < previous.length:
        return True
    dx = state.head[0] - previous.head[0]
    dy = state.head[1] - previous.head[1]
    if move is None:
        return abs(dx) + abs(dy) != 1
    return (dx, dy) != (move.dx, move.dy)


class BoardReader:
    """Reads the boards of rows in file order, those of drawn prompts too.

    A drawing lacks the body's order, but within a game it follows from the board of the row before: each game begins
    with a head alone.
    """

    def __init__(self) -> None:
        self._previous: Board | None = None

    def read(self, prompt: str) -> Board | None:
        """The board of the next row; None where its prompt, seen together with the row before, does not tell it."""
        self._previous = self._read(prompt)
        return self._previous

    def _read(self, prompt: str) -> Board | None:
        try:
            drawing = read_drawing(prompt)
        except ValueError:
            return read_board(prompt)
        board = None if self._previous is None else drawing.board_after(self._previous)
        return board or read_board(prompt)
