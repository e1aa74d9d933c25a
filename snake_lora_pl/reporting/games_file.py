"""Files of played games: all games as JSONL, and replays of three of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from snake_lora_pl.durable import open_durably
from snake_lora_pl.evaluation.distributed import PlayerResult
from snake_lora_pl.evaluation.game_loop import Judgment, PlayedGame, decision_frames
from snake_lora_pl.game import Board, End, Move
from snake_lora_pl.game.replay import Frame, Recording, render_gif, render_html
from snake_lora_pl.paths import GamesPaths

T = TypeVar("T")


def write_games(path: str | os.PathLike[str], results: Sequence[PlayerResult]) -> None:
    """Write one JSON object per game, grouped by player.

    An object has the keys ``player``, ``reading``, ``seed``, ``grid_size``, ``end``, ``apples``, ``steps`` and
    ``frames``. A frame is a position: ``head``, ``trail`` (see ``Board.trail``) and ``apple``. Frames in which the
    player moved also have ``move``, ``words`` (the completion), ``teacher``, ``optimal``, ``fatal`` and ``claims``.

    Args:
        path: Output file; an existing file is replaced.
        results: Players with their games.
    """
    with open_durably(path, "w", encoding="utf-8") as file:
        for result in results:
            for game in result.games:
                file.write(game_line(result.name, result.reading, game.seed, game.recording, game.judgments))


def game_line(player: str, reading: str, seed: int, recording: Recording, judgments: Sequence[Judgment]) -> str:
    """Return the line of a game in the file; ``end`` is null in a game that was interrupted."""
    game = {
        "player": player,
        "reading": reading,
        "seed": seed,
        "grid_size": recording.size,
        "end": None if recording.end is None else recording.end.value,
        "apples": recording.num_apples(-1),
        "steps": len(recording.frames) - 1,
        "frames": list(_frames(recording, judgments)),
    }
    return json.dumps(game, ensure_ascii=False, separators=(",", ":")) + "\n"


def _frames(recording: Recording, judgments: Sequence[Judgment]) -> Iterator[dict[str, Any]]:
    for index, frame in enumerate(recording.frames):
        position = {"head": frame.board.head, "trail": frame.board.trail, "apple": frame.board.apple}
        yield position | _decision(frame, judgments[index]) if index < len(judgments) else position


def _decision(frame: Frame, judgment: Judgment) -> dict[str, Any]:
    return {
        "move": None if frame.move is None else frame.move.name,
        "words": frame.completion,
        "teacher": judgment.teacher_move.name,
        "optimal": [move.name for move in judgment.optimal_moves],
        "fatal": judgment.is_fatal,
        "claims": judgment.claims,
    }


class SavedGame(NamedTuple):
    """A game read from a file.

    Attributes:
        player: Name of the player.
        seed: Seed of the game.
        recording: Positions, moves, completions, and how the game ended.
    """

    player: str
    seed: int
    recording: Recording

    @property
    def moves(self) -> list[Move | None]:
        """The player's moves, including the one that ended the game."""
        return [frame.move for frame in decision_frames(self.recording)]


def read_games(path: str | os.PathLike[str]) -> Iterator[SavedGame]:
    """Read the games that ``write_games`` wrote."""
    with open(path, encoding="utf-8") as file:
        for line in map(json.loads, file):
            frames = tuple(_read_frame(line["grid_size"], frame) for frame in line["frames"])
            title = f"{line['player']}, game {line['seed']}"
            end = None if line["end"] is None else End(line["end"])
            yield SavedGame(line["player"], line["seed"], Recording(frames, end, title))


def _read_frame(size: int, frame: dict[str, Any]) -> Frame:
    apple = None if frame["apple"] is None else (frame["apple"][0], frame["apple"][1])
    board = Board.from_trail(size, (frame["head"][0], frame["head"][1]), frame["trail"], apple)
    move = frame.get("move")
    return Frame(board, None if move is None else Move[move], frame.get("words", ""))


def best_median_worst(games: Sequence[T], key: Callable[[T], tuple[int, int, int]]) -> dict[str, T]:
    """Select three representative games.

    Args:
        games: At least one game.
        key: Returns apples, steps and seed of a game, which define the order.

    Returns:
        The games by the names ``best``, ``median`` and ``worst``.
    """
    ordered = sorted(games, key=key)
    return {"best": ordered[-1], "median": ordered[len(ordered) // 2], "worst": ordered[0]}


def write_replays(paths: GamesPaths, games: Sequence[PlayedGame]) -> list[Path]:
    """Write the best, median and worst game as GIF and HTML.

    Args:
        paths: Output paths; existing files are replaced.
        games: At least one game.

    Returns:
        Paths of the files written.
    """
    selected = best_median_worst(games, lambda game: (game.num_apples, game.num_steps, game.seed))
    written = []
    for which, game in selected.items():
        for extension, content in (
            ("gif", render_gif(game.recording)),
            ("html", render_html(game.recording).encode()),
        ):
            path = paths.replay_path(which, extension)
            with open_durably(path) as file:
                file.write(content)
            written.append(path)
    return written
