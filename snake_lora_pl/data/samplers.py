"""Samplers: the order in which rows form batches.

The order is a pure function of seed and epoch. A *global batch* holds the rows that all ranks process in one step;
which rows it holds does not depend on the number of ranks that share it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import DistributedSampler, SequentialSampler
from typing_extensions import override

# Number of global batches within which rows are sorted by length: enough that little padding remains, and few enough
# that the order stays random over the data set.
WINDOW_BATCHES = 50


class LengthGroupedSampler(DistributedSampler[list[int]]):
    """Sampler of batches of indices that groups rows of similar length, so that little is padded.

    The rows are shuffled, or drawn with replacement if they have probabilities. They are then divided into windows of
    ``WINDOW_BATCHES`` global batches, sorted by length within each window and divided into global batches, which are
    shuffled in turn; only a partial batch stays last. Of each global batch a rank takes every ``num_replicas``-th row,
    so that ranks get rows of similar length, and two ranks with a batch size of 8 process the rows that one rank with
    16 would. No row is repeated to even out the ranks: a rank may get an empty list in the last global batch.

    It is a ``DistributedSampler`` so that Lightning calls ``set_epoch`` and does not replace it. Use it with
    ``DataLoader(dataset, sampler=sampler, batch_size=None)``, which passes whole batches of indices to the dataset.

    Args:
        lengths: Length of each row.
        batch_size: Rows per batch of one rank.
        shuffle: Whether the order differs between epochs. If not, it is still random, so that the first batches are a
            fair sample of the rows.
        seed: Seed of the order.
        rank: Rank of this process.
        num_replicas: Number of processes that share the rows.
        probabilities: Probability of each row. An epoch then draws as many rows as there are; a row whose expected
            number of draws is x is drawn floor(x) or ceil(x) times. Default: each row once.
        group_by_length: Whether to sort within windows.

    Attributes:
        start_batch: First batch of the next pass. Returns to 0 after that pass, and when ``set_epoch`` sets another
            epoch. ``len`` does not depend on it.
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
        probabilities: npt.NDArray[np.float64] | None = None,
        group_by_length: bool = True,
    ) -> None:
        super().__init__(lengths, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.lengths = lengths
        self.batch_size = batch_size
        self.group_by_length = group_by_length
        self.start_batch = 0
        # Expected number of draws of all rows up to each one.
        self._draws: npt.NDArray[np.float64] | None = None
        if probabilities is not None:
            cumulative = np.cumsum(probabilities)
            self._draws = cumulative * (len(lengths) / cumulative[-1])

    @property
    def global_batch_size(self) -> int:
        """Rows that all ranks together process in one step."""
        return self.batch_size * self.num_replicas

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch, which is the same for all ranks."""
        return -(-len(self.lengths) // self.global_batch_size)

    @override
    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.start_batch = 0
        super().set_epoch(epoch)

    def seek(self, epoch: int, start_batch: int) -> None:
        """Start the next pass at a batch in the middle of an epoch."""
        super().set_epoch(epoch)
        self.start_batch = start_batch

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of each batch of one pass."""
        rows, batches = self._order()
        start, self.start_batch = self.start_batch, 0
        size = self.global_batch_size
        for batch in batches[start:]:
            yield rows[batch * size + self.rank : (batch + 1) * size : self.num_replicas].tolist()

    def _order(self) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.int64]]:
        """Return all rows, concatenated by global batch, and the order of the global batches."""
        generator = np.random.default_rng([self.seed, self.epoch if self.shuffle else 0])
        size = self.global_batch_size
        num_rows = len(self.lengths)
        rows = np.arange(num_rows, dtype=np.int32 if num_rows < 2**31 else np.int64)
        if self._draws is not None:
            # Systematic sampling: equidistant points with a random offset have less variance than independent draws.
            points = generator.random() + np.arange(num_rows)
            rows = np.searchsorted(self._draws, points, side="right").clip(max=num_rows - 1).astype(rows.dtype)
        generator.shuffle(rows)
        for first in range(0, num_rows, WINDOW_BATCHES * size) if self.group_by_length else ():
            window = rows[first : first + WINDOW_BATCHES * size]
            window[:] = window[np.argsort(self.lengths[window], kind="stable")]
        batches = generator.permutation(num_rows // size)
        return rows, np.append(batches, num_rows // size) if num_rows % size else batches


class FixedOrderSampler(LengthGroupedSampler, SequentialSampler):  # type: ignore[misc]
    """The same batches in the same order in every epoch, for ``trainer.overfit_batches``.

    Lightning replaces every sampler that is not a ``SequentialSampler`` by one that yields single rows.
    """

    def __init__(self, lengths: npt.NDArray[Any], batch_size: int, **kwargs: Any) -> None:
        super().__init__(lengths, batch_size, **{**kwargs, "shuffle": False})


class InOrderSampler(DistributedSampler[list[int]]):
    """Sampler of batches of indices in file order, each row once; a rank takes every n-th batch.

    Args:
        num_rows: Number of rows.
        batch_size: Rows per batch.
        rank: Rank of this process.
        num_replicas: Number of processes that share the rows.
    """

    def __init__(self, num_rows: int, batch_size: int, *, rank: int = 0, num_replicas: int = 1) -> None:
        super().__init__(range(num_rows), num_replicas=num_replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.num_rows = num_rows
        self.batch_size = batch_size

    def _starts(self) -> range:
        return range(self.rank * self.batch_size, self.num_rows, self.num_replicas * self.batch_size)

    def __len__(self) -> int:
        """Return the number of batches of this rank."""
        return len(self._starts())

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of each batch of this rank."""
        return (list(range(start, min(start + self.batch_size, self.num_rows))) for start in self._starts())
