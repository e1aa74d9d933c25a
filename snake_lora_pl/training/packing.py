"""Rows of a batch laid end to end in one sequence: no padding, and the head that all rows share stands there once.

A batch of rows of unequal length, padded, spends work on positions that carry nothing; and prompts of one style begin
with the same words, which a causal model maps to the same hidden state in every row. ``PackedBatch`` says which token
goes where, so that layers which treat every token apart (all but attention) run over each distinct token once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from snake_lora_pl.constants import IGNORE_INDEX


class PackedBatch(NamedTuple):
    """Index tensors of a packed batch; T is the number of packed tokens, B of rows, R the longest rest of a row.

    The T tokens are the shared head, then what follows it in each row. Positions of a row behind its last label are
    left out: attention is causal, so nothing that carries loss sees them.

    Args:
        token_ids: int64 of shape (T,).
        position_ids: Position of each token within its row; int64 of shape (T,).
        head_length: Tokens of the shared head.
        num_rows: B.
        rest_length: R.
        padded_index: For each place of the padded rests, row by row, the packed token there (a place of padding names
            any token); int64 of shape (B * R,), or of shape (0,) where the rests, unpadded, are that already.
        rest_index: For each packed token behind the head, its place among the padded rests; int64 of shape
            (T - head_length,), or (0,) likewise.
        target_index: The packed token whose hidden state predicts each target; int64 of shape (num_targets,).
        target_ids: The targets, row by row; int64 of shape (num_targets,).
    """

    token_ids: Tensor
    position_ids: Tensor
    head_length: int
    num_rows: int
    rest_length: int
    padded_index: Tensor
    rest_index: Tensor
    target_index: Tensor
    target_ids: Tensor

    def rests(self, x: Tensor) -> Tensor:
        """What stands behind the head, a row each.

        Args:
            x: A value for each packed token; shape (T, ...).

        Returns:
            Shape (B, R, ...); places of padding hold any token's value.
        """
        own = x.index_select(0, self.padded_index) if self.padded_index.numel() else x[self.head_length :]
        return own.unflatten(0, (self.num_rows, self.rest_length))

    def without_padding(self, rests: Tensor) -> Tensor:
        """The inverse of ``rests``: from shape (B, R, ...) to (T - head_length, ...)."""
        flat = rests.flatten(0, 1)
        return flat.index_select(0, self.rest_index) if self.rest_index.numel() else flat


def pack(input_ids: Tensor, labels: Tensor, *, share_head: bool = True) -> PackedBatch | None:
    """Lay the rows of a right-padded batch end to end.

    Args:
        input_ids: int64 of shape (batch, length).
        labels: int64 of the same shape, ``IGNORE_INDEX`` where there is no loss.
        share_head: Whether the tokens that all rows begin with are packed once. Every row gets the hidden state it
            has alone; under dropout, rows then also share their head's masks.

    Returns:
        The packed batch, or None where no position carries a label.
    """
    labeled = labels != IGNORE_INDEX
    labeled[:, 0] = False  # nothing stands before the first token to predict it from
    used = labeled.any(dim=1)
    if not used.any():
        return None
    input_ids, labels, labeled = input_ids[used], labels[used], labeled[used]
    batch, width = input_ids.shape
    # The last label predicts nothing further, so its own token need not be read.
    lengths = width - 1 - labeled.flip(1).int().argmax(dim=1)
    longest, shortest = int(lengths.max()), int(lengths.min())
    head = 0
    if share_head and batch > 1:
        same = (input_ids[:, :shortest] == input_ids[:1, :shortest]).all(dim=0)
        # Every row keeps a token of its own.
        head = min(int(same.int().cumprod(0).sum()), shortest - 1)
    device = input_ids.device
    rest_width = longest - head
    offsets = torch.arange(rest_width, device=device)
    filled = offsets < (lengths - head)[:, None]  # (batch, rest_width)
    num_rest = int(filled.sum())
    token_ids = torch.cat([input_ids[0, :head], input_ids[:, head:longest][filled]])
    positions = torch.cat([torch.arange(head, device=device), (head + offsets).expand(batch, -1)[filled]])
    # packed[row, position] is the packed index of a row's token.
    rest_packed = torch.zeros(batch, rest_width, dtype=torch.int64, device=device)
    rest_packed[filled] = torch.arange(head, head + num_rest, device=device)
    packed = torch.cat([torch.arange(head, device=device).expand(batch, -1), rest_packed], dim=1)
    predicted = labeled[:, 1 : longest + 1]
    none = torch.empty(0, dtype=torch.int64, device=device)
    even = num_rest == batch * rest_width
    return PackedBatch(
        token_ids=token_ids,
        position_ids=positions,
        head_length=head,
        num_rows=batch,
        rest_length=rest_width,
        padded_index=none if even else rest_packed.flatten(),
        rest_index=none if even else filled.flatten().nonzero().squeeze(1),
        target_index=packed[predicted],
        target_ids=labels[:, 1 : longest + 1][predicted],
    )
