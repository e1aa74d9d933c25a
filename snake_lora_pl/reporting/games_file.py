"""Played games to disk: all of them as JSONL, and a few to look at."""

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
    """Write every game as a line of JSON, player after player.

    A line holds ``player``, ``reading``, ``seed``, ``grid_size``, ``end``, ``apples``, ``steps`` and ``frames``.
    A frame is a position: ``head``, ``trail`` (``Board.trail``: the steps from head to tail, a letter each), ``apple``,
    and, where a move was asked for, ``move``, ``words``, ``teacher``, ``optimal``, ``fatal`` and ``claims``.

    Args:
        path: Where to; a file there is replaced.
        results: The players with their games.
    """
    with open_durably(path, "w", encoding="utf-8") as file:
        for result in results:
            for game in result.games:
                line = {
                    "player": result.name,
                    "reading": result.reading,
                    "seed": game.seed,
                    "grid_size": game.recording.size,
                    "end": game.end.value,
                    "apples": game.num_apples,
                    "steps": game.num_steps,
                    "frames": list(_frames(game)),
                }
                file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")


def _frames(game: PlayedGame) -> Iterator[dict[str, Any]]:
    for index, frame in enumerate(game.recording.frames):
        position = {"head": frame.board.head, "trail": frame.board.trail, "apple": frame.board.apple}
        was_asked = index < len(game.judgments)
        yield position | _judged(frame, game.judgments[index]) if was_asked else position


def _judged(frame: Frame, judgment: Judgment) -> dict[str, Any]:
    return {
        "move": None if frame.move is None else frame.move.name,
        "words": frame.completion,
        "teacher": judgment.teacher_move.name,
        "optimal": [move.name for move in judgment.optimal_moves],
        "fatal": judgment.is_fatal,
        "claims": judgment.claims,
    }


class SavedGame(NamedTuple):
    """A game read back.

    Attributes:
        player: Who played it.
        seed: The game's seed.
        recording: Every position, move and word, and the end.
    """

    player: str
    seed: int
    recording: Recording

    @property
    def moves(self) -> list[Move | None]:
        """The moves as the player named them, the deadly one included."""
        return [frame.move for frame in decision_frames(self.recording)]


def read_games(path: str | os.PathLike[str]) -> Iterator[SavedGame]:
    """The games that ``write_games`` wrote."""
    with open(path, encoding="utf-8") as file:
        for line in map(json.loads, file):
            frames = tuple(_read_frame(line["grid_size"], frame) for frame in line["frames"])
            title = f"{line['player']}, game {line['seed']}"
            yield SavedGame(line["player"], line["seed"], Recording(frames, End(line["end"]), title))


def _read_frame(size: int, frame: dict[str, Any]) -> Frame:
    apple = None if frame["apple"] is None else (frame["apple"][0], frame["apple"][1])
    board = Board.from_trail(size, (frame["head"][0], frame["head"][1]), frame["trail"], apple)
    move = frame.get("move")
    return Frame(board, None if move is None else Move[move], frame.get("words", ""))


def best_median_worst(games: Sequence[T], key: Callable[[T], tuple[int, int, int]]) -> dict[str, T]:
    """Three games that stand for all.

    Args:
        games: At least one.
        key: A game's apples, steps and seed, by which they are ordered.

    Returns:
        The games under ``best``, ``median`` and ``worst``.
    """
    ordered = sorted(games, key=key)
    return {"best": ordered[-1], "median": ordered[len(ordered) // 2], "worst": ordered[0]}


def write_replays(paths: GamesPaths, games: Sequence[PlayedGame]) -> list[Path]:
    """Write the best, the median and the worst of some games as GIF and as a page.

    Args:
        paths: Where to; files there are replaced.
        games: At least one.

    Returns:
        The files.
    """
    three = best_median_worst(games, lambda game: (game.num_apples, game.num_steps, game.seed))
    written = []
    for which, game in three.items():
        for kind, content in (
            ("gif", render_gif(game.recording)),
            ("html", render_html(game.recording).encode()),
        ):
            path = paths.replay_path(which, kind)
            with open_durably(path) as file:
                file.write(content)
            written.append(path)
    return written
