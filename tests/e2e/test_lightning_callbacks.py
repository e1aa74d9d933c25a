"""Callbacks, loggers and flags of Lightning on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from snake_lora_pl.__main__ import main
from snake_lora_pl.adapters import store
from snake_lora_pl.cli.app import SnakeCLI
from snake_lora_pl.data.generated_rows import write_dataset
from snake_lora_pl.paths import RunPaths
from tests.small_run import small_run

pytestmark = pytest.mark.filterwarnings("ignore")

Fit = Callable[..., RunPaths]


def callback(name: str, **init_args: object) -> str:
    spec = {"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": init_args}
    return f"--trainer.callbacks={json.dumps([spec])}"


@pytest.fixture
def flags(tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options of a run of four steps in the working directory."""
    monkeypatch.chdir(tmp_path)
    rows_path = tmp_path / "rows.jsonl"
    write_dataset(rows_path, 4, 5, "bfs", "compact", 0)
    few = ["--trainer.max_steps=4", "--trainer.val_check_interval=2", "--trainer.limit_train_batches=6"]
    few += ["--num_sample_rows=0", "--play.final_games=0", "--trainer.enable_progress_bar=false"]
    return small_run(tiny_llama_dir, rows_path, *few)


@pytest.fixture
def fit(flags: list[str], tmp_path: Path) -> Fit:
    def run(*more: str) -> RunPaths:
        assert main(["fit", *flags, *more]) == 0
        (run_dir,) = tmp_path.glob("logs/extensions/models/grid-size-5/*/snake_reasoning")
        return RunPaths(run_dir)

    return run


def test_model_checkpoint_keeps_its_files_apart_and_its_config_serves_every_command(
    fit: Fit, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(callback("ModelCheckpoint", save_last=True, save_top_k=-1, every_n_train_steps=1))
    own = {path.name for path in run.checkpoints_dir.iterdir()}
    assert own == {"epoch=0-step=2.ckpt", "epoch=0-step=4.ckpt", "last.ckpt"}
    others = {path.name for path in (run.run_dir / "model_checkpoints").iterdir()}
    assert others == {"last.ckpt", *(f"epoch=0-step={step}.ckpt" for step in (1, 2, 3, 4))}
    config, adapter = f"--config={run.config_path}", f"--adapter={run.artifacts_dir}"
    for command in (
        ["validate", config, adapter],
        ["test", config, adapter, "--games=1", "--play.max_steps=2"],
        ["predict", config, adapter, *[f"--data.predict_path={f.partition('=')[2]}" for f in flags if "train_p" in f]],
        ["memory", config],
        ["fit", config, "--dry_run"],
        ["fit", config, "--ckpt_path=last", "--trainer.max_steps=5"],
    ):
        assert main(command) == 0, capsys.readouterr().err
    assert torch.load(run.last_checkpoint_path, weights_only=True)["global_step"] == 5


def test_final_games_are_played_with_the_exported_weights_beside_a_model_checkpoint(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    played: list[dict[str, torch.Tensor]] = []

    def play(self: SnakeCLI, *args: object) -> None:
        played.append({n: p.detach().clone() for n, p in self.model.peft_model.named_parameters() if "lora_" in n})

    monkeypatch.setattr(SnakeCLI, "_play", play)
    # The loss falls, so the adapter with the highest loss is not the last.
    run = fit(callback("ModelCheckpoint"), "--play.final_games=1", "--checkpoint.mode=max")
    assert store.read_metadata(run.artifacts_dir).step == 2
    exported = dict(store.load(run.artifacts_dir).named_parameters())
    (weights,) = played
    assert weights
    assert all(torch.equal(weights[name], exported[name]) for name in weights)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([callback("ModelCheckpoint", dirpath="here"), "--checkpoint.dirpath=here"], ["ModelCheckpoint", "dirpath"]),
        ([callback("ModelCheckpoint", save_top_k=-5)], ["trainer.callbacks[0]", "save_top_k"]),
        ([callback("EMAWeightAveraging")], ["trainer.callbacks", "EMAWeightAveraging"]),
        ([callback("StochasticWeightAveraging", swa_lrs=0.001)], ["StochasticWeightAveraging"]),
        (
            [callback("GradientAccumulationScheduler", scheduling={"1": 2})],
            ["GradientAccumulationScheduler", "trainer.accumulate_grad_batches"],
        ),
        ([callback("Timer", duration="00:01:00:00")], ["Interval.step"]),
        (["--trainer.logger=MLFlowLogger"], ["trainer.logger", "MLFlowLogger", "pip install"]),
        (["--trainer.profiler=foo"], ["trainer.profiler=foo"]),
    ],
)
def test_setting_that_does_not_work_ends_in_one_line_that_names_it(
    flags: list[str], more: list[str], expected: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *flags, *more]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert all(text in line for text in expected)
    assert "accelerator" not in line


def test_overfit_batches_has_the_batch_size_of_the_settings(fit: Fit) -> None:
    more = ["--trainer.overfit_batches=2", "--trainer.val_check_interval=1.0", "--trainer.limit_train_batches=null"]
    run = fit(*more)
    state = torch.load(run.last_checkpoint_path, weights_only=True)
    assert state["SnakeJSONLDataModule"]["batch_size"] == 4
    progress = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert progress["total"]["completed"] == 4
