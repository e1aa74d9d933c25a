"""Datasets and loaders that turn batches of indices into batches of tensors."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader, Dataset

from snake_lora_pl.data.batching import Batch, PromptBatch
from snake_lora_pl.data.encoding import Encoder, Example
from snake_lora_pl.data.example_files import Examples
from snake_lora_pl.data.jsonl import Row


class ExampleSubset(Dataset[list[Example]]):
    """Some of the examples, indexed by batch.

    Args:
        examples: All examples.
        indices: Indices of the examples in the subset.
    """

    def __init__(self, examples: Examples, indices: npt.NDArray[np.integer[Any]]) -> None:
        self.examples = examples
        self.indices = indices.astype(np.int32 if len(examples) < 2**31 else np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, batch: Sequence[int]) -> list[Example]:
        return [self.examples[int(self.indices[position])] for position in batch]

    def empty(self) -> ExampleSubset:
        """Return the empty subset of the same examples."""
        return ExampleSubset(self.examples, self.indices[:0])

    def lengths(self) -> npt.NDArray[np.int32]:
        """Return the number of tokens of each example."""
        return self.examples.lengths()[self.indices]

    def weights(self) -> npt.NDArray[np.float64]:
        """Return the weight of each example."""
        return self.examples.weights()[self.indices]

    def strata(self) -> npt.NDArray[np.int64]:
        """Return the stratum of each example."""
        return self.examples.strata()[self.indices]

    def num_games(self) -> int:
        """Return the number of games with at least one example."""
        return int(np.count_nonzero(np.bincount(self.examples.games()[self.indices])))


class PromptBatches(Dataset[PromptBatch]):
    """Prompts to complete, indexed by batch."""

    def __init__(self, rows: list[Row], encoder: Encoder) -> None:
        self._rows = rows
        self._encoder = encoder

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, batch: Sequence[int]) -> PromptBatch:
        rows = [self._rows[index] for index in batch]
        prompts = [row.prompt for row in rows]
        return {
            "input_ids": self._encoder.encode_prompts(prompts),
            "prompts": prompts,
            "sources": [row.source for row in rows],
        }


class LazyDataLoader(DataLoader[list[Example]]):
    """Loader that calls its sampler, and starts its workers, when the first batch is requested.

    Lightning creates the iterator earlier: before ``set_epoch``, and before a checkpoint is restored if the module
    reads the number of steps. Workers that prefetch from then on would start at the wrong batch.

    Attributes:
        before_pass: Called before each pass.
        transform_batch: Applied to each batch when it is requested, in this process and not in a worker.
        wait_seconds: Time the consumer has waited for batches, in all passes.
    """

    before_pass: Callable[[], None] | None = None
    transform_batch: Callable[[Batch], Batch] | None = None
    wait_seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield the batches of one pass."""
        start = time.perf_counter()
        if self.before_pass is not None:
            self.before_pass()
        for batch in super().__iter__():
            self.wait_seconds += time.perf_counter() - start
            yield batch if self.transform_batch is None else self.transform_batch(batch)
            start = time.perf_counter()


def max_processes() -> int:
    """Return the maximum number of processes to start on this machine; many more would exhaust its memory."""
    return max(16, 4 * (os.cpu_count() or 1))
