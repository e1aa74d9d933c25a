"""Logged norms compared with norms computed from copies of the weights."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from snake_lora_pl.training.callbacks.adapter_norms import AdapterNorms, group_by_layers

pytestmark = pytest.mark.filterwarnings("ignore")


class Layered(pl.LightningModule):
    """Three layers and a frozen output layer; keeps a copy of its weights before and after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in range(3))
        self.head = nn.Linear(3, 1)
        self.head.requires_grad_(False)
        self.seen = [self.copy()]

    def copy(self) -> list[torch.Tensor]:
        return [layer.weight.detach().clone() for layer in self.layers]

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        for layer in self.layers:
            batch = layer(batch)
        return self.head(batch).square().sum()

    def optimizer_step(self, *args: object, **kwargs: object) -> None:
        super().optimizer_step(*args, **kwargs)  # type: ignore[arg-type]
        self.seen.append(self.copy())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1)


class RecordingLogger(CSVLogger):
    """Keeps the logged metrics."""

    def __init__(self, save_dir: Path) -> None:
        super().__init__(str(save_dir))
        self.logged: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        if any(name.startswith("adapter/") for name in metrics):
            self.logged.append((step, metrics))


def test_norms_are_those_of_the_weights_and_of_their_change_in_one_step(tmp_path: Path) -> None:
    module, run_logger = Layered(), RecordingLogger(tmp_path)
    trainer = pl.Trainer(
        max_steps=5,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=run_logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[AdapterNorms(every_n_steps=3)],
    )
    trainer.fit(module, DataLoader(torch.randn(40, 3), batch_size=2))
    assert [step for step, _ in run_logger.logged] == [0, 3]  # the first and the fourth of five
    for step, metrics in run_logger.logged:
        assert step is not None
        before, after = module.seen[step], module.seen[step + 1]
        for layer in range(3):
            assert metrics[f"adapter/weight_norm/layer_{layer:02d}"] == pytest.approx(float(after[layer].norm()))
            change = float((after[layer] - before[layer]).norm())
            assert metrics[f"adapter/update_norm/layer_{layer:02d}"] == pytest.approx(change, rel=1e-4)
    assert len(run_logger.logged[0][1]) == 6


def test_layers_are_divided_into_four_groups_of_adjacent_layers() -> None:
    weights = {f"model.layers.{i}.q_proj.lora_A.weight": torch.tensor(float(i)) for i in range(30)}
    weights["model.embed_tokens.lora_A"] = torch.tensor(-1.0)
    groups = group_by_layers(weights)
    assert list(groups) == ["layers_00-06", "layers_07-14", "layers_15-21", "layers_22-29", "outside_layers"]
    assert [int(t) for group in groups.values() for t in group] == [*range(30), -1]
