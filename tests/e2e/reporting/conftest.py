"""Finished runs, shared by all tests of reports and dashboards."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import NamedTuple

import pytest

from snake_lora_pl.__main__ import main
from snake_lora_pl.data.generated_rows import write_dataset
from snake_lora_pl.paths import RunPaths
from tests.reporting.conftest import HTML_INJECTION
from tests.small_run import small_run

WANDB_FLAGS = [*(f"--config={name}.yaml" for name in ("balanced", "adalora", "wandb")), "--model.lora.rank=2"]


class FinishedRun(NamedTuple):
    """A run directory and the output of the command that wrote it.

    Attributes:
        paths: Paths of the run directory.
        output: Text that the command printed.
        working_dir: Working directory of the command.
    """

    paths: RunPaths
    output: str
    working_dir: Path


@pytest.fixture(scope="session")
def run_flags(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a small run that uses every part of a report: rows with claims, games in training and at the end."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_dataset(path, 4, 5, "bfs", "bfs-512", seed=0)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    val_path = path.with_name("val.jsonl")
    rows[0]["prompt"] += HTML_INJECTION
    val_path.write_text("".join(json.dumps(row) + "\n" for row in rows[:12]))
    return small_run(
        tiny_llama_dir,
        path,
        f"--data.val_path={val_path}",
        "--data.max_length=1400",
        "--data.batch_size=2",
        "--model.max_new_tokens=6",
        "--trainer.limit_train_batches=2",
        "--trainer.max_epochs=2",
        "--trainer.val_check_interval=1.0",
        "--trainer.enable_progress_bar=false",
        "--num_sample_rows=3",
        "--play.max_steps=3",
        "--play.val_games=2",
        "--play.final_games=3",
    )


def fit(directory: Path, *arguments: str, **environment: str) -> FinishedRun:
    """Run ``fit`` in a directory, without the W&B configuration of the user who runs the tests."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        patch.setenv("SNAKE_LORA_PL_CACHE", str(directory / "cache"))
        patch.setenv("HOME", str(directory))
        for name in ("CONFIG", "CACHE", "DATA"):
            patch.setenv(f"WANDB_{name}_DIR", str(directory / name.lower()))
        for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.chdir(directory)
        assert main(["fit", *arguments]) == 0
        assert "WANDB_SERVICE" not in os.environ
    (run_dir,) = directory.glob("logs/extensions/models/grid-size-5/llm_finetune_v0.03_*/snake_reasoning")
    return FinishedRun(RunPaths(run_dir), out.getvalue(), directory)


@pytest.fixture(scope="session")
def finished_run(run_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A run of four steps with TensorBoard."""
    return fit(tmp_path_factory.mktemp("finished"), "--config=balanced.yaml", "--config=tensorboard.yaml", *run_flags)


@pytest.fixture(scope="session")
def offline_run(run_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """An AdaLoRA run of four steps with W&B, without an API key."""
    return fit(tmp_path_factory.mktemp("wandb"), *WANDB_FLAGS, *run_flags)
