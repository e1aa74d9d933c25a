"""How a trainer checkpoint reaches the disk: written beside its place, flushed, renamed; read without pickles."""

from __future__ import annotations

import os
import pickle
import zipfile
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from snake_lora_pl.durable import explain_failed_writes, open_durably
from snake_lora_pl.errors import UserError

# What every checkpoint that Lightning writes holds, as far as going on needs it.
_PARTS = {
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
    """Lightning's checkpoint files, safe against a kill and a power cut at any moment, and against code inside them.

    Lightning renames a finished temporary file too, but does not flush it first: after a power cut the new name may
    hold nothing.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint`` so that ``path`` holds the old content or all of the new.

        Raises:
            UserError: If the disk is full or the directory cannot be written.
        """
        with explain_failed_writes(path, "the checkpoint", RuntimeError), open_durably(path) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read tensors and plain values only.

        Raises:
            UserError: If the file is missing, truncated, or holds anything that would run code.
        """
        try:
            if _is_compressed(path):
                raise ValueError("it is compressed, which torch's own files never are")
            checkpoint = torch.load(path, map_location=map_location or "cpu", weights_only=True)
            _check_parts(checkpoint)
            return checkpoint
        except FileNotFoundError as error:
            raise UserError(f"--ckpt_path {path}: no such file. 'last' takes the newest run's checkpoint.") from error
        except pickle.UnpicklingError as error:
            raise UserError(
                f"--ckpt_path {path}: no checkpoint of this package: it holds more than tensors and plain values, and "
                "the like can run code when it is read. Choose a file of the run's checkpoints directory."
            ) from error
        except Exception as error:  # torch.load raises half a dozen types on a damaged file
            cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"--ckpt_path {path}: truncated, or no checkpoint of this package ({cause[:160]}). Choose another "
                "file of the run's checkpoints directory."
            ) from error


def _is_compressed(path: str | os.PathLike[str]) -> bool:
    """Whether a file could hold far more than its size."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return any(part.compress_type != zipfile.ZIP_STORED for part in file.infolist())


def _check_parts(checkpoint: Any) -> None:
    """Refuse what Lightning would go on from as from nothing, or would look for in vain."""
    if not isinstance(checkpoint, dict):
        raise ValueError(f"it holds a {type(checkpoint).__name__}")
    for name, kind in _PARTS.items():
        if not isinstance(checkpoint.get(name), kind):
            raise ValueError(f"its '{name}' is {'damaged' if name in checkpoint else 'missing'}")
    for name in ("optimizer_states", "lr_schedulers"):
        if not checkpoint[name]:
            raise ValueError(f"its '{name}' are empty")
    fit_loop = checkpoint["loops"].get("fit_loop")
    if not isinstance(fit_loop, dict) or not fit_loop.keys() >= {"epoch_progress", "epoch_loop.batch_progress"}:
        raise ValueError("its 'loops' are damaged")
