"""The W&B logger with a fake server: online, offline with ``wandb sync``, and with errors of the server."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml

from snake_lora_pl.__main__ import main
from snake_lora_pl.adapters import store
from snake_lora_pl.errors import UserError
from snake_lora_pl.evaluation.dashboard import RunOutcome
from snake_lora_pl.evaluation.validations import read_validations
from snake_lora_pl.paths import RunPaths
from snake_lora_pl.reporting import wandb as wandb_logger
from snake_lora_pl.reporting.wandb import RunWandbLogger
from tests.e2e.reporting.conftest import WANDB_FLAGS, FinishedRun, fit
from tests.e2e.reporting.test_wandb_offline import SCALARS
from tests.fake_wandb import ENTITY, KEY, FakeWandb, ServedArtifact, ServedRun, serving

pytestmark = pytest.mark.filterwarnings("ignore")


REPLAYS = [f"{prefix}/{which}" for prefix in ("games", "final_games") for which in ("best", "median", "worst")]


@dataclasses.dataclass
class OnlineRun:
    """A run directory and what the server received of the run."""

    finished: FinishedRun
    server: FakeWandb
    run: ServedRun
    bodies: bytes
    rows_path: Path


@pytest.fixture(scope="module")
def server() -> Iterator[FakeWandb]:
    with serving() as server:
        yield server
        assert not server.failures


@pytest.fixture(scope="module")
def online_run(server: FakeWandb, run_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> OnlineRun:
    """The run of ``offline_run`` with an API key and a server. Each prompt ends with a unique mark."""
    (flag,) = [flag for flag in run_flags if flag.startswith("--data.train_path=")]
    rows = [json.loads(line) for line in Path(flag.split("=")[1]).read_text().splitlines()]
    directory = tmp_path_factory.mktemp("online")
    for name, number in (("rows", len(rows)), ("val", 12)):
        marked = [{**row, "prompt": f"{row['prompt']}{name}-{i:03}-mark"} for i, row in enumerate(rows[:number])]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in marked))
    data = [f"--data.train_path={directory / 'rows.jsonl'}", f"--data.val_path={directory / 'val.jsonl'}"]
    finished = fit(directory, *WANDB_FLAGS, *run_flags, *data, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    (run,) = server.runs.values()
    return OnlineRun(finished, server, run, b"".join(server.bodies), directory / "rows.jsonl")


@pytest.fixture(scope="module")
def synced_run(server: FakeWandb, offline_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> ServedRun:
    """The run of ``offline_run``, sent with the command that it printed."""
    before = set(server.runs)
    (command,) = re.findall(r"wandb sync \S+", offline_run.output)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("WANDB_API_KEY", KEY)
        patch.setenv("WANDB_BASE_URL", server.url)
        patch.delenv("WANDB_MODE", raising=False)
        line = [sys.executable, "-m", *shlex.split(command)]
        subprocess.run(line, cwd=offline_run.working_dir, check=True, timeout=120)
    (name,) = set(server.runs) - before
    return server.runs[name]


def artifacts_of(server: FakeWandb, run: ServedRun) -> tuple[ServedArtifact, ServedArtifact]:
    """Return the input artifact and the adapter artifact of a run."""
    (data,) = [artifact for artifact in server.artifacts if run.name in artifact.used_by]
    (adapter,) = [a for a in server.artifacts if run.name in a.logged_by and a.type != "run_table"]
    return data, adapter


def logged_files(run: ServedRun) -> list[dict[str, Any]]:
    """Return the references to all files that a run logged."""
    return [value for row in run.history for value in row.values() if isinstance(value, dict) and "path" in value]


def without_empty(value: Any) -> Any:
    """Drop empty mappings from a config, as wandb does."""
    if not isinstance(value, dict):
        return value
    return {key: without_empty(item) for key, item in value.items() if item != {}}


def assert_run_is_complete(run: ServedRun, paths: RunPaths) -> None:
    """Compare metrics, config, sample rows, confusion matrix and games with the run directory."""
    assert run.is_finished
    assert not {name for name in SCALARS if not run.values(name)}
    assert [row["trainer/global_step"] for row in run.history if "train/loss" in row] == [0, 1, 2, 3]
    assert run.summary["train/loss"] == {"min": min(run.values("train/loss"))}
    config = yaml.safe_load(paths.config_path.read_text())
    for group in ("model", "data", "trainer", "play"):
        assert run.config[group] == without_empty(config[group])
    for value in logged_files(run):
        assert hashlib.sha256(run.files[value["path"]]).hexdigest() == value["sha256"]
    validations = list(read_validations(paths.validations_path))
    tables = [json.loads(run.files[value["path"]]) for value in run.values("val/sample_rows")]
    assert [[row[1] for row in table["data"]] for table in tables] == [
        [row["prompt"] for row in validation["rows"]] for validation in validations
    ]
    cells = json.loads(run.files[run.values("val/moves_table")[-1]["path"]])["data"]
    assert [count for _, _, count in cells] == [count for row in validations[-1]["decisions"] for count in row]
    assert {"val/moves", "games/moves", "final_games/moves"} <= set(run.config["_wandb"]["visualize"])
    for name in REPLAYS:
        assert run.values(name)
        assert run.values(f"{name}_video")
    best = run.files[run.values("final_games/best")[0]["path"]].decode()
    assert best == paths.games.replay_path("best", "html").read_text()


def assert_lineage_is_complete(server: FakeWandb, run: ServedRun, paths: RunPaths) -> None:
    """Check that all adapter files were uploaded, and that the data artifact is an input without uploaded rows."""
    data, adapter = artifacts_of(server, run)
    assert (data.type, adapter.type, sorted(adapter.aliases)) == ("dataset", "model", ["best", "latest"])
    assert data.is_committed
    assert adapter.is_committed
    on_disk = {str(p.relative_to(paths.artifacts_dir)): p for p in paths.artifacts_dir.rglob("*") if p.is_file()}
    assert adapter.files == {name: path.read_bytes() for name, path in on_disk.items()}
    metadata = store.verify(paths.artifacts_dir)
    assert adapter.metadata["weights_sha256"] == metadata.weights_sha256
    assert data.metadata["data_hash"] == metadata.data["data_hash"]
    assert data.files == {}
    (entry,) = data.manifest.values()
    assert entry["ref"].endswith("/rows.jsonl")


def test_online_run_is_sent_completely(online_run: OnlineRun) -> None:
    assert_run_is_complete(online_run.run, online_run.finished.paths)
    assert_lineage_is_complete(online_run.server, online_run.run, online_run.finished.paths)


def test_fit_prints_the_url_of_the_run(online_run: OnlineRun) -> None:
    assert f"{online_run.server.url}/{ENTITY}/snake_lora_pl/runs/{online_run.run.name}\n" in online_run.finished.output
    assert "wandb:" not in online_run.finished.output  # prefix of W&B's own messages


def test_only_sample_rows_are_sent_and_no_key(online_run: OnlineRun) -> None:
    (validation, *_) = read_validations(online_run.finished.paths.validations_path)
    shown = {row["prompt"][-len("rows-000-mark") :].lstrip() for row in validation["rows"]}
    sample = {found for text in shown for found in re.findall(r"(?:rows|val)-\d{3}-mark", text)}
    assert len(sample) == 3
    assert {found.decode() for found in re.findall(rb"(?:rows|val)-\d{3}-mark", online_run.bodies)} == sample
    assert online_run.rows_path.read_bytes() not in online_run.bodies
    assert KEY.encode() not in online_run.bodies


def test_offline_run_is_sent_by_the_printed_command(
    server: FakeWandb, online_run: OnlineRun, synced_run: ServedRun, offline_run: FinishedRun
) -> None:
    assert_run_is_complete(synced_run, offline_run.paths)
    assert_lineage_is_complete(server, synced_run, offline_run.paths)
    online_keys, synced_keys = ({key for row in run.history for key in row} for run in (online_run.run, synced_run))
    assert online_keys == synced_keys
    assert synced_run.display_name.startswith("balanced+adalora ")


@pytest.fixture
def wandb_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An API key, and no other W&B configuration of the user who runs the tests."""
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    yield monkeypatch
    wandb.teardown()


def outcome_of(finished_run: FinishedRun) -> RunOutcome:
    adapter_dir = finished_run.paths.artifacts_dir
    metadata = dataclasses.asdict(store.read_metadata(adapter_dir))
    return RunOutcome(adapter_dir, metadata, [], {"data_hash": metadata["data"]["data_hash"]})


@pytest.mark.parametrize("status", [401, 403])
def test_rejected_key_is_a_one_line_error(
    status: int, wandb_home: pytest.MonkeyPatch, run_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(status) as server:
        wandb_home.setenv("WANDB_BASE_URL", server.url)
        wandb_home.setenv("WANDB_API_KEY", "f" * 40)
        assert main(["fit", *WANDB_FLAGS, *run_flags]) == 2
        assert not server.runs
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "W&B" in line]
    assert re.match(rf"error: .*{status}.*wandb login", line)


def test_key_rejected_after_the_start_is_a_one_line_error(tmp_path: Path, wandb_home: pytest.MonkeyPatch) -> None:
    logger = RunWandbLogger(save_dir=str(tmp_path))
    with serving() as server:
        wandb_home.setenv("WANDB_BASE_URL", server.url)
        server.refused = {"Viewer"}
        with pytest.raises(UserError, match="permission denied.*wandb login"):
            _ = logger.experiment
        assert wandb.run is None


def test_malformed_key_is_a_one_line_error(wandb_home: pytest.MonkeyPatch) -> None:
    wandb_home.setenv("WANDB_API_KEY", "short")
    with pytest.raises(UserError, match=r"40\+ characters.*wandb login"):
        _ = RunWandbLogger().experiment


def test_unreachable_server_stores_the_run_on_disk(tmp_path: Path, wandb_home: pytest.MonkeyPatch) -> None:
    with serving() as server:
        wandb_home.setenv("WANDB_BASE_URL", server.url)
    logger = RunWandbLogger(save_dir=str(tmp_path))
    logger.log_metrics({"val/loss": 1.0}, step=0)
    assert logger.location.startswith("wandb sync ")
    logger.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_resumed_run_continues_the_same_run_on_the_server(tmp_path: Path, wandb_home: pytest.MonkeyPatch) -> None:
    with serving() as server:
        wandb_home.setenv("WANDB_BASE_URL", server.url)
        for step in range(3):
            logger = RunWandbLogger(save_dir=str(tmp_path))
            logger.log_metrics({"val/loss": 3.0 - step}, step=step)
            logger.finish()
        assert not server.failures
    (run,) = server.runs.values()
    assert run.values("val/loss") == [3.0, 2.0, 1.0]
    assert run.values("_step") == [0, 1, 2]


def test_server_lost_during_a_run_is_a_warning(
    tmp_path: Path, wandb_home: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, finished_run: FinishedRun
) -> None:
    wandb_home.setattr(wandb_logger, "_FINISH_TIMEOUT_S", 5.0)
    wandb_home.setattr(wandb_logger, "_GRAPHQL_RETRIES", 2)
    wandb_home.setattr(wandb.Api, "_HTTP_TIMEOUT", 1)
    with serving() as server:
        wandb_home.setenv("WANDB_BASE_URL", server.url)
        logger = RunWandbLogger(save_dir=str(tmp_path))
        logger.log_metrics({"val/loss": 1.0}, step=0)
    logger.log_metrics({"val/loss": 0.5}, step=1)
    logger.show_outcome(outcome_of(finished_run))
    logger.finish()
    assert "W&B: the adapter artifact was not uploaded" in caplog.text
    (command,) = re.findall(r"(wandb sync .*)", caplog.text)
    with serving() as server:
        wandb_home.setenv("WANDB_BASE_URL", server.url)
        wandb_home.chdir(tmp_path)
        subprocess.run([sys.executable, "-m", *shlex.split(command)], check=True, timeout=120)
        (run,) = server.runs.values()
    assert run.values("val/loss") == [1.0, 0.5]
    assert run.is_finished


def test_disabled_wandb_writes_nothing(
    tmp_path: Path, wandb_home: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, finished_run: FinishedRun
) -> None:
    wandb_home.setenv("WANDB_MODE", "disabled")
    logger = RunWandbLogger(save_dir=str(tmp_path))
    logger.show_outcome(outcome_of(finished_run))
    logger.finish()
    assert not list(tmp_path.rglob("*.wandb"))
    assert "W&B" not in caplog.text


def test_artifact_rejected_by_the_server_is_a_warning(
    tmp_path: Path, wandb_home: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, finished_run: FinishedRun
) -> None:
    with serving() as server:
        wandb_home.setenv("WANDB_BASE_URL", server.url)
        server.refused = {"CreateArtifact"}
        logger = RunWandbLogger(save_dir=str(tmp_path))
        logger.show_outcome(outcome_of(finished_run))
        logger.finish()
        (run,) = server.runs.values()
        assert run.is_finished
    assert re.search("W&B: .*artifact.*permission denied", caplog.text)
