"""The W&B overlay: what a real fit wrote offline, read back from the run's file."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snake_lora_pl.adapters import store
from snake_lora_pl.evaluation.validations import read_validations
from snake_lora_pl.paths import RunPaths
from snake_lora_pl.reporting import wandb_workspace

pytestmark = pytest.mark.filterwarnings("ignore")

_BLOCK_BYTES = 2**15


def records(path: Path) -> Iterator[Any]:
    """The records of a run's file: LevelDB's log format behind seven bytes of W&B's own, protobuf within."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = path.read_bytes()
    place, parts = 7, []
    while place + 7 <= len(content):
        left = _BLOCK_BYTES - place % _BLOCK_BYTES
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        if kind == 0 or place + 7 + size > len(content):  # not written yet
            return
        parts.append(content[place + 7 : place + 7 + size])
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(b"".join(parts))
            parts = []


class Shown:
    """A run as its file tells it."""

    def __init__(self, run_dir: Path) -> None:
        (self.directory,) = run_dir.glob("wandb/offline-run-*")
        (path,) = self.directory.glob("run-*.wandb")
        self.metrics: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.artifacts: list[Any] = []
        self.is_whole = False
        self.config: dict[str, Any] = {}
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run = record.run
                self._update(record.run.config)
            elif kind == "config":
                self._update(record.config)
            elif kind == "metric":
                self.metrics[record.metric.name or record.metric.glob_name] = record.metric
            elif kind == "history":
                row: dict[str, Any] = {}
                for item in record.history.item:
                    _nest(row, list(item.nested_key) or [item.key], json.loads(item.value_json))
                self.history.append(row)
            elif kind == "exit":
                self.is_whole = True
            elif kind == "artifact":
                self.artifacts.append(record.artifact)
        self.artifacts = [artifact for artifact in self.artifacts if artifact.type != "run_table"]  # W&B's own

    def _update(self, config: Any) -> None:
        for item in config.update:
            _nest(self.config, list(item.nested_key) or [item.key], json.loads(item.value_json))

    def values(self, key: str) -> list[Any]:
        return [row[key] for row in self.history if key in row]

    def file(self, value: dict[str, Any]) -> Path:
        return self.directory / "files" / value["path"]


def _nest(into: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        into = into.setdefault(key, {})
    into[keys[-1]] = value


@pytest.fixture(scope="module")
def display_path(kept_offline: tuple[RunPaths, str]) -> Shown:
    return Shown(kept_offline[0].run_dir)


SCALARS = {
    "train/loss", "train/learning_rate", "train/gradient_norm", "train/rank_budget", "val/loss", "val/perplexity",
    "val/token_accuracy", "val/exact_match", "val/move_accuracy", "val/legal_move_rate", "play/apples_mean",
    "play/apples_median", "play/win_rate", "play/steps_mean", "play/fatal_move_rate", "play/unparseable_rate",
    "play/teacher_agreement", "play/moves_per_second", "perf/tokens_per_second", "perf/target_tokens_per_second",
    "perf/peak_memory_gib", "adapter/weight_norm/layer_00", "adapter/weight_norm/layer_01",
    "adapter/update_norm/layer_00", "adapter/update_norm/layer_01",
}  # fmt: skip


def test_every_scalar_metric_is_there_over_the_steps(shown: Shown) -> None:
    missing = {name for name in SCALARS if not shown.values(name)}
    assert not missing
    assert [row["trainer/global_step"] for row in shown.history if "train/loss" in row] == [0, 1, 2, 3]
    assert all("trainer/global_step" in row for row in shown.history)


def test_metrics_have_axes_and_summaries(shown: Shown) -> None:
    assert shown.metrics["*"].step_metric == "trainer/global_step" or shown.metrics["*"].options.step_sync
    loss, apples = shown.metrics["val/loss"], shown.metrics["play/apples_mean"]
    assert loss.summary.min
    assert apples.summary.max
    assert shown.metrics["perf/peak_memory_gib"].summary.max


def test_the_resolved_config_is_there(kept_offline: tuple[RunPaths, str], shown: Shown) -> None:
    import yaml

    paths, _ = kept_offline
    config = yaml.safe_load(paths.config_path.read_text())
    for group in ("model", "data", "trainer", "play"):
        assert shown.config[group] == json.loads(json.dumps(config[group]))


def test_the_run_is_named_by_preset_base_kind_and_time(kept_offline: tuple[RunPaths, str], shown: Shown) -> None:
    paths, _ = kept_offline
    base = Path(shown.config["model"]["base_model"]).name
    started = paths.run_dir.parent.name.removeprefix("llm_finetune_v0.03_")
    assert shown.run.display_name == f"balanced+adalora {base} adalora {started}"


def test_sample_rows_are_a_table_at_each_validation(kept_offline: tuple[RunPaths, str], shown: Shown) -> None:
    paths, _ = kept_offline
    tables = [json.loads(shown.file(value).read_text()) for value in shown.values("val/sample_rows")]
    wanted = list(read_validations(paths.validations_path))
    assert len(tables) == len(wanted) == 2
    for table, validation in zip(tables, wanted, strict=True):
        rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        for key, column in (("prompt", "prompt"), ("teacher", "teacher's words"), ("words", "model's words")):
            assert [row[column] for row in rows] == [row[key] for row in validation["rows"]]
        assert {row["right"] for row in rows} <= {"yes", "no"}
        assert {"legal", "claims right", "claims wrong"} <= set(table["columns"])


def test_the_confusion_of_moves_is_the_one_in_the_report(kept_offline: tuple[RunPaths, str], shown: Shown) -> None:
    paths, _ = kept_offline
    (*_, last) = shown.values("val/moves_table")
    cells = json.loads(shown.file(last).read_text())["data"]
    (*_, validation) = read_validations(paths.validations_path)
    assert [count for _, _, count in cells] == [count for row in validation["decisions"] for count in row]
    assert "val/moves" in shown.config["_wandb"]["visualize"]


def test_games_are_pages_and_videos_with_the_models_words(kept_offline: tuple[RunPaths, str], shown: Shown) -> None:
    paths, _ = kept_offline
    for prefix, times in (("games", 2), ("final_games", 1)):
        for which in ("best", "median", "worst"):
            pages, videos = shown.values(f"{prefix}/{which}"), shown.values(f"{prefix}/{which}_video")
            assert len(pages) == len(videos) == times
            assert shown.file(videos[-1]).read_bytes()[:4] == b"GIF8"
    page = shown.file(shown.values("final_games/best")[0]).read_text()
    assert page == paths.games.replay_path("best", "html").read_text()
    (players,) = shown.values("final_games/players")
    table = json.loads(shown.file(players).read_text())
    assert table["columns"] == ["", "adapter", "base", "bfs", "random_legal"]


def test_the_adapter_is_an_artifact_made_from_its_rows(kept_offline: tuple[RunPaths, str], shown: Shown) -> None:
    paths, _ = kept_offline
    data, adapter = shown.artifacts
    assert (data.type, adapter.type) == ("dataset", "model")
    assert data.use_after_commit  # an input of the run
    assert not adapter.use_after_commit
    metadata = store.verify(paths.artifacts_dir)
    assert json.loads(data.metadata)["data_hash"] == metadata.data["data_hash"]
    assert json.loads(adapter.metadata)["weights_sha256"] == metadata.weights_sha256
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {entry.path for entry in adapter.manifest.contents}
    (rows,) = data.manifest.contents
    assert rows.ref.endswith("/rows.jsonl")
    assert not rows.local_path  # noted by its hash, not sent


def test_the_run_says_how_to_send_it_and_leaves_nothing_open(kept_offline: tuple[RunPaths, str], shown: Shown) -> None:
    import wandb

    paths, printed = kept_offline
    assert f"wandb sync {shown.directory.relative_to(paths.run_dir.parents[5])}" in printed
    assert "wandb:" not in printed  # where W&B speaks for itself
    assert wandb.run is None
    assert shown.is_whole


def test_a_server_that_cannot_be_reached_is_waited_for_a_moment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    from snake_lora_pl.reporting.wandb import RunWandbLogger

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "https://localhost:9")
    tried = []

    def refuse(address: tuple[str, int], timeout: float) -> None:
        tried.append((*address, timeout))
        raise OSError("unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    assert RunWandbLogger()._chosen_mode() == "offline"
    assert tried == [("localhost", 9, 3.0)]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert RunWandbLogger()._chosen_mode() is None
    wandb.teardown()


def test_the_saved_dashboard_shows_what_a_run_logs(shown: Shown, capsys: pytest.CaptureFixture[str]) -> None:
    assert wandb_workspace.main(["--entity", "someone", "--json"]) == 0
    view = json.loads(capsys.readouterr().out)
    assert (view["entity"], view["project"]) == ("someone", "snake_lora_pl")
    drawn = {name for plots in wandb_workspace.LINE_PLOTS.values() for names in plots.values() for name in names}
    assert not {name for name in drawn if not shown.values(name)} - {"val/decision_accuracy", "play/optimal_agreement"}
    assert not [name for name in wandb_workspace.MEDIA if not shown.values(name)]
    text = json.dumps(view)
    assert all(json.dumps(name)[1:-1] in text for name in drawn | set(wandb_workspace.MEDIA))
    for prefix in wandb_workspace.GROUPS.values():
        assert any(name.startswith(prefix) for row in shown.history for name in row)
        assert prefix in text
