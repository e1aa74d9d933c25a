"""A game as it was played: every position, the move chosen there and the words that went with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from snake_lora_pl.game.board import Board, End, Move
from snake_lora_pl.game.game import Game


class Frame(NamedTuple):
    """One position.

    Attributes:
        board: What the player saw.
        move: What it chose; None where it named no move, and on the last position of a game that outlived it.
        words: What it said.
    """

    board: Board
    move: Move | None = None
    words: str = ""


@dataclass(frozen=True)
class Recording:
    """A game from its first position to its last.

    Attributes:
        frames: The positions in turn, at least one.
        end: Why the game was over; None where it was broken off.
        title: What to call it.

    Raises:
        ValueError: If there is no position, or positions differ in size.
    """

    frames: tuple[Frame, ...]
    end: End | None = None
    title: str = "Snake"

    def __post_init__(self) -> None:
        """Check the positions."""
        if not self.frames:
            raise ValueError("a recording has at least one position")
        if len({frame.board.size for frame in self.frames}) > 1:
            raise ValueError("the positions of a recording lie on boards of different sizes")

    @property
    def size(self) -> int:
        """Cells along one side of the grid."""
        return self.frames[0].board.size

    @property
    def is_death(self) -> bool:
        """Whether the snake died, so that the last position is the one that its last move ended."""
        return self.end in (End.WALL, End.SELF, End.NO_VALID_ANSWER)

    def num_apples(self, index: int) -> int:
        """Apples eaten before a position."""
        return self.frames[index].board.length - 1


def record(game: Game, choose: Callable[[Board], tuple[Move | None, str]], title: str = "Snake") -> Recording:
    """Play a game to its end and keep all of it.

    Args:
        game: A game that is not over.
        choose: The player: from a board to its move, None for no move, and its words.
        title: What to call the recording.
    """
    frames = [Frame(game.board)]
    while game.end is None:
        board = game.board
        move, words = choose(board)
        frames[-1] = Frame(board, move, words)
        game.play(move)
        if game.board is not board:
            frames.append(Frame(game.board))
    return Recording(tuple(frames), game.end, title)
