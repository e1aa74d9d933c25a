"""Batches of random rows, a module and a trainer, without the data package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.training.module import LoRALightningModule

PAD = 2


def make_rows(num_rows: int, seed: int = 0) -> list[tuple[list[int], int]]:
    """Return random rows of unequal length as (token ids, number of prompt tokens)."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(num_rows):
        prompt, completion = torch.randint(2, 12, (2,), generator=generator).tolist()
        ids = torch.randint(3, 384, (prompt + completion,), generator=generator).tolist()
        rows.append((ids, prompt))
    return rows


def collate(rows: list[tuple[list[int], int]]) -> dict[str, Any]:
    width = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [PAD] * (width - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([[-100] * p + ids[p:] + [-100] * (width - len(ids)) for ids, p in rows]),
        "sources": [f"rows.jsonl:{len(ids)}" for ids, _ in rows],
    }


def make_loader(rows: list[tuple[list[int], int]], batch_size: int) -> DataLoader:
    return DataLoader(rows, batch_size=batch_size, collate_fn=collate)


@pytest.fixture
def make_module(tiny_llama_dir: Path):
    def make(**settings: Any) -> LoRALightningModule:
        pl.seed_everything(7, verbose=False)
        defaults: dict[str, Any] = {
            "base_model": str(tiny_llama_dir),
            "lora": LoRAConfig(rank=4, alpha=8, dropout=0.0),
            "dtype": "float32",
            "learning_rate": 1e-2,
            "warmup_steps": 0,
        }
        return LoRALightningModule(**{**defaults, **settings})

    return make


def make_trainer(root: Path, **settings: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "default_root_dir": str(root),
    }
    return pl.Trainer(**{**defaults, **settings})
