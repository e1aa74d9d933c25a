"""Replaces a share of each training batch by rows of the rounds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from snake_lora_pl.data.encoding import Example


class RowMixer:
    """Draws rows by weight, with replacement, and puts them at random places of batches.

    The result is a function of the seed, the rows added so far and the number of the batch, so it needs no state to
    resume. All ranks draw the same rows for a global batch, and each replaces its part of it: two ranks with a batch
    size of 8 train on the rows that one rank with 16 would.

    Args:
        share: Share of the rows to replace, on average.
        seed: Seed of the draws.
    """

    def __init__(self, share: float, seed: int) -> None:
        self.share = share
        self._seed = seed
        self._examples: list[Example] = []
        self._cumulative_weights: npt.NDArray[np.float64] = np.empty(0)

    def __len__(self) -> int:
        return len(self._examples)

    def add(self, examples: Sequence[Example], weights: Sequence[float]) -> None:
        """Add examples, each with its weight above 0."""
        total = self._cumulative_weights[-1] if len(self) else 0.0
        self._examples.extend(examples)
        self._cumulative_weights = np.append(self._cumulative_weights, total + np.cumsum(weights))

    def mix(
        self, batch: Sequence[Example], batch_number: int, *, batch_size: int, rank: int = 0, num_replicas: int = 1
    ) -> list[Example]:
        """Return a batch in which some examples are replaced.

        Args:
            batch: The examples of this rank; fewer than ``batch_size`` at the end of an epoch.
            batch_number: Number of batches trained on before.
            batch_size: Rows per batch of one rank.
            rank: Rank of this process.
            num_replicas: Number of processes that share the rows.
        """
        mixed = list(batch)
        if not self._examples:
            return mixed
        rng = np.random.default_rng([self._seed, batch_number, 1])
        num_rows = batch_size * num_replicas
        num_replaced = int(self.share * num_rows + rng.random())
        places = rng.permutation(num_rows)[:num_replaced]
        drawn = np.searchsorted(
            self._cumulative_weights, rng.random(num_replaced) * self._cumulative_weights[-1], side="right"
        ).clip(max=len(self) - 1)
        # Of a global batch, a rank has every num_replicas-th row.
        for place, index in zip(places, drawn, strict=True):
            own, owner = divmod(int(place), num_replicas)
            if owner == rank and own < len(mixed):
                mixed[own] = self._examples[index]
        return mixed
