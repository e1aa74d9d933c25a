"""Completions to a file as they come, whole or absent."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import IO, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from snake_lora_pl.durable import open_durably


class PredictionWriter(Callback):
    """Writes what ``predict_step`` returns as JSONL: ``prompt``, ``completion`` and ``source`` (``path:line``).

    Args:
        path: Where to; the file appears when the last prompt is answered.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_rows = 0
        self._exit = contextlib.ExitStack()
        self._file: IO | None = None

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the file under a temporary name."""
        self._file = self._exit.enter_context(open_durably(self.path, "w", encoding="utf-8"))

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write a batch."""
        assert self._file is not None
        for row in outputs:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.num_rows += len(outputs)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the file its name."""
        self._exit.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the part that was written."""
        self._exit.__exit__(type(exception), exception, exception.__traceback__)
