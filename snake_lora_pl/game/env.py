"""Snake as a Gymnasium environment, ``Snake-v0``.

Importing this module registers it. ``gymnasium.make("snake_lora_pl.game.env:Snake-v0")`` imports the module first.
"""

from __future__ import annotations

import io
import string
from itertools import pairwise
from typing import Any, Literal

try:
    import gymnasium
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{__name__} requires Gymnasium: pip install 'snake_lora_pl[gym]'", name="gymnasium"
    ) from error
import numpy as np
from gymnasium import spaces

from snake_lora_pl.game.board import Board, End, Move
from snake_lora_pl.game.game import Game, starvation_cap
from snake_lora_pl.game.replay import draw_board, draw_grid
from snake_lora_pl.game.seeds import FIRST_PLAY_SEED
from snake_lora_pl.game.text import get_style

MOVES = tuple(Move)
"""The moves by action: 0 UP, 1 RIGHT, 2 DOWN, 3 LEFT."""

_STEPS = tuple(move.value for move in MOVES)

EMPTY, APPLE, HEAD = 0, 1, 2
FIRST_BODY = 3
"""Code of a body cell from which the head is UP along the body; RIGHT, DOWN and LEFT follow."""

_LOST = (End.WALL, End.SELF, End.NO_VALID_ANSWER)
_METADATA: dict[str, Any] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 10}
# Bounds of a prompt of any style; the longest known one takes about 15 characters per cell.
_PROMPT_CHARS, _PROMPT_CHARS_PER_CELL = 4_000, 100


class SnakeEnv(gymnasium.Env[Any, np.int64]):
    """A game of Snake. An episode is a game, a step is a move.

    **Actions** are ``Discrete(4)``: UP, RIGHT, DOWN, LEFT. ``info["action_mask"]`` marks the legal moves, those that
    neither collide nor reverse; it is zero everywhere if none is left. Reversing into the neck loses the game.

    **Observations**

    - ``grid``: ``uint8`` codes of shape ``(size, size)``, the top row first: 0 empty, 1 apple, 2 head, and 3, 4, 5 or 6
      for a body cell whose neighbor toward the head is UP, RIGHT, DOWN or LEFT of it. They determine the board.
    - ``text``: the prompt of a style. It is empty on a full board, which has no prompt.

    **Rewards**: 1 for each apple, ``loss_reward`` for a move that loses the game, else 0. The win is its last apple.

    **Ends**: a full board (WIN), WALL, SELF and NO_VALID_ANSWER (reversal) terminate an episode; the limits STARVED and
    MAX_STEPS truncate it. ``info`` holds ``apples``, ``steps``, ``end`` (empty during the game) and ``game_seed``.

    Args:
        grid_size: Cells along one side of the board.
        observation: ``grid`` or ``text``.
        style: Prompt style of ``text``.
        max_steps: Steps after which an episode is truncated; no limit by default.
        max_steps_without_apple: Steps without an apple after which an episode is truncated; by default four times the
            number of cells.
        loss_reward: Reward of a move that loses the game.
        render_mode: ``ansi`` (colored text), ``rgb_array`` or None.

    Raises:
        ValueError: If a value is out of range or a name is unknown.
    """

    metadata = _METADATA

    def __init__(
        self,
        grid_size: int = 10,
        observation: Literal["grid", "text"] = "grid",
        style: str = "compact",
        max_steps: int | None = None,
        max_steps_without_apple: int | None = None,
        loss_reward: float = -1.0,
        render_mode: str | None = None,
    ) -> None:
        if observation not in ("grid", "text"):
            raise ValueError(f"observation must be grid or text (found: {observation!r})")
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"render_mode must be ansi, rgb_array or None (found: {render_mode!r})")
        for name, limit in (("max_steps", max_steps), ("max_steps_without_apple", max_steps_without_apple)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1 (found: {limit})")
        self.grid_size = grid_size
        self.style = get_style(style) if observation == "text" else None
        self.max_steps = max_steps
        self.max_steps_without_apple = max_steps_without_apple or starvation_cap(grid_size)
        self.loss_reward = loss_reward
        self.render_mode = render_mode
        self._move: Move | None = None
        self._start(game_seed=0)
        self.action_space = spaces.Discrete(len(MOVES))
        self.observation_space: spaces.Space[Any]
        if self.style is None:
            self.observation_space = spaces.Box(0, FIRST_BODY + len(MOVES) - 1, (grid_size, grid_size), np.uint8)
        else:
            chars = frozenset(string.printable) | frozenset(self.style.write_prompt(self.game.board))
            max_length = _PROMPT_CHARS + _PROMPT_CHARS_PER_CELL * grid_size**2
            self.observation_space = spaces.Text(max_length, min_length=0, charset=chars)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start a new game.

        Args:
            seed: Seed of the generator that draws the seeds of this game and of the following ones. None of them is a
                seed of the games that evaluate a player.
            options: ``{"game_seed": N}`` starts the game of that seed instead.

        Returns:
            The first observation and its ``info``.

        Raises:
            ValueError: If an option is unknown, or the seed of a game is negative.
        """
        super().reset(seed=seed)
        options = dict(options or {})
        game_seed = options.pop("game_seed", None)
        if options:
            raise ValueError(f"unknown options {sorted(options)}; known options: game_seed")
        self._start(int(self.np_random.integers(FIRST_PLAY_SEED)) if game_seed is None else int(game_seed))
        return self._observation(), self._info()

    def step(self, action: np.int64) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Play a move.

        Returns:
            Observation, reward, terminated, truncated and ``info``. A move that loses leaves the board unchanged.

        Raises:
            ValueError: If the action is not one of the four, or the game had already ended.
        """
        if not self.action_space.contains(action):
            raise ValueError(f"an action must be 0, 1, 2 or 3: UP, RIGHT, DOWN, LEFT (found: {action!r})")
        num_apples = self.game.num_apples
        self._move = MOVES[int(action)]
        end = self.game.play(self._move)
        reward = self.loss_reward if end in _LOST else float(self.game.num_apples - num_apples)
        truncated = end in (End.STARVED, End.MAX_STEPS)
        return self._observation(), reward, end is not None and not truncated, truncated, self._info()

    def render(self) -> Any:
        """Return the board as colored text, as an array of shape (height, width, 3), or None without a mode."""
        if self.render_mode is None:
            return None
        board, end = self.game.board, self.game.end
        caption = f"{self.game.num_apples} apples  step {self.game.num_steps}" + (f"  {end.value}" if end else "")
        if self.render_mode == "rgb_array":
            image = draw_board(board, caption, move=self._move, is_lost=end in _LOST)
            return np.asarray(image.convert("RGB"))
        from rich.console import Console

        file = io.StringIO()
        console = Console(file=file, force_terminal=True, color_system="standard", width=max(80, 2 * board.size))
        console.print(draw_grid(board), highlight=False)
        console.print(caption, highlight=False)
        return file.getvalue()

    def _start(self, game_seed: int) -> None:
        self.game_seed = game_seed
        self.game = Game(self.grid_size, game_seed, self.max_steps, self.max_steps_without_apple)
        self._move = None

    def _observation(self) -> Any:
        board = self.game.board
        if self.style is None:
            return encode_board(board)
        return "" if board.apple is None else self.style.write_prompt(board)

    def _info(self) -> dict[str, Any]:
        game = self.game
        legal = [] if game.end else game.board.legal_moves()
        return {
            "action_mask": np.array([move in legal for move in MOVES], dtype=np.int8),
            "apples": game.num_apples,
            "steps": game.num_steps,
            "end": game.end.value if game.end else "",
            "game_seed": self.game_seed,
        }


def encode_board(board: Board) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Return the codes of a board, of shape (size, size), the top row first; see ``SnakeEnv``."""
    codes = np.zeros((board.size, board.size), np.uint8)
    for (next_x, next_y), (x, y) in pairwise(board.body):
        codes[board.size - 1 - y, x] = FIRST_BODY + _STEPS.index((next_x - x, next_y - y))
    for cell, code in ((board.head, HEAD), (board.apple, APPLE)):
        if cell is not None:
            codes[board.size - 1 - cell[1], cell[0]] = code
    return codes


gymnasium.register(id="Snake-v0", entry_point=f"{__name__}:SnakeEnv")
