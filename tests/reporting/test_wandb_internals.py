"""Tests that fail when a private name of W&B is no longer needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from wandb.errors import CommError

from snake_lora_pl.reporting.wandb_internals import api_errors, check_api_key, declare_input_artifact
from tests.fake_wandb import KEY, FakeWandb, serving

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandb]:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HOME", str(tmp_path))
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        yield server
        wandb.teardown()


def test_init_does_not_check_the_key_itself(server: FakeWandb, tmp_path: Path) -> None:
    with wandb.init(project="p", dir=tmp_path, settings=wandb.Settings(silent=True, console="off")) as run:
        server.refused = {"Viewer"}
        with pytest.raises(CommError, match="Viewer"):
            check_api_key(run)


def test_use_artifact_refuses_an_offline_run(tmp_path: Path) -> None:
    with wandb.init(project="p", dir=tmp_path, settings=wandb.Settings(silent=True, console="off")) as run:
        artifact = wandb.Artifact("rows", type="dataset")
        with pytest.raises(TypeError, match="offline"):
            run.use_artifact(artifact)
        declare_input_artifact(run, artifact)
    wandb.teardown()


def test_errors_of_the_api_have_no_public_name() -> None:
    names = {error.__name__ for error in api_errors()}
    assert names >= {"Error", "WandbApiFailedError"}
    assert not hasattr(wandb, "WandbApiFailedError")
    assert not hasattr(wandb.errors, "WandbApiFailedError")
