"""Assignment of rows to games."""

from __future__ import annotations

from snake_lora_pl.data.jsonl import Row
from snake_lora_pl.game.text import PromptState, read_move, read_state, starts_new_game


class GameCounter:
    """Counter that assigns the rows of one file to games.

    Rows that name their game belong to it wherever they are in the file. Among the others, a game begins where the
    position does not follow from the previous row. A row whose prompt has an unknown format is a game by itself.

    Attributes:
        num_games: Number of games so far.
    """

    def __init__(self) -> None:
        self.num_games = 0
        self._named: dict[str, int] = {}
        self._current = 0
        self._previous: tuple[PromptState, Row] | None = None

    def game_of(self, row: Row) -> int:
        """Return the game of the next row, numbered from 0."""
        if row.game is not None:
            self._previous = None
            if row.game not in self._named:
                self._named[row.game] = self._new_game()
            return self._named[row.game]
        state = read_state(row.prompt)
        if state is None or not self._continues(state):
            self._current = self._new_game()
        self._previous = None if state is None else (state, row)
        return self._current

    def _continues(self, state: PromptState) -> bool:
        if self._previous is None:
            return False
        previous, row = self._previous
        return not starts_new_game(previous, read_move(row.completion), state)

    def _new_game(self) -> int:
        self.num_games += 1
        return self.num_games - 1
