"""Seeded games, played by a teacher and written down as rows. Knows nothing of tokenizers or models.

Every game has a seed of its own, made from the data set's seed and the game's number alone: rows do not depend on how
many games there are or on who plays them in which order.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypedDict

from snake_lora_pl.durable import open_durably
from snake_lora_pl.errors import UserError
from snake_lora_pl.game import SYMMETRIES, Board, End, Game, Move, SeededTeacher, Style, get_seeded_teacher, get_style
from snake_lora_pl.game.game import starvation_cap
from snake_lora_pl.game.seeds import GAMES_PER_SEED, NUM_DATA_SEEDS, data_seed

# Games that a worker plays before it hands them over: some tenths of a second's work.
_GAMES_PER_TASK = 8


class _Row(TypedDict):
    prompt: str
    completion: str
    game: int
    step: int
    seed: int


class GeneratedRow(_Row, total=False):
    """One position of one game.

    ``game`` and ``step`` count from 0; ``seed`` is the game's own, so that ``Game(grid_size, seed)`` plays it again.
    ``symmetry``, in augmented data alone, says how the board was turned: an index into ``game.SYMMETRIES``. All
    symmetries of a game bear its number: were they games of their own, a split by game would validate on turned copies
    of what it trains on.
    """

    symmetry: int


@dataclass(frozen=True)
class Recipe:
    """All that decides which rows a game becomes.

    Attributes:
        grid_size: Cells along one side of the board.
        teacher: What makes the player from a game's seed.
        style: The text format.
        seed: Seed of the data set.
        noise: Probability of playing a random legal move. The row holds the teacher's move all the same, so that rows
            of positions follow which the teacher would not have come to.
        augment: Whether each game is written in all symmetries of the board, the teacher asked again in each, as its
            choice among equals is not symmetric.
        upstream_rules: Whether to play as the program that wrote the ``heuristics-v0.04`` files, and to leave out the
            move that it leaves out: the last one.

    Raises:
        UserError: If a value is out of range.
    """

    grid_size: int
    teacher: SeededTeacher
    style: Style
    seed: int
    noise: float = 0.0
    augment: bool = False
    upstream_rules: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        if not 0 <= self.seed < NUM_DATA_SEEDS:
            raise UserError(f"seed must lie between 0 and {NUM_DATA_SEEDS - 1:,} (found: {self.seed})")
        if not 0 <= self.noise <= 1:
            raise UserError(f"noise is a probability, from 0 to 1 (found: {self.noise})")
        try:
            Game(self.grid_size)
        except ValueError as error:
            raise UserError(str(error)) from error

    def rows(self, game: int) -> list[GeneratedRow]:
        """The rows of one game, one symmetry after the other."""
        seed = data_seed(self.seed, game)
        positions = self._play(seed)
        if not self.augment:
            return [self._row(board, move, game, step, seed) for step, (board, move) in enumerate(positions)]
        rows = []
        for number, symmetry in enumerate(SYMMETRIES):
            teacher = self.teacher(seed)
            for step, (board, _) in enumerate(positions):
                turned = symmetry.board(board)
                move = teacher(turned)
                assert move is not None  # It had one before the board was turned.
                rows.append(self._row(turned, move, game, step, seed) | {"symmetry": number})
        return rows

    def _row(self, board: Board, move: Move, game: int, step: int, seed: int) -> GeneratedRow:
        return {
            "prompt": self.style.write_prompt(board),
            "completion": self.style.write_completion(board, move),
            "game": game,
            "step": step,
            "seed": seed,
        }

    def _play(self, seed: int) -> list[tuple[Board, Move]]:
        """Every position of one game with the teacher's move, until the game ends or no legal move is left."""
        game = Game(
            self.grid_size,
            seed,
            max_steps_without_apple=starvation_cap(self.grid_size),
            upstream_rules=self.upstream_rules,
        )
        teacher = self.teacher(seed)
        positions = []
        while game.end is None:
            board = game.board
            move = teacher(board)
            if move is None:
                break
            positions.append((board, move))
            if self.noise and game.rng.random() < self.noise:
                moves = board.legal_moves()
                move = moves[int(game.rng.random() * len(moves))]
            game.play(move)
        # Upstream makes one more move, off an apple that lies under the head, and leaves that one out.
        if self.upstream_rules and not (game.end is End.NO_PATH and game.board.apple is None):
            positions.pop()
        return positions


def generate_rows(
    num_games: int,
    grid_size: int = 10,
    teacher: str = "bfs",
    style: str = "bfs-512",
    seed: int = 0,
    *,
    noise: float = 0.0,
    augment: bool = False,
    upstream_rules: bool = False,
) -> Iterator[GeneratedRow]:
    """Rows of seeded games, game by game, a row for every position in which the teacher has a legal move.

    Args:
        num_games: Games to play, each until its end.
        grid_size: Cells along one side of the board.
        teacher: Name of the player, one of ``game.TEACHERS``.
        style: Name of the text format, one of ``game.STYLES``.
        seed: Seed of the data set; the same arguments give the same rows.
        noise: See ``Recipe``.
        augment: See ``Recipe``.
        upstream_rules: See ``Recipe``.

    Raises:
        UserError: If an argument is out of range or a name is unknown; raised at the call, not at the first row.
    """
    _check_num_games(num_games)
    recipe = _recipe(grid_size, teacher, style, seed, noise, augment, upstream_rules)
    return (row for game in range(num_games) for row in recipe.rows(game))


def write_dataset(
    path: str | os.PathLike[str],
    num_games: int,
    grid_size: int = 10,
    teacher: str = "bfs",
    style: str = "bfs-512",
    seed: int = 0,
    *,
    noise: float = 0.0,
    augment: bool = False,
    upstream_rules: bool = False,
    num_workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the rows of ``generate_rows`` to a JSONL file, whole or not at all; the same arguments give the same bytes.

    Args:
        path: File to write; its directory is made where it is missing, a file of that name is replaced.
        num_games: Games to play, each until its end.
        grid_size: Cells along one side of the board.
        teacher: Name of the player.
        style: Name of the text format.
        seed: Seed of the data set.
        noise: See ``Recipe``.
        augment: See ``Recipe``.
        upstream_rules: See ``Recipe``.
        num_workers: Processes that play. One plays in this process; more are started anew, so teacher and style must
            come from a module. The bytes are the same for any number.
        progress: Called after each game with the number of games played and the number in all.

    Returns:
        The number of rows written.

    Raises:
        UserError: If an argument is out of range, a name is unknown, ``path`` is a directory or a worker dies.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a directory; give the name of a file to write")
    _check_num_games(num_games)
    if num_workers < 1:
        raise UserError(f"num_workers must be at least 1 (found: {num_workers})")
    recipe = _recipe(grid_size, teacher, style, seed, noise, augment, upstream_rules)
    num_rows = 0
    with open_durably(path) as file:
        for num_played, game in enumerate(_written_games(recipe, num_games, num_workers), start=1):
            file.write(game.lines)
            num_rows += game.num_rows
            if progress is not None:
                progress(num_played, num_games)
    return num_rows


class _WrittenGame(NamedTuple):
    """A game as lines of JSON."""

    num_rows: int
    lines: bytes


def _check_num_games(num_games: int) -> None:
    if not 1 <= num_games <= GAMES_PER_SEED:
        raise UserError(f"num_games must lie between 1 and {GAMES_PER_SEED:,} (found: {num_games})")


def _recipe(
    grid_size: int, teacher: str, style: str, seed: int, noise: float, augment: bool, upstream_rules: bool
) -> Recipe:
    try:
        make_teacher, writer = get_seeded_teacher(teacher), get_style(style)
    except ValueError as error:
        raise UserError(str(error)) from error
    return Recipe(grid_size, make_teacher, writer, seed, noise, augment, upstream_rules)


def _written_games(recipe: Recipe, num_games: int, num_workers: int) -> Iterator[_WrittenGame]:
    """The games in order, whoever plays them."""
    write = partial(_write_game, recipe)
    if num_workers == 1:
        yield from map(write, range(num_games))
        return
    try:
        pickle.dumps(recipe)
    except Exception as error:  # Whatever the objects raise: pickling runs their code.
        raise UserError(
            f"teacher or style cannot be sent to another process ({error}). Define it in a module, or use one worker."
        ) from error
    # Processes forked from one that runs threads, as any with torch does, may hang.
    executor = ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)
    )
    try:
        yield from executor.map(write, range(num_games), chunksize=_GAMES_PER_TASK)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died, perhaps for want of memory; nothing was written. Use fewer workers."
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _write_game(recipe: Recipe, game: int) -> _WrittenGame:
    rows = recipe.rows(game)
    return _WrittenGame(len(rows), b"".join([json.dumps(row).encode() + b"\n" for row in rows]))
