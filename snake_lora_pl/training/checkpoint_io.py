"""How a trainer checkpoint reaches the disk: written beside its place, flushed, renamed; read without pickles."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from snake_lora_pl.durable import explain_failed_writes, open_durably
from snake_lora_pl.errors import UserError


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
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except FileNotFoundError as error:
            raise UserError(f"--ckpt_path {path}: no such file. 'last' takes the newest run's checkpoint.") from error
        except Exception as error:  # torch.load raises half a dozen types on a damaged file
            cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"--ckpt_path {path}: truncated, or no checkpoint of this package ({cause[:160]}). Choose another "
                "file of the run's checkpoints directory."
            ) from error
