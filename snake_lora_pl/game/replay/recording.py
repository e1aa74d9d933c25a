"""Recording of a played game: every position with the move and the completion chosen there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from snake_lora_pl.game.board import Board, End, Move
from snake_lora_pl.game.game import Game


class Frame(NamedTuple):
    """One position of a game.

    Attributes:
        board: The position.
        move: The player's move; None if it named none, and on the final position after the last move.
        completion: The player's completion.
    """

    board: Board
    move: Move | None = None
    completion: str = ""


@dataclass(frozen=True)
class Recording:
    """A game from its first position to its last.

    Attributes:
        frames: The positions in order, at least one.
        end: Why the game ended; None if it was interrupted.
        title: Title to display.

    Raises:
        ValueError: If there is no position, or positions differ in size.
    """

    frames: tuple[Frame, ...]
    end: End | None = None
    title: str = "Snake"

    def __post_init__(self) -> None:
        """Validate the positions."""
        if not self.frames:
            raise ValueError("a recording must have at least one position (found: none)")
        sizes = sorted({frame.board.size for frame in self.frames})
        if len(sizes) > 1:
            raise ValueError(f"the positions of a recording must have one grid size (found: {sizes})")

    @property
    def size(self) -> int:
        """Cells along one side of the grid."""
        return self.frames[0].board.size

    @property
    def ended_by_illegal_move(self) -> bool:
        """True if the last move was not legal, so that the last frame is the position before it."""
        return self.end in (End.WALL, End.SELF, End.NO_VALID_ANSWER)

    def num_apples(self, index: int) -> int:
        """Return the number of apples that the snake ate before a position."""
        return self.frames[index].board.length - 1


def record(game: Game, choose: Callable[[Board], tuple[Move | None, str]], title: str = "Snake") -> Recording:
    """Play a game to its end and record it.

    Args:
        game: A game that has not ended.
        choose: The player: a function from a board to its move, or None for no move, and its completion.
        title: Title of the recording.
    """
    frames = [Frame(game.board)]
    while game.end is None:
        board = game.board
        move, completion = choose(board)
        frames[-1] = Frame(board, move, completion)
        game.play(move)
        if game.board is not board:
            frames.append(Frame(game.board))
    return Recording(tuple(frames), game.end, title)
