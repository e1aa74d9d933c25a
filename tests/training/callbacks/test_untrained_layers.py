from __future__ import annotations

import logging
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from snake_lora_pl.training.callbacks.untrained_layers import UntrainedLayers

pytestmark = pytest.mark.filterwarnings("ignore")


class Adapted(pl.LightningModule):
    """Two layers with a factor that starts at zero, as LoRA's B does; the layers in ``unused`` are not called."""

    def __init__(self, *unused: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"lora_A": nn.Linear(3, 2, bias=False), "lora_B": nn.Linear(2, 3, bias=False)})
            for _ in range(2)
        )
        for layer in self.layers:
            nn.init.zeros_(layer["lora_B"].weight)
        self.unused = unused

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        out = batch
        for index, layer in enumerate(self.layers):
            if index not in self.unused:
                out = out + layer["lora_B"](layer["lora_A"](batch))
        return out.square().sum() * (batch_idx > 0)  # the first step has no target

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def warnings_of_a_run(module: pl.LightningModule, directory: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    trainer = pl.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=directory, callbacks=[UntrainedLayers()],
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="snake_lora_pl"):
        trainer.fit(module, DataLoader(torch.randn(4, 3)))
    return [record.getMessage() for record in caplog.records if record.name.endswith("untrained_layers")]


def test_layers_without_a_gradient_are_named_in_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (message,) = warnings_of_a_run(Adapted(1), tmp_path, caplog)
    assert "layers.1" in message
    assert "layers.0" not in message
    assert "model.lora.target_modules" in message


def test_layers_with_a_gradient_cause_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert warnings_of_a_run(Adapted(), tmp_path, caplog) == []
