"""HTML report, validations and TensorBoard events of a real run."""

from __future__ import annotations

import csv
import json
import shlex
from pathlib import Path

import pytest

from snake_lora_pl.__main__ import main
from snake_lora_pl.evaluation.validations import read_validations
from snake_lora_pl.reporting.html_report import render_report
from tests.e2e.reporting.conftest import FinishedRun
from tests.reporting.test_html_report import ParsedReport

pytestmark = pytest.mark.filterwarnings("ignore")


def test_every_validation_shows_the_same_sample_rows(finished_run: FinishedRun, run_flags: list[str]) -> None:
    validations = list(read_validations(finished_run.paths.validations_path))
    assert [validation["step"] for validation in validations] == [2, 4]
    first, second = ([(row["source"], row["prompt"], row["teacher"]) for row in v["rows"]] for v in validations)
    assert first == second
    val_path = next(flag for flag in run_flags if "val_path" in flag).partition("=")[2]
    rows = [json.loads(line) for line in Path(val_path).read_text().splitlines()]
    # The first, middle and last of twelve rows.
    assert [source for source, _, _ in first] == [f"{val_path}:{line}" for line in (1, 7, 12)]
    assert [prompt for _, prompt, _ in first] == [rows[line - 1]["prompt"] for line in (1, 7, 12)]
    assert all(row["words"] != row["teacher"] and row["is_right"] is False for row in validations[0]["rows"])


def test_confusion_matrix_counts_every_validation_row(finished_run: FinishedRun) -> None:
    for validation in read_validations(finished_run.paths.validations_path):
        assert sum(map(sum, validation["decisions"])) == 4  # two batches of two rows


def test_fit_writes_the_html_report_and_prints_its_path(finished_run: FinishedRun) -> None:
    paths = finished_run.paths
    data = ParsedReport(paths.report_path.read_text()).data
    charts = {chart["title"]: chart for chart in data["charts"]}
    assert charts.keys() >= {"Loss", "Learning rate", "Throughput", "Gradient norm"}
    update_norms = charts["Update norm of the adapter"]["series"]
    assert all(point[1] > 0 for line in update_norms for point in line["points"])
    assert data["play"]["players"] == ["adapter", "base", "bfs", "random_legal"]
    assert set(data["games"]["replays"]) == {"best", "median", "worst"}
    assert data["config"] == paths.config_path.read_text()
    report_path = str(paths.report_path.relative_to(finished_run.working_dir))
    assert report_path in [line.split()[-1] for line in finished_run.output.splitlines() if line.startswith("report ")]
    assert all((paths.run_dir / link).exists() for _, link in data["files"])


def test_command_report_writes_the_same_html_report(
    finished_run: FinishedRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = finished_run.paths
    monkeypatch.chdir(finished_run.working_dir)
    before = paths.report_path.read_text()
    paths.report_path.unlink()
    assert main(["report", str(paths.artifacts_dir.relative_to(finished_run.working_dir))]) == 0
    assert str(paths.report_path.relative_to(finished_run.working_dir)) in capsys.readouterr().out
    assert ParsedReport(paths.report_path.read_text()).data == ParsedReport(before).data


def test_commands_in_the_html_report_run(
    finished_run: FinishedRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = finished_run.paths
    monkeypatch.chdir(finished_run.working_dir)
    commands = [shlex.split(command)[3:] for _, command in ParsedReport(render_report(paths)).data["commands"]]
    by_name = {command[0]: command for command in commands}
    assert set(by_name) == {"test", "fit", "report", "merge"}
    before = paths.report_path.read_text()
    few = ["--games=1", "--play.max_steps=2", "--trainer.accelerator=cpu", "--model.max_new_tokens=2"]
    assert main([*by_name["test"], *few]) == 0
    assert str(paths.games.games_dir.relative_to(finished_run.working_dir)) in capsys.readouterr().out
    assert ParsedReport(paths.report_path.read_text()).data["play"]["caption"].startswith("1 game on 5")
    assert paths.report_path.read_text() != before
    assert main(by_name["report"]) == 0


def test_tensorboard_holds_every_metric_and_the_texts(finished_run: FinishedRun) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    paths = finished_run.paths
    events = EventAccumulator(str(paths.tensorboard_dir)).Reload()
    with open(paths.metrics_path, newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        names = {name for name in reader.fieldnames or () if name not in ("epoch", "step")}
    assert names <= set(events.Tags()["scalars"])
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses)
    texts = {tag.removesuffix("/text_summary") for tag in events.Tags()["tensors"]}
    assert texts >= {*(f"val/sample_rows/{index}" for index in range(3)), "val/moves", "games/best"}
    (players,) = events.Tensors("final_games/players/text_summary")
    assert "| adapter | base | bfs | random_legal |" in players.tensor_proto.string_val[0].decode()
    assert f"tensorboard --logdir {paths.tensorboard_dir.relative_to(finished_run.working_dir)}" in finished_run.output
