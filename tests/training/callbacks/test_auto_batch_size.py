from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from snake_lora_pl.errors import UserError
from snake_lora_pl.training.callbacks import auto_batch_size as batch_size_module
from snake_lora_pl.training.callbacks.adapter_checkpoint import AdapterCheckpoint
from snake_lora_pl.training.callbacks.auto_batch_size import AutoBatchSize
from tests.training.conftest import collate, make_rows, make_trainer

ROWS = make_rows(40)


class Rows(pl.LightningDataModule):
    """A data module with the attributes that the callback uses."""

    num_train_rows = len(ROWS)

    def __init__(self, batch_size: int | str = "auto") -> None:
        super().__init__()
        self.batch_size: Any = batch_size

    def longest_batch(self, num_rows: int) -> dict[str, Any]:
        return collate(sorted(ROWS, key=lambda row: -len(row[0]))[:num_rows])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(ROWS, batch_size=self.batch_size, collate_fn=collate)

    def state_dict(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """A fake machine of a given size, on which a step takes 1,000 bytes and 100 more per row."""
    probes: list[int] = []

    def make(num_bytes: int) -> list[int]:
        def peak(trainer: Any, module: Any, device: Any, num_rows: int) -> int:
            probes.append(num_rows)
            if 1000 + 100 * num_rows > num_bytes:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
            return 1000 + 100 * num_rows

        monkeypatch.setattr(batch_size_module, "_measure_peak_bytes", peak)
        monkeypatch.setattr(batch_size_module, "used_bytes", lambda device: 1000)
        monkeypatch.setattr(batch_size_module, "available_bytes", lambda device: num_bytes - 1000)
        monkeypatch.setattr(batch_size_module, "_FUTURE_ADAPTER_COPIES", 0)
        monkeypatch.setattr(batch_size_module, "_SMALL_PROBE_TOKENS", 64)
        return probes

    return make


def fit(make_module, tmp_path: Path, data: Rows, **settings: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {"max_epochs": 1, "callbacks": [AutoBatchSize()]}
    trainer = make_trainer(tmp_path, **{**defaults, **settings})
    trainer.fit(make_module(), datamodule=data)
    return trainer


def test_largest_batch_that_leaves_a_tenth_free_is_chosen(make_module, tmp_path: Path, machine, caplog) -> None:
    caplog.set_level(logging.INFO, "snake_lora_pl")
    machine(4000)
    data = Rows()
    trainer = fit(make_module, tmp_path, data, accumulate_grad_batches=2)
    assert data.batch_size == (4000 * 0.9 - 1000) // 100
    assert trainer.num_training_batches == 2
    assert re.search(r"data\.batch_size=auto: 26 .* 52 ", caplog.text)


def test_batch_has_at_most_all_training_rows(make_module, tmp_path: Path, machine) -> None:
    machine(10**9)
    data = Rows()
    fit(make_module, tmp_path, data)
    assert data.batch_size == len(ROWS)


def test_probe_that_does_not_fit_is_reduced(make_module, tmp_path: Path, machine) -> None:
    probes = machine(1250)
    data = Rows()
    fit(make_module, tmp_path, data)
    assert data.batch_size == 2
    assert max(probes) > 2


def test_machine_too_small_for_one_row_is_an_error(make_module, tmp_path: Path, machine) -> None:
    machine(1050)
    with pytest.raises(UserError, match=r"data\.batch_size=auto: .* GiB.*model\.gradient_checkpointing"):
        fit(make_module, tmp_path, Rows())


def test_given_batch_size_is_kept(make_module, tmp_path: Path, machine) -> None:
    probes = machine(4000)
    data = Rows(batch_size=4)
    fit(make_module, tmp_path, data)
    assert data.batch_size == 4
    assert probes == []


def test_resumed_run_uses_the_batch_size_of_the_checkpoint(make_module, tmp_path: Path, machine) -> None:
    machine(2500)
    checkpoint = AdapterCheckpoint(dirpath=str(tmp_path), monitor=None)
    fit(make_module, tmp_path, Rows(), callbacks=[AutoBatchSize(), checkpoint], enable_checkpointing=True)
    probes = machine(4000)
    data = Rows()
    path = checkpoint.last_model_path
    trainer = make_trainer(tmp_path, max_epochs=2, callbacks=[AutoBatchSize(path)])
    before = len(probes)
    trainer.fit(make_module(), datamodule=data, ckpt_path=path)
    assert data.batch_size == (2500 * 0.9 - 1000) // 100
    assert len(probes) == before


def test_run_with_auto_equals_the_run_with_the_same_number(make_module, tmp_path: Path, monkeypatch) -> None:
    # The probes use dropout and make gradients, and must not change the run.
    monkeypatch.setattr(batch_size_module, "available_bytes", lambda device: 10**11)
    weights = []
    for batch_size in ("auto", len(ROWS)):
        pl.seed_everything(3, verbose=False)
        module = make_module()
        module.lora.dropout = 0.3
        trainer = make_trainer(tmp_path, max_epochs=2, callbacks=[AutoBatchSize()])
        trainer.fit(module, datamodule=Rows(batch_size))
        weights.append({name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad})
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name])
