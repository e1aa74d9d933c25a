"""The styles ``features`` and ``cycle``: what a search finds for each move, without the board; completions are moves.

A prompt has the same number of lines at every length of the snake. The features are computed by code (``features`` and
the Hamiltonian cycle of the teachers); the model compares them and does not search. Boards cannot be read back.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from snake_lora_pl.game.board import Board, Move
from snake_lora_pl.game.features import MoveFeatures, move_features
from snake_lora_pl.game.search import tail_distances
from snake_lora_pl.game.symmetry import Symmetry
from snake_lora_pl.game.teachers.hamiltonian import cycle_advances, cycle_of
from snake_lora_pl.game.text.style import NUMBER, PromptMoves, PromptState, apple_line, apple_of

_OBSTACLES = ("wall", "body")
_TRAP = "trap"


@dataclass(frozen=True)
class MoveLines:
    """Prompts with one line for each move, after a line with grid size and length; bare moves as completions.

    The first line is ``Snake{size} length {length}``; each further line is the name of a move and its description.

    Attributes:
        name: The style's name.
        describe: Function that returns the description of each move of a board with an apple, in board order. The first
            word is ``wall`` or ``body`` for a move that is not legal, and ``trap`` if the tail is unreachable after it.
        description_pattern: Pattern of the descriptions.
        has_apple_line: Whether a last line states the offset of the apple from the head.
    """

    name: str
    describe: Callable[[Board], dict[Move, str]]
    description_pattern: str
    has_apple_line: bool

    def write_prompt(self, board: Board) -> str:
        """Return the prompt that describes a board.

        Raises:
            ValueError: If the board has no apple.
        """
        apple_of(board)
        lines = self._lines(board, self.describe(board))
        if self.has_apple_line:
            lines.append(apple_line(board))
        return "\n".join(lines)

    def _lines(self, board: Board, descriptions: dict[Move, str]) -> list[str]:
        return [
            f"Snake{board.size} length {board.length}",
            *(f"{move.name} {descriptions[move]}" for move in Move),
        ]

    def write_completion(self, board: Board, move: Move) -> str:
        """Return the name of the move."""
        return move.name

    def read_prompt(self, text: str) -> Board:
        """Raise an error, because the prompts do not contain the board.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"prompts of the style {self.name} do not contain the board")

    def read_state(self, text: str) -> PromptState | None:
        """Return grid size and length of a prompt of this style; None if the text contains none."""
        match = _pattern_of(self).search(text)
        return None if match is None else PromptState(int(match["size"]), None, int(match["length"]))

    def read_moves(self, text: str) -> PromptMoves | None:
        """Return the legal moves and the traps that a prompt of this style states; None if the text contains none."""
        match = _pattern_of(self).search(text)
        if match is None:
            return None
        words = {move: match[move.name].partition(" ")[0] for move in Move}
        return PromptMoves(
            frozenset(move for move, word in words.items() if word not in _OBSTACLES),
            frozenset(move for move, word in words.items() if word == _TRAP),
        )


@dataclass(frozen=True)
class OrientedMoveLines(MoveLines):
    """The same with descriptions that depend on the orientation of the board, and without an apple line."""

    def write_transformed(self, board: Board, move: Move, symmetry: Symmetry) -> tuple[str, str]:
        """Return the prompt in which each description belongs to the transformed move, and the transformed move."""
        descriptions = {symmetry.move(own): text for own, text in self.describe(board).items()}
        return "\n".join(self._lines(board, descriptions)), symmetry.move(move).name


@lru_cache
def _pattern_of(style: MoveLines) -> re.Pattern[str]:
    lines = [rf"Snake(?P<size>{NUMBER}) length (?P<length>{NUMBER})"]
    lines += [f"{move.name} (?P<{move.name}>{'|'.join(_OBSTACLES)}|{style.description_pattern})" for move in Move]
    if style.has_apple_line:
        lines.append(rf"apple(?: (?:UP|DOWN|LEFT|RIGHT) {NUMBER}){{1,2}}")
    # Without a last line, the description must be complete: "LEFT trap 3" is not "LEFT trap".
    end = r"(?!\d)" if style.has_apple_line else r"(?!\d| \d|\napple)"
    return re.compile("\n".join(lines) + end, re.ASCII)


def describe_features(board: Board) -> dict[Move, str]:
    """Return the descriptions of the style ``features``: the first of these that applies.

    - ``wall`` or ``body``: the move is not legal;
    - ``trap N``: the tail is unreachable after the move, which does not win, and N free cells are reachable;
    - ``apple A tail T``: A steps to the apple after the move, 0 if it eats it, and T steps to the tail, 0 if the move
      fills the board; ``bait`` instead of ``apple`` if the tail is unreachable after eating at the end of the shortest
      path;
    - ``tail T``: no path leads to the apple; T steps to the tail.
    """
    return {
        move: "apple 0 tail 0" if board.fills_board(move) else _describe(features)
        for move, features in move_features(board).items()
    }


def _describe(features: MoveFeatures) -> str:
    if features.obstacle is not None:
        return features.obstacle
    if features.tail_distance is None:
        return f"{_TRAP} {features.num_reachable}"
    if features.apple_distance is None:
        return f"tail {features.tail_distance}"
    return f"{'bait' if features.is_bait else 'apple'} {features.apple_distance} tail {features.tail_distance}"


def describe_cycle(board: Board) -> dict[Move, str]:
    """Return the descriptions of the style ``cycle``: the first of these that applies.

    - ``wall`` or ``body``: the move is not legal;
    - ``trap``: the tail is unreachable after the move, which does not win;
    - ``past``: the move would pass the apple or the tail along the Hamiltonian cycle, by the condition of the teacher
      ``hamiltonian_shortcuts``;
    - ``next D``: the move's cell is the next one of the cycle, from where D steps along the cycle lead to the apple, 0
      if the move eats it;
    - ``skip D``: the same for a cell farther ahead.

    While the body is in the order of the cycle, each ``next`` or ``skip`` keeps it so and brings the apple closer.
    """
    cycle, tails, advances = cycle_of(board.size), tail_distances(board), cycle_advances(board)
    apple, legal = apple_of(board), board.legal_moves()
    descriptions = {}
    for move in Move:
        cell = board.target(move)
        if move not in legal:
            descriptions[move] = "body" if board.contains(cell) else "wall"
        elif move not in tails and not board.fills_board(move):
            descriptions[move] = _TRAP
        elif move not in advances:
            descriptions[move] = "past"
        else:
            num_steps = 0 if cell == apple else cycle.steps_ahead(cell, apple)
            descriptions[move] = f"{'next' if advances[move] == 1 else 'skip'} {num_steps}"
    return descriptions


MOVE_LINES_STYLES = (
    MoveLines(
        "features",
        describe_features,
        rf"{_TRAP} {NUMBER}|(?:apple|bait) {NUMBER} tail {NUMBER}|tail {NUMBER}",
        has_apple_line=True,
    ),
    OrientedMoveLines("cycle", describe_cycle, rf"{_TRAP}|past|(?:next|skip) {NUMBER}", has_apple_line=False),
)
