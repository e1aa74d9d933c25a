from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from snake_lora_pl.errors import UserError
from snake_lora_pl.training.resume.checkpoint_io import DurableCheckpointIO


@pytest.fixture
def checkpoint() -> dict[str, Any]:
    return {
        "state_dict": {"a": torch.ones(3)},
        "optimizer_states": [{}],
        "lr_schedulers": [{}],
        "loops": {"fit_loop": {"epoch_progress": {}, "epoch_loop.batch_progress": {}}},
        "callbacks": {},
        "epoch": 0,
        "global_step": 1,
        "pytorch-lightning_version": "2.6.6",
    }


def test_saved_checkpoint_is_loaded(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    DurableCheckpointIO().save_checkpoint(checkpoint, path)
    loaded = DurableCheckpointIO().load_checkpoint(path)
    assert loaded.keys() == checkpoint.keys()
    assert torch.equal(loaded["state_dict"]["a"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("key", ["state_dict", "optimizer_states", "loops", "global_step"])
def test_missing_entry_is_named(checkpoint: dict[str, Any], tmp_path: Path, key: str) -> None:
    path = tmp_path / "last.ckpt"
    del checkpoint[key]
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match=rf"last\.ckpt.*'{key}'"):
        DurableCheckpointIO().load_checkpoint(path)


def test_compressed_file_is_rejected(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    torch.save(checkpoint, tmp_path / "plain.ckpt")
    with zipfile.ZipFile(tmp_path / "plain.ckpt") as plain:
        with zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as compressed:
            for name in plain.namelist():
                compressed.writestr(name, plain.read(name))
    with pytest.raises(UserError, match=r"bomb\.ckpt.*compressed"):
        DurableCheckpointIO().load_checkpoint(tmp_path / "bomb.ckpt")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.ckpt"):
        DurableCheckpointIO().load_checkpoint(tmp_path / "none.ckpt")
