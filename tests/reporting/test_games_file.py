from __future__ import annotations

import json
from pathlib import Path

from snake_lora_pl.evaluation.distributed import Ranks, play_shared
from snake_lora_pl.evaluation.policy import TeacherPolicy
from snake_lora_pl.game import Board, End, Game
from snake_lora_pl.game.game import starvation_cap
from snake_lora_pl.paths import GamesPaths
from snake_lora_pl.reporting.games_file import read_games, write_games, write_replays
from tests.evaluation.scripted import ScriptedPolicy, like_bfs, nonsense
from tests.reporting.test_table import SEEDS, explain, play, players


def test_saved_games_replay_to_the_same_end(tmp_path: Path) -> None:
    results = players()
    path = tmp_path / "games.jsonl"
    write_games(path, results)
    saved = list(read_games(path))
    assert [game.player for game in saved] == ["adapter"] * 5 + ["base"] * 5 + ["random_legal"] * 5
    for game, played in zip(saved, [game for result in results for game in result.games], strict=True):
        assert game.recording == played.recording
        replayed = Game(6, game.seed, max_steps_without_apple=starvation_cap(6))
        for move in game.moves:
            replayed.play(move)
        assert (replayed.end, replayed.num_apples) == (game.recording.end, played.num_apples)


def test_frame_holds_position_completion_and_judgment(tmp_path: Path) -> None:
    path = tmp_path / "games.jsonl"
    write_games(path, players())
    line = json.loads(path.read_text().splitlines()[0])
    assert (line["player"], line["grid_size"], line["seed"]) == ("adapter", 6, SEEDS[0])
    frame = line["frames"][0]
    board = Board.from_trail(6, tuple(frame["head"]), frame["trail"], tuple(frame["apple"]))
    assert frame["words"] == explain(board)
    assert frame["move"] == frame["teacher"] == like_bfs(board)
    assert frame["move"] in frame["optimal"]
    assert frame["fatal"] is False
    assert frame["claims"]["head"] is True


def test_replays_are_the_best_median_and_worst_game(tmp_path: Path) -> None:
    games = play(TeacherPolicy("random_legal")).games
    paths = GamesPaths(tmp_path / "games")
    written = write_replays(paths, games)
    assert sorted(path.name for path in written) == sorted(path.name for path in paths.games_dir.iterdir())
    assert paths.replay_path("best", "gif").read_bytes().startswith(b"GIF89a")
    apples = sorted(game.num_apples for game in games)
    for which, count in (("best", apples[-1]), ("median", apples[2]), ("worst", apples[0])):
        replay = paths.replay_path(which, "html").read_text()
        shown = [game for game in games if f"game {game.seed}" in replay]
        assert [game.num_apples for game in shown] == [count]


def test_single_game_is_best_median_and_worst(tmp_path: Path) -> None:
    (game,) = play_shared(ScriptedPolicy(nonsense), SEEDS[:1], Ranks(), grid_size=6).games
    assert game.end is End.NO_VALID_ANSWER
    replays = [path.read_text() for path in write_replays(GamesPaths(tmp_path), [game]) if path.suffix == ".html"]
    assert len(replays) == 3
    assert len(set(replays)) == 1
