"""Norms of weights and of their updates, against what the weights themselves say."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from snake_lora_pl.training.adapter_norms import AdapterNorms, group_by_layers

pytestmark = pytest.mark.filterwarnings("ignore")


class Layered(pl.LightningModule):
    """Three layers and a frozen head; keeps its weights of before and after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in range(3))
        self.head = nn.Linear(3, 1)
        self.head.requires_grad_(False)
        self.seen = [self.copy()]
        self.logged: list[dict[str, float]] = []

    def copy(self) -> list[torch.Tensor]:
        return [layer.weight.detach().clone() for layer in self.layers]

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        for layer in self.layers:
            batch = layer(batch)
        return self.head(batch).square().sum()

    def optimizer_step(self, *args: object, **kwargs: object) -> None:
        super().optimizer_step(*args, **kwargs)  # type: ignore[arg-type]
        self.seen.append(self.copy())

    def log_dict(self, dictionary: dict, **kwargs: object) -> None:  # type: ignore[override]
        self.logged.append({name: float(value) for name, value in dictionary.items()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_norms_are_those_of_the_weights_and_of_their_change_in_one_step() -> None:
    module = Layered()
    trainer = pl.Trainer(
        max_steps=5,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[AdapterNorms(every_n_steps=3)],
    )
    trainer.fit(module, DataLoader(torch.randn(40, 3), batch_size=2))
    assert len(module.logged) == 2  # steps 1 and 4 of 5
    for figures, step in zip(module.logged, (0, 3), strict=True):
        before, after = module.seen[step], module.seen[step + 1]
        for layer in range(3):
            assert figures[f"adapter/weight_norm/layer_{layer:02d}"] == pytest.approx(float(after[layer].norm()))
            change = float((after[layer] - before[layer]).norm())
            assert figures[f"adapter/update_norm/layer_{layer:02d}"] == pytest.approx(change, rel=1e-4)
    assert len(module.logged[0]) == 6


def test_many_layers_make_four_groups_of_neighbours() -> None:
    weights = {f"model.layers.{i}.q_proj.lora_A.weight": torch.tensor(float(i)) for i in range(30)}
    weights["model.embed_tokens.lora_A"] = torch.tensor(-1.0)
    groups = group_by_layers(weights)
    assert list(groups) == ["layers_00-06", "layers_07-14", "layers_15-21", "layers_22-29", "outside_layers"]
    assert [int(t) for group in groups.values() for t in group] == [*range(30), -1]
