"""Parsing of prompts and completions of any style: the move of a completion, the board of a prompt, game boundaries.

``read_move`` turns the text of a completion into a move.
"""

from __future__ import annotations

import re

from snake_lora_pl.game.board import Board, Move
from snake_lora_pl.game.text.ascii_board import read_ascii_board
from snake_lora_pl.game.text.style import STYLES, MoveStatingStyle, PromptMoves, PromptState, Style

_ANNOUNCEMENT_PATTERN = re.compile(r"^Moving (UP|RIGHT|DOWN|LEFT)\b", re.MULTILINE)
_CONCLUSION = "Conclusion: "
_CONCLUSION_PATTERN = re.compile(r"Conclusion: (?:The move is: )?(UP|RIGHT|DOWN|LEFT)[ \t\r]*(?:\n|\Z)")


def read_move(completion: str) -> Move | None:
    """Return the move that a completion concludes with.

    This is the move of the last line of the form ``Conclusion: The move is: X`` or ``Conclusion: X``, or a completion
    that consists of a move's name. Any other completion has no move: None.
    """
    found = find_move(completion)
    return None if found is None else found[0]


def find_move(completion: str) -> tuple[Move, int] | None:
    """Return the move that a completion concludes with, and the index of its name; None if it has no move."""
    start = completion.rfind(_CONCLUSION)
    while start >= 0:
        match = _CONCLUSION_PATTERN.match(completion, start)
        if match is not None and (start == 0 or completion[start - 1] == "\n"):
            return Move[match[1]], match.start(1)
        start = completion.rfind(_CONCLUSION, 0, start)
    name = completion.strip(" \t\r\n")
    return (Move[name], completion.index(name)) if name in Move.__members__ else None


def read_announced_move(completion: str) -> Move | None:
    """Return the move that a completion announces before its rationale, as ``Moving X``; None if it announces none.

    The rest of the completion, including the conclusion, can be copied from the announcement.
    """
    match = _ANNOUNCEMENT_PATTERN.search(completion)
    return None if match is None else Move[match[1]]


def read_board(text: str) -> Board | None:
    """Return the board of the prompt in a text, whatever its style.

    Returns:
        The board; None if the text contains no prompt of a known style, if the style's prompts do not contain the
        board, or if the position is invalid or ambiguous, such as an ASCII board whose body has several possible
        orders.
    """
    for style in STYLES.values():
        if style.read_state(text) is not None:
            try:
                return style.read_prompt(text)
            except ValueError:
                return None
    return None


def read_state(text: str) -> PromptState | None:
    """Return grid size, head and length of the prompt in a text; None if the text contains none.

    It reads more prompts than ``read_board`` and is faster, because it does not need the order of the body.
    """
    return next((state for style in STYLES.values() if (state := style.read_state(text)) is not None), None)


def read_moves(text: str) -> PromptMoves | None:
    """Return which moves are legal and which are traps in the prompt in a text.

    Returns:
        The moves: stated by the prompt, or computed from its board; None if the text contains neither.
    """
    for style in STYLES.values():
        if isinstance(style, MoveStatingStyle) and (moves := style.read_moves(text)) is not None:
            return moves
    board = read_board(text)
    return None if board is None else PromptMoves.of(board)


def find_style(text: str) -> Style | None:
    """Return the first style whose prompt the text contains in full; None if there is none."""
    return next((style for style in STYLES.values() if _contains_prompt(style, text)), None)


def _contains_prompt(style: Style, text: str) -> bool:
    if isinstance(style, MoveStatingStyle):
        return style.read_moves(text) is not None
    try:
        style.read_prompt(text)
    except ValueError:
        return False
    return True


def read_grid_size(text: str) -> int | None:
    """Return the cells along one side of the grid of the prompt in a text; None if the text contains none."""
    state = read_state(text)
    return None if state is None else state.grid_size


def starts_new_game(previous: PromptState | None, move: Move | None, state: PromptState) -> bool:
    """Return whether a row starts a new game, judged by the preceding row.

    Rows of ``heuristics-v0.04`` have no game id, and the last move of each game is missing. A new game starts where the
    head is not at the target of the preceding row's move, or the length decreases, or the grid size changes. In prompts
    that do not state the head, it starts where the length does not stay or grow by one.

    Args:
        previous: The position of the preceding row; None for the first row.
        move: The move of the preceding row. If it is None, any adjacent cell continues the game.
        state: The position of this row.
    """
    if previous is None or state.grid_size != previous.grid_size or state.length < previous.length:
        return True
    if state.head is None or previous.head is None:
        return state.length > previous.length + 1
    dx = state.head[0] - previous.head[0]
    dy = state.head[1] - previous.head[1]
    if move is None:
        return abs(dx) + abs(dy) != 1
    return (dx, dy) != (move.dx, move.dy)


class BoardReader:
    """Reader of the boards of consecutive rows, including ASCII boards.

    An ASCII board does not show the order of the body. Within a game, the order follows from the preceding row's board,
    because each game starts with the head alone.
    """

    def __init__(self) -> None:
        self._previous: Board | None = None

    def read(self, prompt: str) -> Board | None:
        """Return the board of the next row; None if its prompt and the preceding row do not determine it."""
        self._previous = self._read(prompt)
        return self._previous

    def _read(self, prompt: str) -> Board | None:
        if self._previous is not None:
            try:
                ascii_board = read_ascii_board(prompt)
            except ValueError:
                pass
            else:
                board = ascii_board.board_after(self._previous)
                if board is not None:
                    return board
        return read_board(prompt)
