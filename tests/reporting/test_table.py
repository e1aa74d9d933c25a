from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from snake_lora_pl.evaluation.distributed import PlayerResult, Ranks, play_shared
from snake_lora_pl.evaluation.policy import Policy, TeacherPolicy
from snake_lora_pl.game import Board, End, Game, Move, get_style
from snake_lora_pl.game.game import starvation_cap
from snake_lora_pl.game.seeds import play_seeds
from snake_lora_pl.paths import GamesPaths
from snake_lora_pl.reporting.games_file import read_games, write_games, write_replays
from snake_lora_pl.reporting.table import differences_in_words, render_table, table_json
from tests.evaluation.scripted import ScriptedPolicy, like_bfs, nonsense

SEEDS = play_seeds(5)


def explain(board: Board) -> str:
    return get_style("bfs-512").write_completion(board, Move[like_bfs(board)])


def play(policy: Policy) -> PlayerResult:
    return play_shared(policy, SEEDS, Ranks(), grid_size=6)


def players() -> list[PlayerResult]:
    return [
        play(ScriptedPolicy(explain, "adapter")),
        play(ScriptedPolicy(nonsense, "base")),
        play(TeacherPolicy("random_legal")),
    ]


def printed(results: list[PlayerResult], width: int = 100) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(render_table(results))
    return file.getvalue()


def row(text: str, label: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.strip().startswith(label)]
    return line.split(label, 1)[1].split()


def test_the_table_has_a_column_for_each_player_and_a_row_for_each_figure() -> None:
    results = players()
    text = printed(results)
    assert text.splitlines()[0].split() == ["adapter", "base", "random_legal"]
    assert row(text, "apples, mean") == [f"{result.statistics()['apples_mean']:.1f}" for result in results]
    assert row(text, "unreadable answers") == ["0.00%", "100.00%", "0.00%"]
    assert row(text, "ended NO_VALID_ANSWER") == ["0", "5", "0"]
    assert row(text, "steps beyond it, an apple")[1] == "-"
    assert row(text, "true: head") == ["100.0%", "-", "-"]
    assert "ended WIN" not in text


def test_a_table_of_four_players_fits_into_80_columns() -> None:
    results = [*players(), play(TeacherPolicy("safe_greedy"))]
    assert len(printed(results, width=80).splitlines()) == len(printed(results, width=200).splitlines())


def test_two_runs_give_equal_tables_but_for_the_speed() -> None:
    first, second = (table_json(players(), {"seed": 0}, {}) for _ in range(2))
    assert first.pop("moves_per_second").keys() == second.pop("moves_per_second").keys()
    assert json.dumps(first) == json.dumps(second)


def test_the_first_player_is_compared_with_each_other_one() -> None:
    results = players()
    table = table_json(results, {}, {})
    mean = results[0].statistics()["apples_mean"]
    assert table["differences"]["adapter - base"]["mean"] == mean
    assert list(table["differences"]) == ["adapter - base", "adapter - random_legal"]
    first_line = differences_in_words(results)[0]
    assert first_line.startswith(f"adapter - base: {mean:+.1f} apples on the same games (95%: +")


def test_saved_games_are_read_back_and_replay_to_the_same_end(tmp_path: Path) -> None:
    results = players()
    path = tmp_path / "games.jsonl"
    write_games(path, results)
    saved = list(read_games(path))
    assert [game.player for game in saved] == ["adapter"] * 5 + ["base"] * 5 + ["random_legal"] * 5
    for game, played in zip(saved, [game for result in results for game in result.games], strict=True):
        assert game.recording == played.recording
        again = Game(6, game.seed, max_steps_without_apple=starvation_cap(6))
        for move in game.moves:
            again.play(move)
        assert (again.end, again.num_apples) == (game.recording.end, played.num_apples)


def test_a_line_holds_every_state_the_words_and_what_is_to_be_said_of_the_move(tmp_path: Path) -> None:
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


def test_best_median_and_worst_game_are_left_to_look_at(tmp_path: Path) -> None:
    games = play(TeacherPolicy("random_legal")).games
    paths = GamesPaths(tmp_path / "games")
    written = write_replays(paths, games)
    assert sorted(path.name for path in written) == sorted(path.name for path in paths.games_dir.iterdir())
    assert paths.replay_path("best", "gif").read_bytes().startswith(b"GIF89a")
    apples = sorted(game.num_apples for game in games)
    for which, count in (("best", apples[-1]), ("median", apples[2]), ("worst", apples[0])):
        page = paths.replay_path(which, "html").read_text()
        shown = [game for game in games if f"game {game.seed}" in page]
        assert [game.num_apples for game in shown] == [count]


def test_one_game_is_best_median_and_worst(tmp_path: Path) -> None:
    (game,) = play_shared(ScriptedPolicy(nonsense), SEEDS[:1], Ranks(), grid_size=6).games
    assert game.end is End.NO_VALID_ANSWER
    pages = [path.read_text() for path in write_replays(GamesPaths(tmp_path), [game]) if path.suffix == ".html"]
    assert len(pages) == 3
    assert len(set(pages)) == 1
