"""Packing of a batch: rows end to end in one sequence, without padding and with their common prefix once.

A padded batch of rows of unequal length computes positions that carry no information. And prompts of one style begin
with the same tokens, which a causal model maps to the same hidden states in every row. Layers that treat each token
separately (all but attention) run over each distinct token of a ``PackedBatch`` once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from snake_lora_pl.constants import IGNORE_INDEX


class PackedBatch(NamedTuple):
    """Token ids and index tensors of a packed batch.

    The T packed tokens are the common prefix, followed by the suffix of each of the B rows. S is the length of the
    longest suffix. Tokens after the last label of a row are dropped: attention is causal, so no loss depends on them.
    """

    token_ids: Tensor
    """int64 of shape (T,)."""
    position_ids: Tensor
    """Position of each token in its row; int64 of shape (T,)."""
    prefix_length: int
    """Tokens of the common prefix."""
    num_rows: int
    """B."""
    suffix_length: int
    """S."""
    padded_index: Tensor
    """Packed index of each position of the padded suffixes, row by row; any index at padding. int64 of shape (B * S,),
    or (0,) if all suffixes have the same length."""
    suffix_index: Tensor
    """Position of each packed suffix token in the padded suffixes; int64 of shape (T - prefix_length,), or (0,) if all
    suffixes have the same length."""
    target_index: Tensor
    """Packed index of the token whose hidden state predicts each target; int64 of shape (num_targets,)."""
    target_ids: Tensor
    """Target token ids, row by row; int64 of shape (num_targets,)."""

    def pad_suffixes(self, x: Tensor) -> Tensor:
        """Return the suffixes as padded rows.

        Args:
            x: A value for each packed token; shape (T, ...).

        Returns:
            Shape (B, S, ...); padding holds the value of an arbitrary token.
        """
        flat = x.index_select(0, self.padded_index) if self.padded_index.numel() else x[self.prefix_length :]
        return flat.reshape(self.num_rows, self.suffix_length, *x.shape[1:])

    def unpad_suffixes(self, suffixes: Tensor) -> Tensor:
        """Invert ``pad_suffixes``: from shape (B, S, ...) to (T - prefix_length, ...)."""
        flat = suffixes.flatten(0, 1)
        return flat.index_select(0, self.suffix_index) if self.suffix_index.numel() else flat


def pack(input_ids: Tensor, labels: Tensor, *, share_prefix: bool = True) -> PackedBatch | None:
    """Pack a right-padded batch.

    Args:
        input_ids: int64 of shape (B, length).
        labels: int64 of shape (B, length), ``IGNORE_INDEX`` where there is no loss.
        share_prefix: Whether tokens that all rows begin with are packed once. Hidden states are the same as without
            packing, except that under dropout all rows share the masks of their prefix.

    Returns:
        The packed batch, or None if no position has a label.
    """
    is_labeled = labels != IGNORE_INDEX
    is_labeled[:, 0] = False  # no token precedes the first one to predict it from
    is_used = is_labeled.any(dim=1)
    if not is_used.any():
        return None
    input_ids, labels, is_labeled = input_ids[is_used], labels[is_used], is_labeled[is_used]
    num_rows, width = input_ids.shape
    # The token of the last label predicts nothing, so it is not needed as an input.
    lengths = width - 1 - is_labeled.flip(1).int().argmax(dim=1)  # (B,)
    longest, shortest = int(lengths.max()), int(lengths.min())
    prefix_length = 0
    if share_prefix and num_rows > 1:
        is_common = (input_ids[:, :shortest] == input_ids[:1, :shortest]).all(dim=0)
        # Every row keeps a suffix of at least one token.
        prefix_length = min(int(is_common.int().cumprod(0).sum()), shortest - 1)
    device = input_ids.device
    suffix_length = longest - prefix_length
    offsets = torch.arange(suffix_length, device=device)
    is_filled = offsets < (lengths - prefix_length)[:, None]  # (B, S)
    num_suffix_tokens = int(is_filled.sum())
    prefix_positions = torch.arange(prefix_length, device=device)
    suffix_positions = (prefix_length + offsets).expand(num_rows, -1)[is_filled]
    suffix_packed = torch.zeros(num_rows, suffix_length, dtype=torch.int64, device=device)
    suffix_packed[is_filled] = torch.arange(prefix_length, prefix_length + num_suffix_tokens, device=device)
    # The packed index of each token of each row.
    packed_index = torch.cat([prefix_positions.expand(num_rows, -1), suffix_packed], dim=1)  # (B, longest)
    predicts = is_labeled[:, 1 : longest + 1]
    empty = torch.empty(0, dtype=torch.int64, device=device)
    needs_padding = num_suffix_tokens != num_rows * suffix_length
    return PackedBatch(
        token_ids=torch.cat([input_ids[0, :prefix_length], input_ids[:, prefix_length:longest][is_filled]]),
        position_ids=torch.cat([prefix_positions, suffix_positions]),
        prefix_length=prefix_length,
        num_rows=num_rows,
        suffix_length=suffix_length,
        padded_index=suffix_packed.flatten() if needs_padding else empty,
        suffix_index=is_filled.flatten().nonzero().squeeze(1) if needs_padding else empty,
        target_index=packed_index[predicts],
        target_ids=labels[:, 1 : longest + 1][predicts],
    )
