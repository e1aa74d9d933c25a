"""The run file that W&B writes offline during a real run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import wandb
import yaml

from snake_lora_pl.adapters import store
from snake_lora_pl.evaluation.validations import read_validations
from tests.e2e.reporting.conftest import FinishedRun
from tests.wandb_run_file import WandbRunFile

pytestmark = pytest.mark.filterwarnings("ignore")

SCALARS = {
    "train/loss", "train/learning_rate", "train/gradient_norm", "train/rank_budget", "val/loss", "val/perplexity",
    "val/token_accuracy", "val/exact_match", "val/move_accuracy", "val/legal_move_rate", "play/apples_mean",
    "play/apples_median", "play/win_rate", "play/steps_mean", "play/fatal_move_rate", "play/unparseable_rate",
    "play/teacher_agreement", "play/moves_per_second", "perf/tokens_per_second", "perf/target_tokens_per_second",
    "perf/peak_memory_gib", "adapter/weight_norm/layer_00", "adapter/weight_norm/layer_01",
    "adapter/update_norm/layer_00", "adapter/update_norm/layer_01",
}  # fmt: skip


@pytest.fixture(scope="module")
def run_file(offline_run: FinishedRun) -> WandbRunFile:
    return WandbRunFile(offline_run.paths.run_dir)


def test_every_metric_is_logged_over_steps(run_file: WandbRunFile) -> None:
    assert not {name for name in SCALARS if not run_file.values(name)}
    assert [row["trainer/global_step"] for row in run_file.history if "train/loss" in row] == [0, 1, 2, 3]
    assert all("trainer/global_step" in row for row in run_file.history)


def test_resolved_config_is_logged(offline_run: FinishedRun, run_file: WandbRunFile) -> None:
    config = yaml.safe_load(offline_run.paths.config_path.read_text())
    for group in ("model", "data", "trainer", "play"):
        assert run_file.config[group] == json.loads(json.dumps(config[group]))


def test_run_name_has_preset_base_model_adapter_type_and_start_time(
    offline_run: FinishedRun, run_file: WandbRunFile
) -> None:
    base = Path(run_file.config["model"]["base_model"]).name
    started = offline_run.paths.run_dir.parent.name.removeprefix("llm_finetune_v0.03_")
    assert run_file.run.display_name == f"balanced+adalora {base} adalora {started}"


def test_sample_rows_are_a_table_at_each_validation(offline_run: FinishedRun, run_file: WandbRunFile) -> None:
    tables = [json.loads(run_file.file(value).read_text()) for value in run_file.values("val/sample_rows")]
    expected = list(read_validations(offline_run.paths.validations_path))
    assert len(tables) == len(expected) == 2
    for table, validation in zip(tables, expected, strict=True):
        for column, key in ((1, "prompt"), (2, "teacher"), (3, "words")):
            assert [row[column] for row in table["data"]] == [row[key] for row in validation["rows"]]


def test_confusion_matrix_equals_the_one_in_the_run_directory(offline_run: FinishedRun, run_file: WandbRunFile) -> None:
    (*_, last) = run_file.values("val/moves_table")
    cells = json.loads(run_file.file(last).read_text())["data"]
    (*_, validation) = read_validations(offline_run.paths.validations_path)
    assert [count for _, _, count in cells] == [count for row in validation["decisions"] for count in row]


def test_games_are_html_replays_and_videos(offline_run: FinishedRun, run_file: WandbRunFile) -> None:
    for prefix, num_times in (("games", 2), ("final_games", 1)):
        for which in ("best", "median", "worst"):
            assert len(run_file.values(f"{prefix}/{which}")) == num_times
            assert len(run_file.values(f"{prefix}/{which}_video")) == num_times
    replay = run_file.file(run_file.values("final_games/best")[0]).read_text()
    assert replay == offline_run.paths.games.replay_path("best", "html").read_text()


def test_adapter_is_an_artifact_with_its_data_as_input(offline_run: FinishedRun, run_file: WandbRunFile) -> None:
    data, adapter = run_file.artifacts
    assert (data.type, adapter.type) == ("dataset", "model")
    assert data.use_after_commit  # an input of the run
    assert not adapter.use_after_commit
    metadata = store.verify(offline_run.paths.artifacts_dir)
    assert json.loads(data.metadata)["data_hash"] == metadata.data["data_hash"]
    assert json.loads(adapter.metadata)["weights_sha256"] == metadata.weights_sha256


def test_fit_prints_the_sync_command_and_closes_the_run(offline_run: FinishedRun, run_file: WandbRunFile) -> None:
    assert f"wandb sync {run_file.directory.relative_to(offline_run.working_dir)}" in offline_run.output
    assert "wandb:" not in offline_run.output  # prefix of W&B's own messages
    assert wandb.run is None
    assert run_file.is_complete
