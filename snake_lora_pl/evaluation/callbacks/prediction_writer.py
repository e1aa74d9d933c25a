"""Callback that writes completions to a file, in the order of the prompts."""

from __future__ import annotations

import contextlib
import heapq
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from snake_lora_pl.durable import explain_failed_writes, open_durably
from snake_lora_pl.errors import UserError


class PredictionWriter(Callback):
    """Writes the results of ``predict_step`` as JSONL: ``prompt``, ``completion`` and ``source`` (``path:line``).

    Each rank writes its batches to a part file in the same directory; rank zero finally merges the parts in order. If
    all ranks complete the same prompts, rank zero alone writes.

    Args:
        path: Output file, which appears when all prompts are completed. All ranks use rank zero's value.

    Attributes:
        num_rows: Number of rows written, on rank zero.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_rows = 0
        self._exit_stack = contextlib.ExitStack()
        self._part_file: IO[str] | None = None
        self._rank = 0
        self._num_ranks = 1

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.path = trainer.strategy.broadcast(self.path)
        sampler = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        self._rank, self._num_ranks = sampler["rank"], sampler["num_replicas"]
        if trainer.is_global_zero or self._num_ranks > 1:
            with self._explain_failed_writes():
                part_file = open_durably(self._part_path(self._rank), "w", encoding="utf-8")
                self._part_file = self._exit_stack.enter_context(part_file)

    @override
    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._part_file is None:
            return
        # Each line begins with the index of its batch among those of all ranks.
        index = batch_idx * self._num_ranks + self._rank
        with self._explain_failed_writes():
            for row in outputs:
                self._part_file.write(f"{index}\t{json.dumps(row, ensure_ascii=False)}\n")

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        with self._explain_failed_writes():
            self._exit_stack.close()
        trainer.strategy.barrier("PredictionWriter")
        if trainer.is_global_zero:
            with self._explain_failed_writes():
                self._merge_parts()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._exit_stack.__exit__(type(exception), exception, exception.__traceback__)  # removes the part

    def _explain_failed_writes(self) -> contextlib.AbstractContextManager[None]:
        return explain_failed_writes(self.path, "the completions", then="run predict again")

    def _part_path(self, rank: int) -> Path:
        return self.path.with_name(f".{self.path.name}.{rank}.part")

    def _merge_parts(self) -> None:
        paths = [self._part_path(rank) for rank in range(self._num_ranks)]
        if missing := [path for path in paths if not path.is_file()]:
            raise UserError(
                f"{missing[0]}: file not found, because another rank wrote it to a file system that this one does not "
                "share. Use a shared file system, or a single process."
            )
        with contextlib.ExitStack() as stack:
            parts = [_read_part(stack.enter_context(open(path, encoding="utf-8"))) for path in paths]
            output = stack.enter_context(open_durably(self.path, "w", encoding="utf-8"))
            for _, line in heapq.merge(*parts, key=lambda row: row[0]):
                output.write(line)
                self.num_rows += 1
        for path in paths:
            path.unlink()


def _read_part(file: IO[str]) -> Iterator[tuple[int, str]]:
    for line in file:
        index, _, row = line.partition("\t")
        yield int(index), row
