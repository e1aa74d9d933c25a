"""Checkpoint files: written atomically and flushed to disk, read without running pickled code."""

from __future__ import annotations

import os
import pickle
import zipfile
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override

from snake_lora_pl.durable import explain_failed_writes, open_durably
from snake_lora_pl.errors import UserError

# Entries of a Lightning checkpoint that resuming needs.
_REQUIRED_ENTRIES = {
    "state_dict": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
    "callbacks": dict,
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
}


class DurableCheckpointIO(TorchCheckpointIO):
    """Checkpoint I/O that survives a kill or a power failure at any time, and does not run code from a file.

    Lightning renames a temporary file too, but does not flush it first: after a power failure the file may be empty.
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint atomically.

        Raises:
            UserError: If the disk is full or the directory is not writable.
        """
        with explain_failed_writes(path, "the checkpoint", RuntimeError), open_durably(path) as file:
            torch.save(checkpoint, file)

    @override
    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint of tensors and plain values.

        Raises:
            UserError: If the file is missing, damaged, or holds other objects, which can run code when they are read.
        """
        try:
            if _is_compressed(path):
                raise ValueError("the file is compressed, which torch.save never does")
            checkpoint: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
            _check_entries(checkpoint)
            return checkpoint
        except FileNotFoundError as error:
            raise UserError(
                f"--ckpt_path {path}: file not found. Use --ckpt_path=last for the newest run's checkpoint."
            ) from error
        except pickle.UnpicklingError as error:
            raise UserError(
                f"--ckpt_path {path}: not a checkpoint of this package: it holds objects other than tensors and plain "
                "values, which can run code when they are read. Choose a file in the run's checkpoints directory."
            ) from error
        except Exception as error:  # torch.load raises various types for a damaged file
            cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"--ckpt_path {path}: damaged, or not a checkpoint of this package ({cause[:160]}). Choose another "
                "file in the run's checkpoints directory."
            ) from error


def _is_compressed(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is a compressed archive, which could expand to far more than its size."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return any(member.compress_type != zipfile.ZIP_STORED for member in file.infolist())


def _check_entries(checkpoint: Any) -> None:
    """Check the entries that Lightning would ignore if missing, or that would make it fail later.

    Raises:
        ValueError: If an entry is missing or damaged.
    """
    if not isinstance(checkpoint, dict):
        raise ValueError(f"it holds a {type(checkpoint).__name__}")
    for name, expected_type in _REQUIRED_ENTRIES.items():
        if not isinstance(checkpoint.get(name), expected_type):
            raise ValueError(f"'{name}' is {'damaged' if name in checkpoint else 'missing'}")
    for name in ("optimizer_states", "lr_schedulers"):
        if not checkpoint[name]:
            raise ValueError(f"'{name}' is empty")
    fit_loop = checkpoint["loops"].get("fit_loop")
    if not isinstance(fit_loop, dict) or not fit_loop.keys() >= {"epoch_progress", "epoch_loop.batch_progress"}:
        raise ValueError("'loops' is damaged")
