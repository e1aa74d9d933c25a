"""A run that was stopped and goes on ends as the run that was never stopped: bit for bit, on a CPU."""

from __future__ import annotations

import csv
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kill import differences
from snake_lora_pl.__main__ import main
from snake_lora_pl.data.generate import write_dataset
from snake_lora_pl.paths import RunPaths
from snake_lora_pl.training.adapter_checkpoint import AdapterCheckpoint
from snake_lora_pl.training.module import LoRALightningModule

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

RUN_PATTERN = "logs/extensions/models/grid-size-5/llm_finetune_v0.03_*/snake_reasoning"

# A validation after batches 7, 14 and 21 of each epoch, a checkpoint every third step.
BASE = [
    "--data.batch_size=4",
    "--data.val_fraction=0.2",
    "--model.dtype=float32",
    "--model.lora.dropout=0.3",
    "--model.warmup_steps=5",
    "--trainer.limit_val_batches=2",
    "--trainer.limit_train_batches=23",
    "--trainer.val_check_interval=7",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.max_epochs=2",
    "--model.max_new_tokens=2",
    "--checkpoint.save_every_n_steps=3",
]


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def rows_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short rows: some 110 of six games."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_dataset(path, 8, 5, "bfs", "compact", 0)
    return path


@pytest.fixture
def fit(tiny_llama_dir: Path, rows_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Fit in a directory of its own, dying at a batch if told so, and return the run's directory."""
    calls = 0
    last_call = math.inf

    def dying(step: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: LoRALightningModule, batch: dict[str, Any], batch_idx: int) -> Any:
            nonlocal calls
            calls += 1
            if calls == last_call:
                raise Killed
            return step(self, batch, batch_idx)

        return run

    for name in ("training_step", "validation_step"):
        monkeypatch.setattr(LoRALightningModule, name, dying(getattr(LoRALightningModule, name)))

    def run(name: str, *flags: str, die_at: float = math.inf) -> Path:
        nonlocal calls, last_call
        calls, last_call = 0, die_at
        root = tmp_path / name
        root.mkdir(exist_ok=True)
        monkeypatch.chdir(root)
        arguments = ["fit", "--config", "balanced.yaml", *BASE, *flags]
        arguments += [f"--model.base_model={tiny_llama_dir}", f"--data.train_path={rows_path}"]
        if die_at == math.inf:
            assert main(arguments) == 0
        else:
            with pytest.raises(Killed):
                main(arguments)
        (run_dir,) = root.glob(RUN_PATTERN)
        return run_dir

    return run


# The processes die at these batches, counted from where each began, those of validations included; what they trained
# since the last checkpoint is lost each time. Among them are the first batch after a checkpoint, validations, the ends
# of epochs, and the middle of an accumulated step.
@pytest.mark.parametrize(
    ("accumulate", "deaths"), [(1, [6, 6, 7, 13, 5, 20]), (4, [14, 9, 13, 16])], ids=["plain", "accumulated"]
)
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(
    fit: Callable[..., Path], accumulate: int, deaths: list[int]
) -> None:
    settings = [f"--trainer.accumulate_grad_batches={accumulate}", "--play.val_games=2", "--play.max_steps=3"]
    straight = fit("straight", *settings)
    fit("killed", *settings, die_at=deaths[0])
    for die_at in deaths[1:]:
        fit("killed", *settings, "--ckpt_path=last", die_at=die_at)
    killed = fit("killed", *settings, "--ckpt_path=last")
    assert differences(straight, killed) == []


def test_every_checkpoint_of_a_run_goes_on_the_same_also_from_a_directory_that_was_moved(
    fit: Callable[..., Path], tmp_path: Path
) -> None:
    straight = fit("straight", "--data.num_workers=1")
    names = sorted(path.name for path in (straight / "checkpoints").iterdir())
    assert len(names) == 3
    for name in names:
        moved = Path(shutil.copytree(tmp_path / "straight", tmp_path / f"moved-{name}"))
        (run_dir,) = moved.glob(RUN_PATTERN)
        fit(moved.name, f"--ckpt_path={run_dir / 'checkpoints' / name}")
        assert differences(straight, run_dir) == []


def test_a_run_that_had_ended_early_does_not_train_on(
    fit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flags = ["--early_stopping.patience=1", "--early_stopping.min_delta=9"]
    straight = fit("straight", *flags)

    def die(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(AdapterCheckpoint, "on_train_end", die)
        fit("killed", *flags)
    killed = fit("killed", *flags, "--ckpt_path=last")
    assert any("The run had ended" in message for message in caplog.messages)
    assert differences(straight, killed) == []


@pytest.mark.parametrize("validates", [True, False])
def test_more_steps_than_planned_at_first_are_those_of_a_longer_run(fit: Callable[..., Path], validates: bool) -> None:
    # A schedule that depends on the number of steps planned could not be the same.
    flags = ["--model.final_learning_rate_fraction=1", "--model.warmup_steps=0"]
    flags.append(f"--data.val_fraction={0.2 if validates else 0}")
    straight = fit("straight", *flags, "--trainer.max_steps=30")
    fit("stopped", *flags, "--trainer.max_steps=7")
    fit("stopped", *flags, "--trainer.max_steps=25", "--ckpt_path=last")
    stopped = fit("stopped", *flags, "--trainer.max_steps=30", "--ckpt_path=last")
    ends = [torch.load(RunPaths(run).last_checkpoint_path, weights_only=True) for run in (straight, stopped)]
    for name in ("state_dict", "optimizer_states", "loops"):
        assert str(ends[0][name]) == str(ends[1][name]), name
    assert losses(straight) == losses(stopped)
    assert len(losses(straight)) == 30


def losses(run_dir: Path) -> list[str]:
    with open(RunPaths(run_dir).metrics_path, newline="") as file:
        return [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]
