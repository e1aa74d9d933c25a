"""Games during training of a tiny model: when they are played, and that they do not affect training."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.data.datamodule import SnakeJSONLDataModule
from snake_lora_pl.data.generated_rows import write_dataset
from snake_lora_pl.errors import UserError
from snake_lora_pl.evaluation.callbacks.play_evaluation import PlayEvaluation
from snake_lora_pl.evaluation.settings import PlaySettings
from snake_lora_pl.training.callbacks.adapter_checkpoint import AdapterCheckpoint
from snake_lora_pl.training.module import LoRALightningModule
from tests.training.conftest import make_trainer

NUM_BATCHES = 2


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def rows_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_dataset(path, num_games=4, grid_size=5, style="compact")
    return path


class MetricRecorder(pl.Callback):
    """Records ``callback_metrics`` at the hook in which checkpoints read them."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float | None]] = []
        self.modes: set[bool] = set()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        value = trainer.callback_metrics.get("play/apples_mean")
        self.seen.append((trainer.global_step, None if value is None else float(value)))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.modes |= {part.training for part in pl_module.peft_model.modules()}

    @property
    def played(self) -> list[int]:
        return [step for step, value in self.seen if value is not None]


@pytest.fixture
def fit(tiny_llama_dir: Path, rows_path: Path, tmp_path: Path):
    """Fit the tiny model with two batches per epoch, with or without games."""

    def run(
        settings: PlaySettings | None, *callbacks: pl.Callback, ckpt_path: str | None = None, **options: Any
    ) -> Any:
        pl.seed_everything(7, verbose=False)
        data_options = {name: options.pop(name) for name in ("train_path", "val_fraction") if name in options}
        module = LoRALightningModule(
            base_model=str(tiny_llama_dir),
            lora=LoRAConfig(rank=4, alpha=8, dropout=0.5),
            dtype="float32",
            learning_rate=1e-2,
            warmup_steps=0,
        )
        data = SnakeJSONLDataModule(str(tiny_llama_dir), **{"train_path": str(rows_path), **data_options})
        playing = [] if settings is None else [PlayEvaluation(settings)]
        trainer = make_trainer(
            tmp_path,
            callbacks=[*playing, *callbacks],
            limit_train_batches=NUM_BATCHES,
            limit_val_batches=1,
            **{"max_epochs": 2, "num_sanity_val_steps": 1, **options},
        )
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return trainer

    return run


def settings(**values: Any) -> PlaySettings:
    return PlaySettings(**{"val_games": 2, "reading": "score", "max_steps": 2, **values})


def adapter_weights(trainer: pl.Trainer) -> list[torch.Tensor]:
    return [p.detach() for p in trainer.lightning_module.parameters() if p.requires_grad]


def test_games_do_not_change_training_by_a_bit(fit) -> None:
    recorder = MetricRecorder()
    playing, silent = fit(settings(), recorder), fit(None)
    assert recorder.played == [2, 4]
    assert recorder.modes == {True}
    for weight, other in zip(adapter_weights(playing), adapter_weights(silent), strict=True):
        assert torch.equal(weight, other)


def test_first_validation_after_every_n_epochs_and_the_last_one_have_games(fit) -> None:
    recorder = MetricRecorder()
    fit(settings(every_n_epochs=2), recorder, max_epochs=5, val_check_interval=0.5)
    # Two validations per epoch, and one before training. Validations without games have no metrics of earlier games.
    assert [step for step, _ in recorder.seen] == [0, *range(1, 11)]
    assert recorder.played == [4, 8, 10]


def test_run_that_ends_at_max_steps_ends_with_games(fit) -> None:
    recorder = MetricRecorder()
    fit(settings(), recorder, max_steps=3, max_epochs=-1)
    assert recorder.played == [2, 3]


def test_run_that_stops_early_plays_with_its_last_weights(fit) -> None:
    recorder = MetricRecorder()
    # No later validation improves by min_delta.
    stopping = EarlyStopping("val/loss", patience=0, min_delta=1e9)
    trainer = fit(settings(every_n_epochs=3), recorder, stopping, max_epochs=9)
    assert trainer.global_step == 4
    assert recorder.played == []
    assert trainer.callback_metrics["play/apples_mean"] >= 0
    assert trainer.callback_metrics["play/fatal_move_rate"] >= 0


def test_epochs_without_validation_end_with_games(fit) -> None:
    class Log(pl.Callback):
        def __init__(self) -> None:
            self.steps: list[int] = []

        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            if "play/apples_mean" in trainer.callback_metrics:
                self.steps.append(trainer.global_step)

    log = Log()
    trainer = fit(settings(), log, val_fraction=0.0)
    assert log.steps == [2, 3]
    assert "play/win_rate" in trainer.callback_metrics


def test_resumed_run_plays_at_the_same_steps_as_an_uninterrupted_one(fit, tmp_path: Path) -> None:
    recorder = MetricRecorder()
    first = AdapterCheckpoint(str(tmp_path / "run" / "checkpoints"), save_every_n_steps=1)
    fit(settings(every_n_epochs=2), first, max_epochs=2, enable_checkpointing=True)
    again = AdapterCheckpoint(str(tmp_path / "run" / "checkpoints"), save_every_n_steps=1)
    fit(
        settings(every_n_epochs=2),
        recorder,
        again,
        max_epochs=4,
        enable_checkpointing=True,
        num_sanity_val_steps=0,
        ckpt_path=str(tmp_path / "run" / "checkpoints" / "last.ckpt"),
    )
    assert [step for step, _ in recorder.seen] == [6, 8]
    assert recorder.played == [8]


def test_play_metric_selects_the_best_adapter(fit, tmp_path: Path) -> None:
    checkpoint = AdapterCheckpoint(str(tmp_path / "run" / "checkpoints"), monitor="play/steps_mean", mode="max")
    trainer = fit(settings(every_n_epochs=2), checkpoint, max_epochs=4, enable_checkpointing=True)
    assert trainer.global_step == 8
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["epoch=1-step=4.ckpt", "epoch=3-step=8.ckpt", "last.ckpt"]


def test_unknown_monitored_metric_is_rejected(fit, tmp_path: Path) -> None:
    checkpoint = AdapterCheckpoint(str(tmp_path / "run" / "checkpoints"), monitor="val/los")
    with pytest.raises(UserError, match=r"checkpoint\.monitor.*val/los\b"):
        fit(settings(every_n_epochs=2), checkpoint, enable_checkpointing=True)


def test_rows_of_unknown_style_are_trained_on_without_games(
    fit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text('{"prompt": "Where to?", "completion": "UP"}\n' * 40)
    with caplog.at_level(logging.WARNING, logger="snake_lora_pl"):
        trainer = fit(settings(), train_path=str(path), val_fraction=0.0)
    assert any("play.style" in message for message in caplog.messages)
    assert not any(name.startswith("play/") for name in trainer.callback_metrics)


def test_zero_games_are_rejected() -> None:
    with pytest.raises(UserError, match=r"play\.val_games.*0"):
        PlayEvaluation(PlaySettings())
