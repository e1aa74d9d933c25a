"""Seeded games, played by a teacher and written down as rows. Knows nothing of tokenizers or models.

Every game has a seed of its own, made from the data set's seed and the game's number alone: rows do not depend on how
many games there are or on who plays them in which order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypedDict

from snake_lora_pl.durable import open_durably
from snake_lora_pl.errors import UserError
from snake_lora_pl.game import Board, Game, Move, Style, Teacher, get_style, get_teacher

# Data set seed 7 owns the game seeds 7,000,000 to 7,999,999, so no two data sets share a game and a row's seed can be
# read by eye.
GAMES_PER_SEED = 1_000_000

# A cycle through the whole board reaches any apple within as many steps as there are cells. A player that needs several
# times as many walks in circles, and its rows only repeat each other.
STARVATION_BOARDS = 4


class GeneratedRow(TypedDict):
    """One position of one game.

    ``game`` and ``step`` count from 0; ``seed`` is the game's own, so that ``Game(grid_size, seed)`` plays it again.
    """

    prompt: str
    completion: str
    game: int
    step: int
    seed: int


def generate_rows(
    num_games: int, grid_size: int = 10, teacher: str = "bfs", style: str = "bfs-512", seed: int = 0
) -> Iterator[GeneratedRow]:
    """Rows of seeded games, game by game, a row for every position in which the teacher has a legal move.

    Args:
        num_games: Games to play, each until its end.
        grid_size: Cells along one side of the board.
        teacher: Name of the player, one of ``game.TEACHERS``.
        style: Name of the text format, one of ``game.STYLES``.
        seed: Seed of the data set; the same arguments give the same rows.

    Raises:
        UserError: If an argument is out of range or a name is unknown; raised at the call, not at the first row.
    """
    games = _generate_games(num_games, grid_size, teacher, style, seed)
    return (row for rows in games for row in rows)


def write_dataset(
    path: str | os.PathLike[str],
    num_games: int,
    grid_size: int = 10,
    teacher: str = "bfs",
    style: str = "bfs-512",
    seed: int = 0,
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
        progress: Called after each game with the number of games played and the number in all.

    Returns:
        The number of rows written.

    Raises:
        UserError: If an argument is out of range, a name is unknown or ``path`` is a directory.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a directory; give the name of a file to write")
    games = _generate_games(num_games, grid_size, teacher, style, seed)
    num_rows = 0
    with open_durably(path) as file:
        for num_played, rows in enumerate(games, start=1):
            file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
            num_rows += len(rows)
            if progress is not None:
                progress(num_played, num_games)
    return num_rows


def game_seed(seed: int, game: int) -> int:
    """The seed of one game of a data set; different for any two games of any two data sets."""
    return seed * GAMES_PER_SEED + game


def _generate_games(
    num_games: int, grid_size: int, teacher: str, style: str, seed: int
) -> Iterator[list[GeneratedRow]]:
    if not 1 <= num_games <= GAMES_PER_SEED:
        raise UserError(f"num_games must lie between 1 and {GAMES_PER_SEED:,} (found: {num_games})")
    if seed < 0:
        raise UserError(f"seed must not be negative (found: {seed})")
    try:
        Game(grid_size)
        play, write = get_teacher(teacher), get_style(style)
    except ValueError as error:
        raise UserError(str(error)) from error
    return (_play_rows(game, grid_size, play, write, game_seed(seed, game)) for game in range(num_games))


def _play_rows(game: int, grid_size: int, teacher: Teacher, style: Style, seed: int) -> list[GeneratedRow]:
    return [
        {
            "prompt": style.write_prompt(board),
            "completion": style.write_completion(board, move),
            "game": game,
            "step": step,
            "seed": seed,
        }
        for step, (board, move) in enumerate(_play(grid_size, teacher, seed))
    ]


def _play(grid_size: int, teacher: Teacher, seed: int) -> Iterator[tuple[Board, Move]]:
    """Every position of one game with the teacher's move, until the game ends or the teacher has no move left."""
    game = Game(grid_size, seed, max_steps_without_apple=STARVATION_BOARDS * grid_size**2)
    while game.end is None:
        board = game.board
        move = teacher(board)
        if move is None:
            return
        yield board, move
        game.play(move)
