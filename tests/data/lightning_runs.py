"""Lightning runs that record the rows of each batch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from snake_lora_pl.data.datamodule import SnakeJSONLDataModule


def set_up(datamodule: SnakeJSONLDataModule, stage: str = "fit") -> SnakeJSONLDataModule:
    """Prepare and set up a data module, and return it."""
    datamodule.prepare_data()
    datamodule.setup(stage)
    return datamodule


class Recorder(lightning.LightningModule):
    """Module that learns nothing and records the rows of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[str]] = []
        self.validated: list[list[str]] = []

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["sources"])
        return self.weight.sum()

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.validated.append(batch["sources"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # A schedule reads this, so Lightning requests the loader before it restores a checkpoint.
        assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), 0.1)


class SaveIn(Callback):
    """Callback that saves a checkpoint in every call of a hook."""

    def __init__(self, directory: Path, hook: str) -> None:
        self.paths: dict[int, Path] = {}
        setattr(self, hook, lambda trainer, module, *_: self._save(trainer, module, directory))

    def _save(self, trainer: lightning.Trainer, module: Recorder, directory: Path) -> None:
        if not trainer.sanity_checking:
            num_seen = len(module.seen)
            self.paths[num_seen] = directory / f"{num_seen}.ckpt"
            trainer.save_checkpoint(self.paths[num_seen])


def quiet_trainer(**settings: Any) -> lightning.Trainer:
    """Return a CPU trainer without output."""
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def fit(datamodule: SnakeJSONLDataModule, ckpt_path: Path | None = None, **settings: Any) -> Recorder:
    """Fit a recorder, and return it."""
    module = Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet_trainer(**settings).fit(module, datamodule=datamodule, ckpt_path=ckpt_path)
    return module
