"""Key-value cache for a batch of rows of different lengths, in preallocated buffers that are written in place.

The slot of a token in a buffer is its position in the row, so rows may have different lengths. Slots after the last
position of a row hold rejected draft tokens or nothing. Attention does not read them, and later tokens overwrite them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from typing_extensions import override

# Buffers grow in steps of this many slots: prompts grow with the snake, and each growth allocates new buffers.
_CAPACITY_STEP = 128


@dataclass
class _ForwardPlan:
    """Buffer indices of one forward pass.

    Attributes:
        first_row: Buffer row of the first row of the pass.
        rows: Buffer rows, int64 of shape (rows, 1).
        slots: Slots of the tokens, int64 of shape (rows, tokens).
        length: Number of slots that attention reads.
    """

    first_row: int
    rows: Tensor
    slots: Tensor
    length: int


class LockstepCache(Cache):  # type: ignore[misc]
    """Cache of a batch whose rows share a prefix and end at different times.

    Args:
        num_layers: Number of the model's layers.
    """

    def __init__(self, num_layers: int) -> None:
        self._capacity = 0
        self._num_rows = 0
        self._plan: _ForwardPlan | None = None
        self._lockstep_layers = [_LockstepLayer(self) for _ in range(num_layers)]
        super().__init__(layers=self._lockstep_layers)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and slots of the buffers."""
        return self._num_rows, self._capacity

    @property
    def plan(self) -> _ForwardPlan:
        """Buffer indices of the next forward pass.

        Raises:
            RuntimeError: If ``plan_forward`` was not called.
        """
        if self._plan is None:
            raise RuntimeError("call LockstepCache.plan_forward before the forward pass")
        return self._plan

    def start_batch(self, num_rows: int, num_slots: int) -> None:
        """Begin a batch: reserve slots and fill every row with the prefix."""
        self._num_rows = max(num_rows, self._num_rows)
        # One additional slot, to which padding is written.
        self._capacity = max(self._capacity, -(-(num_slots + 1) // _CAPACITY_STEP) * _CAPACITY_STEP)
        for layer in self._lockstep_layers:
            layer.start_batch(num_rows)

    def keep_prefix(self, num_tokens: int) -> None:
        """Save the first tokens of the first row as the prefix of every later batch."""
        for layer in self._lockstep_layers:
            layer.keep_prefix(num_tokens)

    def plan_forward(self, first_row: int, positions: Tensor, length: int) -> None:
        """Set the rows and slots that the next forward pass writes.

        Args:
            first_row: Index in the batch of the first row of the pass.
            positions: int64 of shape (rows, tokens); -1 for padding.
            length: Number of slots that attention reads, from the first.
        """
        rows = torch.arange(first_row, first_row + len(positions), device=positions.device)
        slots = torch.where(positions < 0, self._capacity - 1, positions)
        self._plan = _ForwardPlan(first_row, rows[:, None], slots, length)

    def move_rows(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first ``length`` slots of the source rows to the target rows."""
        if sources:
            for layer in self._lockstep_layers:
                layer.move_rows(list(sources), list(targets), length)


class _LockstepLayer(DynamicLayer):  # type: ignore[misc]
    """Buffers of one layer: keys and values of shape (rows, key_heads, slots, head_dim)."""

    def __init__(self, cache: LockstepCache) -> None:
        super().__init__()
        self._cache = cache
        self._buffers: list[Tensor] = []
        self._prefixes: list[Tensor] = []

    def start_batch(self, num_rows: int) -> None:
        rows, capacity = self._cache.shape
        if self._buffers and (self._buffers[0].shape[0], self._buffers[0].shape[2]) != (rows, capacity):
            self._buffers = [_zeros(self._cache, buffer) for buffer in self._buffers]
        for buffer, prefix in zip(self._buffers, self._prefixes, strict=False):
            buffer[:num_rows, :, : prefix.shape[1]] = prefix

    def keep_prefix(self, num_tokens: int) -> None:
        self._prefixes = [buffer[0, :, :num_tokens].clone() for buffer in self._buffers]

    def move_rows(self, sources: list[int], targets: list[int], length: int) -> None:
        for buffer in self._buffers:
            buffer[targets, :, :length] = buffer[sources, :, :length]

    @override
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new states of shape (rows, key_heads, tokens, head_dim); return views of the slots to attend to."""
        plan = self._cache.plan
        if not self._buffers:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [_zeros(self._cache, states) for states in (key_states, value_states)]
        views = []
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[plan.rows, :, plan.slots] = states.transpose(1, 2)
            views.append(buffer[plan.first_row : plan.first_row + len(plan.slots), :, : plan.length])
        self.keys, self.values = views
        return self.keys, self.values


def _zeros(cache: LockstepCache, like: Tensor) -> Tensor:
    # Not uninitialized: attention gives weight 0 to slots without a token, and 0 times NaN is NaN.
    num_rows, capacity = cache.shape
    return like.new_zeros(num_rows, like.shape[1], capacity, like.shape[3])
