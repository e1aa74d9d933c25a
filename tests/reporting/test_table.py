from __future__ import annotations

import io
import json

from rich.console import Console

from snake_lora_pl.evaluation.distributed import PlayerResult, Ranks, play_shared
from snake_lora_pl.evaluation.policy import Policy, TeacherPolicy
from snake_lora_pl.game import Board, Move, get_style
from snake_lora_pl.game.seeds import play_seeds
from snake_lora_pl.reporting.table import difference_lines, format_bool, render_table, table_json
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


def test_table_has_a_column_per_player_and_a_row_per_statistic() -> None:
    results = players()
    text = printed(results)
    assert text.splitlines()[0].split() == ["adapter", "base", "random_legal"]
    assert row(text, "apples, mean") == [f"{result.statistics()['apples_mean']:.1f}" for result in results]
    assert row(text, "unreadable answers") == ["0.00%", "100.00%", "0.00%"]
    assert row(text, "ended NO_VALID_ANSWER") == ["0", "5", "0"]
    assert row(text, "extra steps per apple")[1] == "-"
    assert row(text, "true: head") == ["100.0%", "-", "-"]
    assert "ended WIN" not in text


def test_table_of_four_players_fits_into_80_columns() -> None:
    results = [*players(), play(TeacherPolicy("safe_greedy"))]
    assert len(printed(results, width=80).splitlines()) == len(printed(results, width=200).splitlines())


def test_identical_runs_give_equal_tables_except_for_speed() -> None:
    first, second = (table_json(players(), {"seed": 0}, {}) for _ in range(2))
    assert first.pop("moves_per_second").keys() == second.pop("moves_per_second").keys()
    assert json.dumps(first) == json.dumps(second)


def test_first_player_is_compared_with_each_other_player() -> None:
    results = players()
    table = table_json(results, {}, {})
    mean = results[0].statistics()["apples_mean"]
    assert table["differences"]["adapter - base"]["mean"] == mean
    assert list(table["differences"]) == ["adapter - base", "adapter - random_legal"]
    first_line = difference_lines(results)[0]
    assert first_line.startswith(f"adapter - base: {mean:+.1f} ")


def test_unknown_is_neither_yes_nor_no() -> None:
    assert [format_bool(value) for value in (True, False, None)] == ["yes", "no", "unknown"]
