"""``memory``: the options of ``fit``, and an estimate that follows them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snake_lora_pl.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def arguments(bfs512_sample_path: Path, tiny_llama_dir: Path) -> list[str]:
    return [
        "memory", "--config", "balanced.yaml", f"--data.train_path={bfs512_sample_path}", "--data.max_length=1200",
        f"--model.base_model={tiny_llama_dir}", "--trainer.accelerator=cpu",
    ]  # fmt: skip


@pytest.fixture
def estimate(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Run the command with further options and ``--json``; return what it printed."""

    def run(*options: str) -> dict[str, Any]:
        assert main([*arguments, *options, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.mark.e2e
def test_estimate_follows_the_options_of_fit_and_writes_nothing(
    estimate: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    four = estimate("--data.batch_size", "4")
    assert four["rows"] == 4
    assert four["total_bytes"] == sum(four["parts_bytes"].values())
    eight = estimate("--data.batch_size=8")
    assert eight["parts_bytes"]["activations"] == pytest.approx(2 * four["parts_bytes"]["activations"], rel=0.1)
    wider = estimate("--data.batch_size=4", "--model.lora.rank=32")
    assert wider["parts_bytes"]["optimizer"] == 2 * four["parts_bytes"]["optimizer"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("free_bytes", "fits"), [(2**40, True), (2**20, False)])
@pytest.mark.e2e
def test_estimate_is_compared_with_free_memory(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], free_bytes: int,
    fits: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr("snake_lora_pl.cli.commands.memory.available_bytes", lambda device: free_bytes)
    assert main([*arguments, "--data.batch_size=2"]) == 0
    printed = capsys.readouterr().out
    assert f"{free_bytes / 2**30:.2f} GiB" in printed
    assert ("--data.batch_size=auto" in printed) == (not fits)
    assert "2 longest rows" in printed


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--data.batch_sise=2"], "'data.batch_size'"),
        (["--data.batch_size=auto"], "data.batch_size=auto"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_user_error_is_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str], options: list[str], part: str
) -> None:
    assert main([*arguments, *options]) == 2
    assert part in capsys.readouterr().err.splitlines()[-1]
