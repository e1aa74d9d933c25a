from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from snake_lora_pl.evaluation.validations import read_validations
from snake_lora_pl.paths import RunPaths
from snake_lora_pl.reporting.games_file import read_games
from snake_lora_pl.reporting.run_record import RunRecord
from tests.reporting.conftest import SyntheticResults, make_validation


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_record_holds_validations_and_games_during_training(results: SyntheticResults, tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    record = RunRecord(paths)
    for step in (300, 600):
        record.show_validation(make_validation(step))
    record.show_games(results.players[0], 600, is_final=False)
    assert steps(paths.validations_path) == [300, 600]
    assert [game.seed for game in read_games(paths.val_games_path)] == [1, 2, 3, 4]


def test_resume_drops_validations_after_the_checkpoint(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    record = RunRecord(paths)
    for step in (300, 600, 900):
        record.show_validation(make_validation(step))
    trainer: Any = SimpleNamespace(is_global_zero=True, global_step=600)
    record.on_train_start(trainer, Any)  # type: ignore[arg-type]
    assert steps(paths.validations_path) == [300, 600]


def test_repeated_validation_replaces_the_first_and_partial_line_is_ignored(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    record = RunRecord(paths)
    for step in (300, 600, 600, 900):
        record.show_validation(make_validation(step))
    with open(paths.validations_path, "a") as file:
        file.write('{"step": 1200, "cut')
    assert [validation["step"] for validation in read_validations(paths.validations_path)] == [300, 600, 900]
