"""A synthetic run directory and the results shown in it, made without training."""

from __future__ import annotations

import csv
import json
from typing import NamedTuple

import pytest

from snake_lora_pl.evaluation.dashboard import RunOutcome
from snake_lora_pl.evaluation.distributed import PlayerResult
from snake_lora_pl.evaluation.game_loop import play_games
from snake_lora_pl.evaluation.policy import Answer, TeacherPolicy
from snake_lora_pl.evaluation.statistics import GameSummary
from snake_lora_pl.evaluation.validations import JudgedRow, Validation, add_validation
from snake_lora_pl.game import Board, get_style
from snake_lora_pl.paths import RunPaths
from snake_lora_pl.reporting.games_file import write_games
from snake_lora_pl.reporting.html_report import write_report
from snake_lora_pl.reporting.table import table_json

HTML_INJECTION = "</script><img src=x onerror=\"document.title='owned'\"> <b>bold</b> __DATA__ __TITLE__"
STYLE = get_style("bfs-512")
BOARD = Board(5, ((2, 2), (2, 1), (1, 1)), (4, 4))


class VerbosePolicy(TeacherPolicy):
    """A player that explains its moves with a wrong claim and an HTML injection."""

    def __init__(self) -> None:
        super().__init__("bfs")
        self.name = "adapter"
        self.reading = "generate"

    def answer(self, boards: list[Board], seeds: list[int]) -> list[Answer]:  # type: ignore[override]
        moves = [answer.move for answer in super().answer(boards, seeds)]
        texts = [STYLE.write_completion(board, move) for board, move in zip(boards, moves, strict=True) if move]
        return [
            Answer(
                move, text.replace("Manhattan distance to apple: ", "Manhattan distance to apple: 9") + HTML_INJECTION
            )
            for move, text in zip(moves, texts, strict=True)
        ]


class SyntheticResults(NamedTuple):
    """Results that dashboards show.

    Attributes:
        validation: Sample rows and confusion matrix.
        players: Results of two players on four games.
        outcome: Adapter directory, its metadata, and the data.
    """

    validation: Validation
    players: list[PlayerResult]
    outcome: RunOutcome


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> SyntheticResults:
    directory = tmp_path_factory.mktemp("results")
    adapter_dir = directory / "adapter"
    adapter_dir.mkdir()
    (adapter_dir / "adapter_config.json").write_text("{}")
    (adapter_dir / "adapter_model.safetensors").write_bytes(b"weights")
    rows_path = directory / "rows.jsonl"
    rows_path.write_text('{"prompt": "p", "completion": "c"}\n')
    players = []
    for policy in (VerbosePolicy(), TeacherPolicy("random_legal")):
        games = play_games(policy, [1, 2, 3, 4], grid_size=5, max_steps=20)
        players.append(PlayerResult(policy.name, policy.reading, [GameSummary.of(game) for game in games], games))
    play = {"players": table_json(players, {}, {})["players"]}
    outcome = RunOutcome(adapter_dir, {"step": 900, "play": play}, [rows_path], {"data_hash": "0123456789abcdef"})
    return SyntheticResults(make_validation(900), players, outcome)


def make_validation(step: int) -> Validation:
    """Return a validation with one row per legal move; all completions but the first are HTML injections."""
    rows = []
    for index, move in enumerate(BOARD.legal_moves()):
        teacher = STYLE.write_completion(BOARD, move)
        completion = HTML_INJECTION if index else teacher
        rows.append(JudgedRow.of("rows.jsonl:1", STYLE.write_prompt(BOARD), teacher, completion))
    return Validation(step, 0, rows, [[step, 1, 0, 0, 2], *[[0] * 5] * 3])


@pytest.fixture(scope="session")
def synthetic_run(results: SyntheticResults, tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """A run directory with metrics of 1,200 steps, validations, games and an HTML report."""
    paths = RunPaths(tmp_path_factory.mktemp("synthetic") / "llm_finetune_v0.03_20260102_030405" / "snake")
    paths.run_dir.mkdir(parents=True)
    paths.config_path.write_text(f"model:\n  base_model: tiny\n  adapter_type: lora\n# {HTML_INJECTION}\n")
    with open(paths.metrics_path, "w", newline="") as file:
        writer = csv.writer(file)
        names = ["epoch", "step", "train/loss", "val/loss", "val/decision_accuracy", "train/learning_rate"]
        writer.writerow([*names, "perf/tokens_per_second", "adapter/update_norm/layers_00-07", "play/apples_mean"])
        for step in range(1200):
            writer.writerow([0, step, 3 / (1 + step), "", "", 1e-4, 100 + step, 0.1, ""])
            if step % 300 == 299:
                writer.writerow([0, step, "", 2 / step, 0.5 + step / 3000, "", "", "", step / 100])
        writer.writerow([0, 1200, "nan", "inf", "", "", "", "", ""])
    for step in (300, 600, 600, 900):
        add_validation(paths.validations_path, make_validation(step))
    write_games(paths.games.games_path, results.players)
    settings = {"num_games": 4, "grid_size": 5, "max_steps": 20, "max_steps_without_apple": 100, "teacher": "bfs"}
    paths.games.table_path.write_text(json.dumps(table_json(results.players, settings, {"adapter": {}})))
    write_report(paths)
    return paths
