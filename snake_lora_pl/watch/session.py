"""The game that the page shows: its player, the teacher that moves are compared with, and its record.

A decision is shown before it is made: the state is a position with the move that the player has chosen there.
``advance`` makes that move, or the user's, and decides on the next one.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from snake_lora_pl.errors import UserError
from snake_lora_pl.evaluation.game_loop import DEATHS, judge_moves
from snake_lora_pl.evaluation.policy import Answer, TeacherPolicy
from snake_lora_pl.game import TEACHERS, Board, End, Game, Move, PromptMoves
from snake_lora_pl.game.game import starvation_cap
from snake_lora_pl.game.replay import Frame, Recording
from snake_lora_pl.reporting.games_file import game_line
from snake_lora_pl.watch.players import PlayerChoices, Thought, WatchedPlayer

USER = "you"


class WatchSession:
    """One game at a time, shared by all open pages. Its methods may be called from several threads.

    Args:
        choices: The players.
        player_id: Id of the player that begins.
        teacher: Name of the teacher that moves are compared with.
        grid_size: Cells along one side of the board.
        seed: Seed of the game.

    Raises:
        UserError: If a value is invalid or the player cannot be loaded.
    """

    def __init__(
        self,
        choices: PlayerChoices,
        player_id: str,
        *,
        teacher: str = "safe_greedy",
        grid_size: int = 10,
        seed: int = 0,
    ) -> None:
        self._lock = threading.Lock()
        self._choices = choices
        self._player_id = player_id
        self._judge = _teacher(teacher)
        self._player = choices.load(player_id)
        self._state: dict[str, Any] = {}
        self._num_games = 0
        self._start(grid_size, seed)

    @property
    def state(self) -> dict[str, Any]:
        """Content of the page, as JSON; does not wait for a player that is thinking."""
        return self._state

    def new_game(self, grid_size: int, seed: int) -> dict[str, Any]:
        """Start another game and return the state.

        Raises:
            UserError: If a value is out of range or the player cannot play on this grid.
        """
        with self._lock:
            self._start(grid_size, seed)
            return self._state

    def choose(self, player_id: str | None = None, teacher: str | None = None) -> dict[str, Any]:
        """Replace the player, the teacher or both in the current position, and return the state.

        Raises:
            UserError: If the player or teacher is unknown, or the player cannot be loaded. Nothing changes then.
        """
        with self._lock:
            judge = self._judge if teacher is None else _teacher(teacher)
            if player_id is not None and player_id != self._player_id:
                player = self._choices.load(player_id)
                if self._game.end is None:
                    self._thought, self._seconds = _think(player, self._game.board, self._seed)
                self._player, self._player_id = player, player_id
            self._judge = judge
            self._num_judged = self._num_agreed = 0
            self._publish()
            return self._state

    def advance(self, game: int, step: int, move: Move | None = None) -> dict[str, Any]:
        """Make one move and return the state.

        Nothing happens if the page shows another position than the current one, as after a double click or a move on
        another page, or if the user's move would reverse.

        Args:
            game: Number of the game that the page shows.
            step: Number of steps in it.
            move: The user's move; None for the move that the player has chosen.
        """
        with self._lock:
            board = self._game.board
            is_current = (game, step) == (self._num_games, self._game.num_steps) and self._game.end is None
            if is_current and (move is None or board.after(move) is not End.NO_VALID_ANSWER):
                self._make(board, self._thought.answer if move is None else Answer(move, ""), is_user=move is not None)
                self._publish()
            return self._state

    def game_line(self) -> str:
        """Return the game so far as a line of a file of games."""
        with self._lock:
            recording = self._recording()
            judgments = list(judge_moves(recording, self._seed, self._judge))
            return game_line(" + ".join(self._movers), self._player.reading, self._seed, recording, judgments)

    def recording(self) -> Recording:
        """Return the game so far."""
        with self._lock:
            return self._recording()

    def _start(self, grid_size: int, seed: int) -> None:
        try:
            game = Game(grid_size, seed, max_steps_without_apple=starvation_cap(grid_size))
            thought, seconds = _think(self._player, game.board, seed)
        except ValueError as error:
            raise UserError(str(error)) from error
        self._game, self._seed, self._thought, self._seconds = game, seed, thought, seconds
        self._num_games += 1
        self._frames: list[Frame] = []
        # Names of those who moved, in order, as the keys of a dict.
        self._movers: dict[str, None] = {self._player.name: None}
        self._num_judged = self._num_agreed = 0
        self._publish()

    def _make(self, board: Board, answer: Answer, *, is_user: bool) -> None:
        if not is_user:
            self._num_judged += 1
            self._num_agreed += answer.move == self._judge.move(board, self._seed)
        self._movers[USER if is_user else self._player.name] = None
        self._frames.append(Frame(board, answer.move, answer.completion))
        self._game.play(answer.move)
        if self._game.end is None:
            self._thought, self._seconds = _think(self._player, self._game.board, self._seed)

    def _recording(self) -> Recording:
        frames = self._frames if self._game.end in DEATHS else [*self._frames, Frame(self._game.board)]
        return Recording(tuple(frames), self._game.end, f"{' + '.join(self._movers)}, game {self._seed}")

    def _publish(self) -> None:
        game, end = self._game, self._game.end
        board = game.board
        if end is None:
            frame = Frame(board, *self._thought.answer)
        else:
            frame = self._frames[-1] if end in DEATHS else Frame(board)
        has_decision = end is None or end in DEATHS
        moves = PromptMoves.of(board) if has_decision else PromptMoves(frozenset(), frozenset())
        self._state = {
            "game": self._num_games,
            "step": game.num_steps,
            "apples": game.num_apples,
            "length": board.length,
            "size": board.size,
            "seed": self._seed,
            "end": None if end is None else end.value,
            "frame": {
                "head": board.head,
                "trail": board.trail,
                "apple": board.apple,
                "move": None if frame.move is None else frame.move.name,
            },
            "has_decision": has_decision,
            "completion": frame.completion,
            "prompt": self._thought.prompt if has_decision else "",
            "probabilities": _by_name(self._thought.probabilities) if has_decision else None,
            "legal": [move.name for move in Move if move in moves.legal],
            "traps": [move.name for move in Move if move in moves.traps],
            "teacher_move": self._judge.move(board, self._seed).name if has_decision else None,
            "seconds": self._seconds,
            "judged": self._num_judged,
            "agreed": self._num_agreed,
            "player": self._player_id,
            "players": self._choices.ids,
            "teacher": self._judge.name,
            "teachers": sorted(TEACHERS),
        }


def _teacher(name: str) -> TeacherPolicy:
    try:
        return TeacherPolicy(name)
    except ValueError as error:
        raise UserError(str(error)) from error


def _think(player: WatchedPlayer, board: Board, seed: int) -> tuple[Thought, float]:
    """Return the player's decision and its duration in seconds."""
    start = time.perf_counter()
    thought = player.think(board, seed)
    return thought, time.perf_counter() - start


def _by_name(probabilities: dict[Move, float] | None) -> dict[str, float] | None:
    return None if probabilities is None else {move.name: value for move, value in probabilities.items()}
