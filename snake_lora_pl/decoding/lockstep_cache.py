"""Keys and values of many texts at once, each token's at the place of its position, in buffers written in place.

Because place and position are one, rows may stand at different lengths: what a row has not read yet, or read in vain,
lies behind its position, where nothing looks and the next tokens are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

# Buffers grow by so many places at a time: prompts grow with the snake, and each growth allocates anew.
_PLACES_STEP = 128


@dataclass
class _Pass:
    """What the layers have to know of a forward pass.

    Attributes:
        first_row: The row of the buffers that the pass's first row stands in.
        rows: The rows of the buffers, int64 of shape (rows, 1).
        places: Where in them the tokens go, int64 of shape (rows, tokens).
        length: Places that attention looks at.
    """

    first_row: int
    rows: Tensor
    places: Tensor
    length: int


class LockstepCache(Cache):
    """The cache of a batch whose rows begin alike, go on apart and end one by one.

    Args:
        num_layers: Layers of the model.
    """

    def __init__(self, num_layers: int) -> None:
        self._capacity = 0
        self._num_rows = 0
        super().__init__(layers=[_LockstepLayer(self) for _ in range(num_layers)])
        self.plan: _Pass | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and places of the buffers."""
        return self._num_rows, self._capacity

    def start(self, num_rows: int, num_places: int) -> None:
        """Begin a batch: every row holds the head and nothing else."""
        self._num_rows = max(num_rows, self._num_rows)
        # One place more than anybody needs, for padding to be written to.
        self._capacity = max(self._capacity, -(-(num_places + 1) // _PLACES_STEP) * _PLACES_STEP)
        for layer in self._layers:
            layer.start(num_rows)

    def keep_head(self, num_tokens: int) -> None:
        """Make the first tokens of the first row what every later batch begins with."""
        for layer in self._layers:
            layer.keep_head(num_tokens)

    def expect(self, first_row: int, positions: Tensor, length: int) -> None:
        """Say what the next forward pass reads.

        Args:
            first_row: Where its rows begin in the batch.
            positions: int64 of shape (rows, tokens); -1 on padding.
            length: Places that it looks at, from the first.
        """
        rows = torch.arange(first_row, first_row + len(positions), device=positions.device)
        places = torch.where(positions < 0, self._capacity - 1, positions)
        self.plan = _Pass(first_row, rows[:, None], places, length)

    def move_rows(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first ``length`` places of some rows over those of others."""
        if sources:
            for layer in self._layers:
                layer.move_rows(list(sources), list(targets), length)

    @property
    def _layers(self) -> list[_LockstepLayer]:
        return self.layers


class _LockstepLayer(DynamicLayer):
    """One layer's buffers, of shape (rows, heads, places, head_dim)."""

    def __init__(self, cache: LockstepCache) -> None:
        super().__init__()
        self._cache = cache
        self._buffers: list[Tensor] = []
        self._heads: list[Tensor] = []

    def start(self, num_rows: int) -> None:
        rows, capacity = self._cache.shape
        if self._buffers and (self._buffers[0].shape[0], self._buffers[0].shape[2]) != (rows, capacity):
            self._buffers = [_zeros(self._cache, buffer) for buffer in self._buffers]
        for buffer, head in zip(self._buffers, self._heads, strict=False):
            buffer[:num_rows, :, : head.shape[1]] = head

    def keep_head(self, num_tokens: int) -> None:
        self._heads = [buffer[0, :, :num_tokens].clone() for buffer in self._buffers]

    def move_rows(self, sources: list[int], targets: list[int], length: int) -> None:
        for buffer in self._buffers:
            buffer[targets, :, :length] = buffer[sources, :, :length]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new states and return views of what is there; shapes (rows, heads, places, head_dim)."""
        plan = self._cache.plan
        assert plan is not None, "LockstepCache.expect comes before the forward pass"
        if not self._buffers:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [_zeros(self._cache, states) for states in (key_states, value_states)]
        views = []
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[plan.rows, :, plan.places] = states.transpose(1, 2)
            views.append(buffer[plan.first_row : plan.first_row + len(plan.places), :, : plan.length])
        self.keys, self.values = views
        return self.keys, self.values


def _zeros(cache: LockstepCache, like: Tensor) -> Tensor:
    # Not uninitialized: a place that no token was written to has weight 0 in attention, and 0 times NaN is NaN.
    num_rows, capacity = cache.shape
    return like.new_zeros(num_rows, like.shape[1], capacity, like.shape[3])
