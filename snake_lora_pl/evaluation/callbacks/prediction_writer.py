"""Completions to a file as they come, whole or absent, in the order of the prompts."""

from __future__ import annotations

import contextlib
import heapq
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from snake_lora_pl.durable import explain_failed_writes, open_durably
from snake_lora_pl.errors import UserError


class PredictionWriter(Callback):
    """Writes what ``predict_step`` returns as JSONL: ``prompt``, ``completion`` and ``source`` (``path:line``).

    Every process writes the batches it completes to a file of its own beside ``path``; in the end the first one brings
    them into order. Processes that complete the same prompts in step leave the writing to the first.

    Args:
        path: Where to; the file appears when the last prompt is answered. The first process's counts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_rows = 0
        self._exit = contextlib.ExitStack()
        self._file: IO[str] | None = None
        self._rank = 0
        self._num_ranks = 1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Settle who writes what."""
        self.path = trainer.strategy.broadcast(self.path)
        shares = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        self._rank, self._num_ranks = shares["rank"], shares["num_replicas"]
        writes = trainer.is_global_zero or self._num_ranks > 1
        if writes:
            with self._explained():
                self._file = self._exit.enter_context(open_durably(self._part_path(self._rank), "w", encoding="utf-8"))

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write a batch, each row behind its batch's place among those of all processes."""
        if self._file is None:
            return
        place = batch_idx * self._num_ranks + self._rank
        with self._explained():
            for row in outputs:
                self._file.write(f"{place}\t{json.dumps(row, ensure_ascii=False)}\n")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Bring the parts together; also a process that had nothing to complete comes here."""
        with self._explained():
            self._exit.close()
        trainer.strategy.barrier("PredictionWriter")
        if trainer.is_global_zero:
            with self._explained():
                self._join_parts()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the part that was written."""
        self._exit.__exit__(type(exception), exception, exception.__traceback__)

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        return explain_failed_writes(self.path, "the completions", then="run predict again")

    def _part_path(self, rank: int) -> Path:
        return self.path.with_name(f".{self.path.name}.{rank}.part")

    def _join_parts(self) -> None:
        paths = [self._part_path(rank) for rank in range(self._num_ranks)]
        if missing := [path for path in paths if not path.is_file()]:
            raise UserError(
                f"{missing[0]}: no such file; another process wrote it where this one cannot see it. Run where all "
                "processes share a file system, or with one process."
            )
        with contextlib.ExitStack() as stack:
            parts = [_read_part(stack.enter_context(open(path, encoding="utf-8"))) for path in paths]
            whole = stack.enter_context(open_durably(self.path, "w", encoding="utf-8"))
            for _, line in heapq.merge(*parts, key=lambda row: row[0]):
                whole.write(line)
                self.num_rows += 1
        for path in paths:
            path.unlink()


def _read_part(file: IO[str]) -> Iterator[tuple[int, str]]:
    for line in file:
        place, _, row = line.partition("\t")
        yield int(place), row
