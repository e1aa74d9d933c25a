from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

from snake_lora_pl import durable
from snake_lora_pl.errors import UserError
from snake_lora_pl.training.metrics_csv import MetricsCSVLogger


def log(logger: MetricsCSVLogger, *rows: dict[str, float]) -> None:
    for step, row in enumerate(rows):
        logger.log_metrics(row, step=step)
        logger.save()


def rows_of(directory: Path) -> list[dict[str, str]]:
    with open(directory / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_new_metric_adds_a_column_and_keeps_the_rows(tmp_path: Path) -> None:
    log(MetricsCSVLogger(str(tmp_path)), {"b": 1.5}, {"a": 2.0, "b": 0.1})
    assert rows_of(tmp_path) == [{"a": "", "b": "1.5", "step": "0"}, {"a": "2.0", "b": "0.1", "step": "1"}]


def test_resumed_run_keeps_the_rows_of_its_checkpoint_and_drops_an_incomplete_line(tmp_path: Path) -> None:
    first = MetricsCSVLogger(str(tmp_path))
    log(first, {"a": 1.0}, {"a": 2.0})
    num_rows = first.num_rows
    log(first, {"b": 3.0})
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("4.0,")
    resumed = MetricsCSVLogger(str(tmp_path))
    resumed.rewind(num_rows)
    log(resumed, {"c": 5.0})
    assert [(row["a"], row["c"]) for row in rows_of(tmp_path)] == [("1.0", ""), ("2.0", ""), ("", "5.0")]


def test_process_killed_while_adding_a_column_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = MetricsCSVLogger(str(tmp_path))
    log(logger, {"a": 1.0})

    def exit_process(*args: object) -> None:
        raise SystemExit

    monkeypatch.setattr(durable.os, "replace", exit_process)
    with pytest.raises(SystemExit):
        log(logger, {"b": 1.0})
    assert rows_of(tmp_path) == [{"a": "1.0", "step": "0"}]


@pytest.mark.parametrize("new_column", [True, False])
def test_deleted_run_directory_is_an_error_and_is_not_created_again(tmp_path: Path, new_column: bool) -> None:
    directory = tmp_path / "run"
    logger = MetricsCSVLogger(str(directory))
    log(logger, {"a": 1.0})
    os.unlink(directory / "metrics.csv")
    directory.rmdir()
    with pytest.raises(UserError, match=r"metrics\.csv: .*directory was removed"):
        log(logger, {"b" if new_column else "a": 1.0})
    assert not directory.exists()
