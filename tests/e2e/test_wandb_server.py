"""The W&B overlay against a server that takes what wandb sends: online, and offline with ``wandb sync`` after it."""

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
from snake_lora_pl.reporting import wandb_workspace
from snake_lora_pl.reporting.wandb import RunWandbLogger
from tests.fake_wandb import ENTITY, KEY, FakeWandb, ServedArtifact, ServedRun, serving
from tests.reporting.conftest import WANDB_ARGUMENTS, fit
from tests.reporting.test_wandb import SCALARS

pytestmark = pytest.mark.filterwarnings("ignore")


@dataclasses.dataclass
class Online:
    """A run as the server has it, and as it lies on disk."""

    paths: RunPaths
    printed: str
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
def online(server: FakeWandb, shown_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Online:
    """The run of ``kept_offline`` where there are a key and a server; each prompt ends with a mark of its own."""
    (flag,) = [flag for flag in shown_flags if flag.startswith("--data.train_path=")]
    rows = [json.loads(line) for line in Path(flag.split("=")[1]).read_text().splitlines()]
    directory = tmp_path_factory.mktemp("online")
    for name, number in (("rows", len(rows)), ("val", 12)):
        marked = [{**row, "prompt": f"{row['prompt']}{name}-{i:03}-mark"} for i, row in enumerate(rows[:number])]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in marked))
    data = [f"--data.train_path={directory / 'rows.jsonl'}", f"--data.val_path={directory / 'val.jsonl'}"]
    arguments = [*WANDB_ARGUMENTS, *shown_flags, *data]
    paths, printed = fit(directory, *arguments, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    (run,) = server.runs.values()
    return Online(paths, printed, server, run, b"".join(server.bodies), directory / "rows.jsonl")


@pytest.fixture(scope="module")
def synced(
    server: FakeWandb, kept_offline: tuple[RunPaths, str], tmp_path_factory: pytest.TempPathFactory
) -> ServedRun:
    """The run of ``kept_offline``, sent with the command that it printed."""
    paths, printed = kept_offline
    before = set(server.runs)
    (command,) = re.findall(r"wandb sync \S+", printed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("WANDB_API_KEY", KEY)
        patch.setenv("WANDB_BASE_URL", server.url)
        patch.delenv("WANDB_MODE", raising=False)
        line = [sys.executable, "-m", *shlex.split(command)]
        subprocess.run(line, cwd=paths.run_dir.parents[5], check=True, timeout=120)
    (name,) = set(server.runs) - before
    return server.runs[name]


def artifacts_of(server: FakeWandb, run: ServedRun) -> tuple[ServedArtifact, ServedArtifact]:
    """The artifact that is the run's input, and the adapter that it made."""
    (data,) = [artifact for artifact in server.artifacts if run.name in artifact.used_by]
    (adapter,) = [a for a in server.artifacts if run.name in a.logged_by and a.type != "run_table"]
    return data, adapter


def media(run: ServedRun) -> list[dict[str, Any]]:
    """All that a run logged as a file."""
    return [value for row in run.history for value in row.values() if isinstance(value, dict) and "path" in value]


def without_empty(value: Any) -> Any:
    """A config as wandb sends it: it leaves out a mapping of nothing."""
    if not isinstance(value, dict):
        return value
    return {key: without_empty(item) for key, item in value.items() if item != {}}


def assert_all_is_there(run: ServedRun, paths: RunPaths) -> None:
    """Metrics, config, rows, confusion and games of a run are those that lie on disk."""
    assert run.is_finished
    assert not {name for name in SCALARS if not run.values(name)}
    assert [row["trainer/global_step"] for row in run.history if "train/loss" in row] == [0, 1, 2, 3]
    assert run.summary["train/loss"] == {"min": min(run.values("train/loss"))}
    config = yaml.safe_load(paths.config_path.read_text())
    for group in ("model", "data", "trainer", "play"):
        assert run.config[group] == without_empty(config[group])
    for value in media(run):
        assert hashlib.sha256(run.files[value["path"]]).hexdigest() == value["sha256"]
    validations = list(read_validations(paths.validations_path))
    tables = [json.loads(run.files[value["path"]]) for value in run.values("val/sample_rows")]
    assert [[row[1] for row in table["data"]] for table in tables] == [
        [row["prompt"] for row in validation["rows"]] for validation in validations
    ]
    cells = json.loads(run.files[run.values("val/moves_table")[-1]["path"]])["data"]
    assert [count for _, _, count in cells] == [count for row in validations[-1]["decisions"] for count in row]
    assert {"val/moves", "games/moves", "final_games/moves"} <= set(run.config["_wandb"]["visualize"])
    for name in wandb_workspace.MEDIA:
        assert run.values(name)
    best = run.files[run.values("final_games/best")[0]["path"]].decode()
    assert best == paths.games.replay_path("best", "html").read_text()


def assert_lineage_is_there(server: FakeWandb, run: ServedRun, paths: RunPaths) -> None:
    """The adapter arrived file by file, as made by a run whose input is the rows' artifact; the rows did not."""
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


def test_a_run_arrives_while_it_lasts(online: Online) -> None:
    assert_all_is_there(online.run, online.paths)
    assert_lineage_is_there(online.server, online.run, online.paths)


def test_the_closing_summary_names_the_runs_address(online: Online) -> None:
    assert f"{online.server.url}/{ENTITY}/snake_lora_pl/runs/{online.run.name}\n" in online.printed
    assert "wandb:" not in online.printed  # where W&B speaks for itself


def test_no_rows_but_the_sample_rows_are_sent_and_no_key(online: Online) -> None:
    (validation, *_) = read_validations(online.paths.validations_path)
    shown = {row["prompt"][-len("rows-000-mark") :].lstrip() for row in validation["rows"]}
    sample = {found for text in shown for found in re.findall(r"(?:rows|val)-\d{3}-mark", text)}
    assert len(sample) == 3
    assert {found.decode() for found in re.findall(rb"(?:rows|val)-\d{3}-mark", online.bodies)} == sample
    assert online.rows_path.read_bytes() not in online.bodies
    assert KEY.encode() not in online.bodies


def test_a_run_kept_on_disk_is_sent_by_the_command_it_names(
    server: FakeWandb, online: Online, synced: ServedRun, kept_offline: tuple[RunPaths, str]
) -> None:
    paths, _ = kept_offline
    assert_all_is_there(synced, paths)
    assert_lineage_is_there(server, synced, paths)
    keys = [{key for row in run.history for key in row} for run in (online.run, synced)]
    assert keys[0] == keys[1]
    assert synced.display_name.startswith("balanced+adalora ")


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """W&B finds a key and nothing else of whoever runs the tests."""
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    yield monkeypatch
    wandb.teardown()


def outcome_of(finished: tuple[RunPaths, str]) -> RunOutcome:
    adapter_dir = finished[0].artifacts_dir
    metadata = dataclasses.asdict(store.read_metadata(adapter_dir))
    return RunOutcome(adapter_dir, metadata, [], {"data_hash": metadata["data"]["data_hash"]})


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_the_server_refuses_ends_in_one_line(
    status: int, own_home: pytest.MonkeyPatch, shown_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(status) as server:
        own_home.setenv("WANDB_BASE_URL", server.url)
        own_home.setenv("WANDB_API_KEY", "f" * 40)
        assert main(["fit", *WANDB_ARGUMENTS, *shown_flags]) == 2
        assert not server.runs
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "W&B" in line]
    assert re.match(rf"error: W&B did not begin a run: .*{status}.* Mend the key \(wandb login\)", line)


def test_a_key_that_the_server_takes_no_longer_ends_in_one_line(tmp_path: Path, own_home: pytest.MonkeyPatch) -> None:
    logger = RunWandbLogger(save_dir=str(tmp_path))
    with serving() as server:
        own_home.setenv("WANDB_BASE_URL", server.url)
        server.refused = {"Viewer"}
        with pytest.raises(UserError, match=r"W&B did not begin a run: .*permission denied.*Mend the key"):
            _ = logger.experiment
        assert wandb.run is None


def test_a_key_that_is_none_ends_in_one_line(own_home: pytest.MonkeyPatch) -> None:
    own_home.setenv("WANDB_API_KEY", "short")
    with pytest.raises(UserError, match=r"W&B did not begin a run: .*40\+ characters.*Mend the key"):
        _ = RunWandbLogger().experiment


def test_where_the_server_is_away_the_run_is_kept_on_disk(tmp_path: Path, own_home: pytest.MonkeyPatch) -> None:
    with serving() as server:
        own_home.setenv("WANDB_BASE_URL", server.url)
    logger = RunWandbLogger(save_dir=str(tmp_path))
    logger.log_metrics({"val/loss": 1.0}, step=0)
    assert logger.location.startswith("wandb sync ")
    logger.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_a_run_that_goes_on_goes_on_at_the_server(tmp_path: Path, own_home: pytest.MonkeyPatch) -> None:
    with serving() as server:
        own_home.setenv("WANDB_BASE_URL", server.url)
        for step in range(3):
            logger = RunWandbLogger(save_dir=str(tmp_path))
            logger.log_metrics({"val/loss": 3.0 - step}, step=step)
            logger.finish()
        assert not server.failures
    (run,) = server.runs.values()
    assert run.values("val/loss") == [3.0, 2.0, 1.0]
    assert run.values("_step") == [0, 1, 2]


def test_a_server_lost_on_the_way_ends_nothing(
    tmp_path: Path,
    own_home: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    finished: tuple[RunPaths, str],
) -> None:
    # Long enough for all of it to be in the run's file, which W&B writes every so many seconds. W&B itself would go on
    # for a quarter of an hour, and the test's own limit end it.
    own_home.setattr(wandb_logger, "_SEND_S", 20.0)
    own_home.setattr(wandb.Api, "_HTTP_TIMEOUT", 1)
    with serving() as server:
        own_home.setenv("WANDB_BASE_URL", server.url)
        logger = RunWandbLogger(save_dir=str(tmp_path))
        logger.log_metrics({"val/loss": 1.0}, step=0)
    logger.log_metrics({"val/loss": 0.5}, step=1)
    logger.show_outcome(outcome_of(finished))
    logger.finish()
    assert "W&B: the adapter did not arrive as an artifact of its rows: " in caplog.text
    (command,) = re.findall(r"Send it: (wandb sync .*)", caplog.text)
    with serving() as server:
        own_home.setenv("WANDB_BASE_URL", server.url)
        own_home.chdir(tmp_path)
        subprocess.run([sys.executable, "-m", *shlex.split(command)], check=True, timeout=120)
        (run,) = server.runs.values()
    assert run.values("val/loss") == [1.0, 0.5]
    assert run.is_finished


def test_where_wandb_is_turned_off_nothing_is_written_or_waited_for(
    tmp_path: Path,
    own_home: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    finished: tuple[RunPaths, str],
) -> None:
    own_home.setenv("WANDB_MODE", "disabled")
    logger = RunWandbLogger(save_dir=str(tmp_path))
    logger.show_outcome(outcome_of(finished))
    logger.finish()
    assert not list(tmp_path.rglob("*.wandb"))
    assert "W&B" not in caplog.text


def test_an_artifact_that_the_server_refuses_is_told_and_ends_nothing(
    tmp_path: Path,
    own_home: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    finished: tuple[RunPaths, str],
) -> None:
    with serving() as server:
        own_home.setenv("WANDB_BASE_URL", server.url)
        server.refused = {"CreateArtifact"}
        logger = RunWandbLogger(save_dir=str(tmp_path))
        logger.show_outcome(outcome_of(finished))
        logger.finish()
        (run,) = server.runs.values()
        assert run.is_finished
    assert re.search("W&B: the adapter did not arrive as an artifact of its rows: .*permission denied", caplog.text)


def test_the_layout_of_panels_is_saved(
    server: FakeWandb, own_home: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own_home.setenv("WANDB_BASE_URL", server.url)
    assert wandb_workspace.main(["--entity", ENTITY]) == 0
    printed = capsys.readouterr().out
    (view,) = server.views
    assert (view["entityName"], view["projectName"]) == (ENTITY, "snake_lora_pl")
    assert f"{server.url}/{ENTITY}/snake_lora_pl" in printed
    sections = json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]
    titles = [panel["config"].get("chartTitle") for section in sections for panel in section["panels"]]
    assert [title for plots in wandb_workspace.LINE_PLOTS.values() for title in plots if title not in titles] == []


def test_a_layout_that_the_server_refuses_ends_in_one_line(
    own_home: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ends(with_line: str) -> None:
        with pytest.raises(SystemExit) as caught:
            wandb_workspace.main(["--entity", ENTITY])
        assert caught.value.code == 2
        assert re.fullmatch(rf"error: W&B did not save the layout: .*{with_line}.*\n", capsys.readouterr().err)

    with serving() as server:
        own_home.setenv("WANDB_BASE_URL", server.url)
        server.refused = {"UpsertView2"}
        ends("permission denied")
        own_home.setenv("WANDB_API_KEY", "f" * 40)
        wandb.teardown()
        ends("user is not logged in")
    own_home.delenv("WANDB_API_KEY")
    wandb.teardown()
    ends("No API key configured")
