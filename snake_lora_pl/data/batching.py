"""Examples become batches, and the order in which they come.

The order is a pure function of seed and epoch. A *global batch* is what all ranks together eat in one step: the rows
of a global batch do not depend on how many ranks share it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DistributedSampler

from snake_lora_pl.constants import IGNORE_INDEX
from snake_lora_pl.data.encoding import Example

# Rows of like length are looked for among this many global batches: enough that hardly any padding is left, and few
# enough that the order stays random over the data set.
WINDOW_BATCHES = 50


class Batch(TypedDict):
    """What one step eats.

    There is no attention mask. Padding is on the right and the model is causal, so no token that is not padding can see
    any; and without a mask attention takes its fast causal path.

    Attributes:
        input_ids: int64 of shape (batch, longest).
        labels: int64 of the same shape and not shifted: each position holds its own token where that is to be learned,
            ``IGNORE_INDEX`` on the prompt and on padding.
        sources: ``path:line`` of each row.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    sources: list[str]


def collate(examples: Sequence[Example], pad_id: int, pad_to_multiple_of: int = 1) -> Batch:
    """Right-pad examples to the longest one; padding carries a label that the loss ignores.

    No examples make a *blank* batch, one padding token with nothing to learn: what a rank eats for which the last
    global batch has no row left, so that all ranks take the same number of steps.

    Args:
        examples: Rows encoded.
        pad_id: Id of the padding token; it may be that of EOS, whose own label stays.
        pad_to_multiple_of: The padded length is a multiple of it.
    """
    longest = max((len(example.input_ids) for example in examples), default=1)
    shape = (max(len(examples), 1), -(-longest // pad_to_multiple_of) * pad_to_multiple_of)
    input_ids = np.full(shape, pad_id, np.int64)
    labels = np.full(shape, IGNORE_INDEX, np.int64)
    for i, (ids, num_prompt, _) in enumerate(examples):
        input_ids[i, : len(ids)] = ids
        labels[i, num_prompt : len(ids)] = ids[num_prompt:]
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "sources": [example.source for example in examples],
    }


class LengthGroupedSampler(DistributedSampler):
    """Yields batches of indices, with rows of like length together so that little is padded.

    The rows are permuted, cut into windows of ``WINDOW_BATCHES`` global batches, sorted by length within a window, cut
    into global batches, and those are permuted; only one that is not full stays last. Of each global batch a rank takes
    every ``num_replicas``-th row, so that ranks get rows of like length, and two ranks with a batch size of 8 see what
    one with 16 sees. No row is repeated to make numbers even: a rank may get an empty list in the last global batch.

    It is a ``DistributedSampler`` so that Lightning calls ``set_epoch`` and puts no sampler of its own around it, and
    it goes with ``DataLoader(dataset, sampler=sampler, batch_size=None)``: then the dataset is given whole batches of
    indices.

    Args:
        lengths: Length of each row.
        batch_size: Rows in a batch of one rank.
        shuffle: Whether each epoch has an order of its own. Without it the order is the same in all epochs, but still a
            random one: the first batches are a fair sample of the rows.
        seed: Seed of the order.
        rank: This process.
        num_replicas: Processes that share the rows.

    Attributes:
        start_batch: Batches of the next pass to leave out, since they were eaten before a stop. Falls back to 0 after
            that pass, and where ``set_epoch`` names another epoch. ``len`` is not affected.
    """

    def __init__(
        self,
        lengths: npt.NDArray[Any],
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        num_replicas: int = 1,
    ) -> None:
        super().__init__(lengths, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.lengths = lengths
        self.batch_size = batch_size
        self.start_batch = 0

    @property
    def global_batch_size(self) -> int:
        """Rows that all ranks together eat in one step."""
        return self.batch_size * self.num_replicas

    def __len__(self) -> int:
        """Batches in a whole epoch, the same for all ranks."""
        return -(-len(self.lengths) // self.global_batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next pass has."""
        if epoch != self.epoch:
            self.start_batch = 0
        super().set_epoch(epoch)

    def seek(self, epoch: int, start_batch: int) -> None:
        """Let the next pass begin at a batch in the middle of an epoch."""
        super().set_epoch(epoch)
        self.start_batch = start_batch

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of one pass, each a list of indices."""
        rows, batches = self._order()
        start, self.start_batch = self.start_batch, 0
        size = self.global_batch_size
        for batch in batches[start:]:
            yield rows[batch * size + self.rank : (batch + 1) * size : self.num_replicas].tolist()

    def _order(self) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.int64]]:
        """All rows, global batch after global batch, and the order in which those come."""
        generator = np.random.default_rng([self.seed, self.epoch if self.shuffle else 0])
        size = self.global_batch_size
        num_rows = len(self.lengths)
        rows = np.arange(num_rows, dtype=np.int32 if num_rows < 2**31 else np.int64)
        generator.shuffle(rows)
        for first in range(0, num_rows, WINDOW_BATCHES * size):
            window = rows[first : first + WINDOW_BATCHES * size]
            window[:] = window[np.argsort(self.lengths[window], kind="stable")]
        batches = generator.permutation(num_rows // size)
        return rows, np.append(batches, num_rows // size) if num_rows % size else batches


class InOrderSampler(DistributedSampler):
    """Yields batches of indices in the rows' own order, each row once: of all batches a rank takes every n-th.

    Args:
        num_rows: How many rows there are.
        batch_size: Rows in a batch.
        rank: This process.
        num_replicas: Processes that share the rows.
    """

    def __init__(self, num_rows: int, batch_size: int, *, rank: int = 0, num_replicas: int = 1) -> None:
        super().__init__(range(num_rows), num_replicas=num_replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.num_rows = num_rows
        self.batch_size = batch_size

    def _starts(self) -> range:
        return range(self.rank * self.batch_size, self.num_rows, self.num_replicas * self.batch_size)

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self._starts())

    def __iter__(self) -> Iterator[list[int]]:
        """This rank's batches, each a list of indices."""
        return (list(range(start, min(start + self.batch_size, self.num_rows))) for start in self._starts())
