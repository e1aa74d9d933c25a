"""Records of the W&B logger in the offline run file."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import wandb

from snake_lora_pl.paths import RunPaths
from snake_lora_pl.reporting.wandb import STEP, RunWandbLogger
from tests.reporting.conftest import HTML_INJECTION, SyntheticResults
from tests.wandb_run_file import WandbRunFile

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def run_file(results: SyntheticResults, tmp_path_factory: pytest.TempPathFactory) -> WandbRunFile:
    paths = RunPaths(tmp_path_factory.mktemp("run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        logger = RunWandbLogger()
        logger.attach(paths, "the name")
        logger.log_metrics({"val/loss": 1.5}, step=0)
        logger.show_validation(results.validation)
        logger.show_games(results.players[0], 900, is_final=True)
        logger.show_outcome(results.outcome)
        assert "wandb sync" in logger.location
        logger.finish()
    assert wandb.run is None
    return WandbRunFile(paths.run_dir)


def test_run_is_complete_and_has_its_name(run_file: WandbRunFile) -> None:
    assert run_file.is_complete
    assert run_file.run.display_name == "the name"


def test_metrics_have_step_axis_and_summaries(run_file: WandbRunFile) -> None:
    assert run_file.metrics["*"].step_metric == STEP or run_file.metrics["*"].options.step_sync
    assert run_file.metrics["val/loss"].summary.min
    assert run_file.metrics["play/apples_mean"].summary.max
    assert run_file.metrics["perf/peak_memory_gib"].summary.max
    assert run_file.values("val/loss") == [1.5]


def test_sample_rows_are_a_table(run_file: WandbRunFile) -> None:
    (value,) = run_file.values("val/sample_rows")
    table = json.loads(run_file.file(value).read_text())
    first, second, *_ = (dict(zip(table["columns"], row, strict=True)) for row in table["data"])
    assert (first["source"], first["right move"], first["legal move"]) == ("rows.jsonl:1", "yes", "yes")
    assert (second["model's completion"], second["right move"]) == (HTML_INJECTION, "no")


def test_confusion_matrix_is_a_chart(run_file: WandbRunFile, results: SyntheticResults) -> None:
    (value,) = run_file.values("val/moves_table")
    cells = json.loads(run_file.file(value).read_text())["data"]
    assert results.validation.decisions is not None
    assert [count for _, _, count in cells] == [count for row in results.validation.decisions for count in row]
    assert "val/moves" in run_file.config["_wandb"]["visualize"]


def test_games_are_html_replays_and_videos(run_file: WandbRunFile) -> None:
    for which in ("best", "median", "worst"):
        (replay,), (video,) = run_file.values(f"final_games/{which}"), run_file.values(f"final_games/{which}_video")
        assert "<html" in run_file.file(replay).read_text()
        assert run_file.file(video).read_bytes()[:4] == b"GIF8"
    (players,) = run_file.values("final_games/players")
    assert json.loads(run_file.file(players).read_text())["columns"] == ["", "adapter", "random_legal"]


def test_adapter_is_an_artifact_with_the_data_as_input(run_file: WandbRunFile) -> None:
    data, adapter = run_file.artifacts
    assert (data.name, data.type, adapter.type) == ("rows-0123456789ab", "dataset", "model")
    assert data.use_after_commit  # an input of the run
    assert not adapter.use_after_commit
    assert {entry.path for entry in adapter.manifest.contents} == {"adapter_model.safetensors", "adapter_config.json"}
    (rows,) = data.manifest.contents
    assert rows.ref.endswith("/rows.jsonl")
    assert not rows.local_path  # referenced by its hash, not uploaded


def test_unreachable_server_makes_the_run_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "https://localhost:9")
    attempts = []

    def refuse(address: tuple[str, int], timeout: float) -> None:
        attempts.append((*address, timeout))
        raise OSError("unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    assert RunWandbLogger()._choose_mode() == "offline"
    assert attempts == [("localhost", 9, 3.0)]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert RunWandbLogger()._choose_mode() is None
    wandb.teardown()


def test_run_id_is_kept_for_a_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    versions = []
    for _ in range(2):
        logger = RunWandbLogger(save_dir=str(tmp_path))
        versions.append((logger.experiment, (tmp_path / "wandb" / "run_id").read_text()))
        logger.finish()
    assert versions[0][1] == versions[1][1]
