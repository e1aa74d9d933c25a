"""Generation of rows from seeded games that a teacher plays.

The seed of a game depends only on the data set's seed and the game's number, so the rows of a game depend neither on
the number of games nor on the process that plays it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, TypedDict, get_args

from snake_lora_pl.durable import open_durably
from snake_lora_pl.errors import UserError
from snake_lora_pl.game import (
    SYMMETRIES,
    Board,
    End,
    Game,
    Move,
    OrientedStyle,
    PromptMoves,
    SeededTeacher,
    Style,
    Teacher,
    get_seeded_teacher,
    get_style,
)
from snake_lora_pl.game.game import starvation_cap
from snake_lora_pl.game.seeds import GAMES_PER_SEED, NUM_DATA_SEEDS, data_seed

NoiseMoves: TypeAlias = Literal["legal", "safe", "mixed"]
"""Set that a random move is drawn from: legal moves, those after which the tail is reachable, or one of both sets."""

Augmentation: TypeAlias = Literal["none", "all", "random"]
"""Symmetries of the board that positions are written in: none, all, or for each position a random one."""

# Games per task of a worker: a few tenths of a second of work.
_GAMES_PER_TASK = 8


class _Row(TypedDict):
    prompt: str
    completion: str
    game: int
    step: int
    seed: int


class GeneratedRow(_Row, total=False):
    """A position of a game.

    ``game`` and ``step`` count from 0; ``seed`` is the game's seed, so that ``Game(grid_size, seed)`` repeats the game.
    ``symmetry``, in augmented data only, is the index in ``game.SYMMETRIES`` of the position's transformation. All
    symmetries of a game have the same number, because a split by game would otherwise validate on transformed copies of
    training positions.
    """

    symmetry: int


@dataclass(frozen=True)
class Recipe:
    """Settings that determine the rows of a game.

    Attributes:
        grid_size: Cells per side of the board.
        teacher: Function that creates the player from a game's seed.
        style: Text format.
        seed: Seed of the data set.
        noise: Probability of playing a random move. The row contains the teacher's move nevertheless, so that there are
            rows for positions that the teacher alone would not reach.
        noise_moves: Set that random moves are drawn from; ``mixed`` chooses between the two with equal probability for
            each random move. Where no move is safe, the teacher's move is played.
        augment: Symmetries that positions are written in: none, all, or random (each position in one). The teacher
            chooses a move on the transformed board, because its choice between equally good moves is not symmetric. A
            style that depends on the board's orientation transforms prompt and move instead.
        upstream_rules: Whether to follow the rules of the program that wrote the ``heuristics-v0.04`` files, and to
            drop the last move of each game as it does.

    Raises:
        UserError: If a value is out of range.
    """

    grid_size: int
    teacher: SeededTeacher
    style: Style
    seed: int
    noise: float = 0.0
    augment: Augmentation = "none"
    upstream_rules: bool = False
    noise_moves: NoiseMoves = "legal"

    def __post_init__(self) -> None:
        """Check the ranges of the values."""
        if not 0 <= self.seed < NUM_DATA_SEEDS:
            raise UserError(f"seed must be between 0 and {NUM_DATA_SEEDS - 1:,} (found: {self.seed}).")
        if not 0 <= self.noise <= 1:
            raise UserError(f"noise must be a probability between 0 and 1 (found: {self.noise}).")
        if self.noise_moves not in get_args(NoiseMoves):
            known = ", ".join(get_args(NoiseMoves))
            raise UserError(f"noise_moves must be one of {known} (found: {self.noise_moves!r}).")
        if self.augment not in get_args(Augmentation):
            known = ", ".join(get_args(Augmentation))
            raise UserError(f"augment must be one of {known} (found: {self.augment!r}).")
        try:
            Game(self.grid_size)
        except ValueError as error:
            raise UserError(str(error)) from error

    def rows(self, game: int) -> list[GeneratedRow]:
        """Return the rows of one game; with all symmetries, one after the other."""
        seed = data_seed(self.seed, game)
        positions = self._play(seed)
        steps: list[tuple[int | None, int]]
        if self.augment == "none":
            steps = [(None, step) for step in range(len(positions))]
        elif self.augment == "all":
            steps = [(number, step) for number in range(len(SYMMETRIES)) for step in range(len(positions))]
        else:
            rng = random.Random(f"symmetries {seed}")
            steps = [(rng.randrange(len(SYMMETRIES)), step) for step in range(len(positions))]
        rows: list[GeneratedRow] = []
        teacher = self.teacher(seed)
        for number, step in steps:
            if step == 0:
                teacher = self.teacher(seed)
            prompt, completion = self._text(*positions[step], number, teacher)
            row: GeneratedRow = {"prompt": prompt, "completion": completion, "game": game, "step": step, "seed": seed}
            rows.append(row if number is None else row | {"symmetry": number})
        return rows

    def _text(self, board: Board, move: Move, number: int | None, teacher: Teacher) -> tuple[str, str]:
        """Return prompt and completion of a position in a symmetry."""
        if number is None:
            return self.style.write_prompt(board), self.style.write_completion(board, move)
        symmetry = SYMMETRIES[number]
        if isinstance(self.style, OrientedStyle):
            return self.style.write_transformed(board, move, symmetry)
        transformed = symmetry.board(board)
        choice = teacher(transformed)
        if choice is None:
            raise ValueError(f"the teacher has no move for {transformed}, but has one for {board}")
        return self.style.write_prompt(transformed), self.style.write_completion(transformed, choice)

    def _play(self, seed: int) -> list[tuple[Board, Move]]:
        """Return each position of a game and the teacher's move, until the game ends or there is no legal move."""
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
                moves = self._noise_moves(game)
                if moves:
                    move = moves[int(game.rng.random() * len(moves))]
            game.play(move)
        # If the apple is under the head, upstream plays one more move and drops that one.
        if self.upstream_rules and not (game.end is End.NO_PATH and game.board.apple is None):
            positions.pop()
        return positions

    def _noise_moves(self, game: Game) -> list[Move]:
        legal = game.board.legal_moves()
        if self.noise_moves == "legal" or (self.noise_moves == "mixed" and game.rng.random() < 0.5):
            return legal
        traps = PromptMoves.of(game.board).traps
        return [move for move in legal if move not in traps]


def generate_rows(
    num_games: int,
    grid_size: int = 10,
    teacher: str = "bfs",
    style: str = "bfs-512",
    seed: int = 0,
    *,
    noise: float = 0.0,
    noise_moves: NoiseMoves = "legal",
    augment: Augmentation = "none",
    upstream_rules: bool = False,
) -> Iterator[GeneratedRow]:
    """Yield rows of seeded games, one for each position in which the teacher has a legal move.

    Args:
        num_games: Number of games, each played to its end.
        grid_size: Cells per side of the board.
        teacher: Name of the player, one of ``game.TEACHERS``.
        style: Name of the text format, one of ``game.STYLES``.
        seed: Seed of the data set; the same arguments give the same rows.
        noise: See ``Recipe``.
        noise_moves: See ``Recipe``.
        augment: See ``Recipe``.
        upstream_rules: See ``Recipe``.

    Raises:
        UserError: If an argument is out of range or a name is unknown; raised by the call, not with the first row.
    """
    _check_num_games(num_games)
    recipe = _make_recipe(grid_size, teacher, style, seed, noise, augment, upstream_rules, noise_moves)
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
    noise_moves: NoiseMoves = "legal",
    augment: Augmentation = "none",
    upstream_rules: bool = False,
    num_workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the rows of ``generate_rows`` to a JSONL file, atomically; the same arguments give the same bytes.

    Args:
        path: File to write; a missing directory is created, an existing file is replaced.
        num_games: Number of games, each played to its end.
        grid_size: Cells per side of the board.
        teacher: Name of the player.
        style: Name of the text format.
        seed: Seed of the data set.
        noise: See ``Recipe``.
        noise_moves: See ``Recipe``.
        augment: See ``Recipe``.
        upstream_rules: See ``Recipe``.
        num_workers: Number of processes that play; 1 plays in this process. More are spawned, so teacher and style must
            be importable from a module. The bytes are the same for any number.
        progress: Called after each game with the number of games played and the total number.

    Returns:
        The number of rows written.

    Raises:
        UserError: If an argument is out of range, a name is unknown, ``path`` is a directory or a worker is killed.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a directory. Name a file to write.")
    _check_num_games(num_games)
    if num_workers < 1:
        raise UserError(f"num_workers must be at least 1 (found: {num_workers}).")
    recipe = _make_recipe(grid_size, teacher, style, seed, noise, augment, upstream_rules, noise_moves)
    num_rows = 0
    with open_durably(path) as file:
        for num_played, game in enumerate(_write_games(recipe, num_games, num_workers), start=1):
            file.write(game.lines)
            num_rows += game.num_rows
            if progress is not None:
                progress(num_played, num_games)
    return num_rows


class _WrittenGame(NamedTuple):
    """The JSON lines of a game."""

    num_rows: int
    lines: bytes


def _check_num_games(num_games: int) -> None:
    if not 1 <= num_games <= GAMES_PER_SEED:
        raise UserError(f"num_games must be between 1 and {GAMES_PER_SEED:,} (found: {num_games}).")


def _make_recipe(
    grid_size: int,
    teacher: str,
    style: str,
    seed: int,
    noise: float,
    augment: Augmentation,
    upstream_rules: bool,
    noise_moves: NoiseMoves,
) -> Recipe:
    try:
        make_teacher, writer = get_seeded_teacher(teacher), get_style(style)
    except ValueError as error:
        raise UserError(str(error)) from error
    return Recipe(grid_size, make_teacher, writer, seed, noise, augment, upstream_rules, noise_moves)


def _write_games(recipe: Recipe, num_games: int, num_workers: int) -> Iterator[_WrittenGame]:
    """Yield the games in order."""
    write = partial(_write_game, recipe)
    if num_workers == 1:
        yield from map(write, range(num_games))
        return
    try:
        pickle.dumps(recipe)
    except Exception as error:  # Pickling runs code of the objects, which can raise anything.
        raise UserError(
            f"teacher or style cannot be pickled for num_workers={num_workers} ({error}). "
            "Define it in a module, or use one worker."
        ) from error
    # Forking a process that runs threads, as torch does, can deadlock.
    executor = ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)
    )
    try:
        yield from executor.map(write, range(num_games), chunksize=_GAMES_PER_TASK)
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process was killed, possibly for lack of memory (found: num_workers={num_workers}); no file was "
            "written. Use fewer workers."
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _write_game(recipe: Recipe, game: int) -> _WrittenGame:
    rows = recipe.rows(game)
    return _WrittenGame(len(rows), b"".join([json.dumps(row).encode() + b"\n" for row in rows]))
