"""Causal attention over a packed batch: a row sees the common prefix and itself, never another row.

Shapes: T packed tokens, B rows, ``num_queries`` and ``num_keys`` attention heads of ``size`` features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the common alias
from torch import Tensor

from snake_lora_pl.training.packing import PackedBatch
from snake_lora_pl.training.torch_internals import Function, softmax_backward

# Query positions per product. Scores above the diagonal are computed only within such a block.
BLOCK_POSITIONS = 96
# Row length up to which attention probabilities are kept for the backward pass.
KEEP_PROBABILITIES = 512


class HeadLayout(NamedTuple):
    """Arrangement of queries, keys and values in one tensor, and the scale of the scores."""

    num_queries: int
    """Query heads."""
    num_keys: int
    """Key heads, and as many value heads; divides ``num_queries`` (https://arxiv.org/abs/2305.13245)."""
    size: int
    """Features per head."""
    scale: float
    """Factor of the scores."""


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """Apply rotary position embedding with the two halves of a head as pairs (https://arxiv.org/abs/2104.09864).

    Args:
        x: Shape (T, heads, size).
        cos: Shape (T, 1, size), with two equal halves.
        sin: Shape (T, 1, size), with two equal halves.
        inverse: Rotate back. The inverse is the transpose, and therefore also the backward pass.
    """
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    c, s = cos[..., :half], sin[..., :half]
    output = torch.empty_like(x)
    sign = -1 if inverse else 1
    torch.mul(a, c, out=output[..., :half]).addcmul_(b, s, value=-sign)
    torch.mul(b, c, out=output[..., half:]).addcmul_(a, s, value=sign)
    return output


def attend(qkv: Tensor, cos: Tensor, sin: Tensor, layout: HeadLayout, batch: PackedBatch) -> Tensor:
    """Rotate queries and keys by their positions and compute causal attention.

    Args:
        qkv: Queries, keys and values side by side; shape (T, (num_queries + 2 * num_keys) * size).
        cos: Shape (T, 1, size).
        sin: Shape (T, 1, size).
        layout: Arrangement of ``qkv``.
        batch: Positions of the packed tokens.

    Returns:
        Shape (T, num_queries * size).
    """
    if qkv.device.type == "cpu":
        return BlockAttention.apply(qkv, cos, sin, layout, batch)
    return sdpa_attention(qkv, cos, sin, layout, batch)


def sdpa_attention(qkv: Tensor, cos: Tensor, sin: Tensor, layout: HeadLayout, batch: PackedBatch) -> Tensor:
    """Compute ``attend`` with torch's scaled dot product attention, on rows padded for this purpose."""
    x = qkv.unflatten(-1, (-1, layout.size))  # (T, heads, size)
    num_rotated = layout.num_queries + layout.num_keys
    qk, values = x[:, :num_rotated], x[:, num_rotated:]
    a, b = qk.chunk(2, dim=-1)
    rotated = qk * cos + torch.cat([-b, a], dim=-1) * sin
    packed = torch.cat([rotated, values], dim=1)
    # The queries of the prefix are computed for every row and read from the first: the kernel wants square scores.
    prefix = packed[: batch.prefix_length].expand(batch.num_rows, -1, -1, -1)
    rows = torch.cat([prefix, batch.pad_suffixes(packed)], dim=1).transpose(1, 2)  # (B, heads, length, size)
    q, k, v = rows.split([layout.num_queries, layout.num_keys, layout.num_keys], dim=1)
    output = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=layout.scale, enable_gqa=layout.num_keys != layout.num_queries
    )
    output = output.transpose(1, 2).flatten(2)  # (B, length, num_queries * size)
    return torch.cat([output[0, : batch.prefix_length], batch.unpad_suffixes(output[:, batch.prefix_length :])])


class BlockAttention(Function):
    """Rotary embedding and attention as plain matrix products, one block of queries at a time.

    On a CPU torch's fused kernel takes three times as long (torch 2.13, bfloat16, heads of 64 features). Scores are
    rounded to the data type of the inputs, as in transformers' ``eager`` attention.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, layout: HeadLayout, batch: PackedBatch) -> Tensor:
        """Compute ``attend``."""
        x = qkv.unflatten(-1, (-1, layout.size))
        rotated = rotate(x[:, : -layout.num_keys], cos, sin)  # (T, num_queries + num_keys, size)
        values = x[:, -layout.num_keys :]  # (T, num_keys, size)
        # Probabilities of short rows are kept. Those of long rows are recomputed in the backward pass, so that memory
        # grows with the length of the rows and not with its square.
        keep = ctx.needs_input_grad[0] and batch.prefix_length + batch.suffix_length <= KEEP_PROBABILITIES
        outputs, kept = [], []
        for segment in _segments(layout, batch):
            queries = segment.spread_queries(rotated[:, : layout.num_queries])
            keys = segment.spread_keys(rotated[:, layout.num_queries :])
            spread_values = segment.spread_keys(values)
            output = torch.empty_like(queries)
            for span, num_keys in segment.blocks():
                probabilities = segment.probabilities(queries[:, span], keys[:, :num_keys])
                torch.bmm(probabilities, spread_values[:, :num_keys], out=output[:, span])
                if keep:
                    kept.append(probabilities)
            outputs.append(segment.gather_queries(output))
        ctx.layout, ctx.batch = layout, batch
        ctx.save_for_backward(rotated, values, cos, sin, *kept)
        return torch.cat(outputs).flatten(1)  # (T, num_queries * size)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        """Return the gradient of ``qkv``."""
        rotated, values, cos, sin, *kept = ctx.saved_tensors
        kept_blocks = iter(kept)
        layout: HeadLayout = ctx.layout
        grad_output = grad_outputs[0].view(-1, layout.num_queries, layout.size)  # (T, num_queries, size)
        grad_queries, grad_keys, grad_values = [], torch.zeros_like(values), torch.zeros_like(values)
        for segment in _segments(layout, ctx.batch):
            queries = segment.spread_queries(rotated[:, : layout.num_queries])
            keys = segment.spread_keys(rotated[:, layout.num_queries :])
            spread_values = segment.spread_keys(values)
            grad_out = segment.spread_queries(grad_output, padding=0)
            grad_q, grad_k, grad_v = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(keys)
            for span, num_keys in segment.blocks():
                probabilities = next(kept_blocks, None)
                if probabilities is None:
                    probabilities = segment.probabilities(queries[:, span], keys[:, :num_keys])
                grad_block = grad_out[:, span]
                grad_v[:, :num_keys].baddbmm_(probabilities.transpose(1, 2), grad_block)
                grad_probabilities = torch.bmm(grad_block, spread_values[:, :num_keys].transpose(1, 2))
                grad_scores = softmax_backward(grad_probabilities, probabilities)
                torch.bmm(grad_scores, keys[:, :num_keys], out=grad_q[:, span])
                grad_k[:, :num_keys].baddbmm_(grad_scores.transpose(1, 2), queries[:, span])
            grad_queries.append(segment.gather_queries(grad_q.mul_(layout.scale)))
            segment.accumulate_keys(grad_keys, grad_k.mul_(layout.scale))
            segment.accumulate_keys(grad_values, grad_v)
        grad_rotated = torch.cat([torch.cat(grad_queries), grad_keys], dim=1)
        grad = torch.cat([rotate(grad_rotated, cos, sin, inverse=True), grad_values], dim=1)
        return grad.flatten(1), None, None, None, None


class _Segment:
    """Queries at the same positions of every row, and the keys up to them: the prefix, or the suffixes.

    In spread tensors rows and key heads are the batch dimension. Queries have shape (rows * num_keys, length * group,
    size), where the ``group`` query heads of a key head are adjacent at each position; keys have shape (rows *
    num_keys, start + length, size). A block of queries is then a slice, and one product serves the whole group.
    """

    def __init__(self, layout: HeadLayout, batch: PackedBatch, *, is_prefix: bool) -> None:
        self.layout, self.batch, self.is_prefix = layout, batch, is_prefix
        self.num_rows = 1 if is_prefix else batch.num_rows
        self.start = 0 if is_prefix else batch.prefix_length
        self.tokens = slice(0, batch.prefix_length) if is_prefix else slice(batch.prefix_length, None)
        self.group = layout.num_queries // layout.num_keys

    def _to_rows(self, x: Tensor, padding: int | None) -> Tensor:
        """Return the segment of x, (T, n, size), as (rows, length, n, size); padding None leaves arbitrary values."""
        if self.is_prefix:
            return x[self.tokens][None]
        if padding is None or not self.batch.suffix_index.numel():
            return self.batch.pad_suffixes(x)
        padded = x.new_full((len(self.batch.padded_index), *x.shape[1:]), padding)
        padded.index_copy_(0, self.batch.suffix_index, x[self.tokens])
        return padded.reshape(self.num_rows, -1, *x.shape[1:])

    def _to_tokens(self, rows: Tensor) -> Tensor:
        """Invert ``_to_rows``: return shape (tokens of the segment, n, size)."""
        return rows[0] if self.is_prefix else self.batch.unpad_suffixes(rows)

    def spread_queries(self, x: Tensor, padding: int | None = None) -> Tensor:
        """Map (T, num_queries, size) to (rows * num_keys, length * group, size)."""
        rows = self._to_rows(x, padding)  # (rows, length, num_queries, size)
        num_rows, length, _, size = rows.shape
        heads = rows.reshape(num_rows, length, self.layout.num_keys, self.group, size)
        return heads.transpose(1, 2).flatten(2, 3).flatten(0, 1).contiguous()

    def gather_queries(self, spread: Tensor) -> Tensor:
        """Invert ``spread_queries``: return shape (tokens of the segment, num_queries, size)."""
        heads = spread.reshape(self.num_rows, self.layout.num_keys, -1, self.group, self.layout.size)
        return self._to_tokens(heads.transpose(1, 2).flatten(2, 3))

    def spread_keys(self, x: Tensor) -> Tensor:
        """Map (T, num_keys, size) to (rows * num_keys, start + length, size)."""
        prefix = x[: self.start].expand(self.num_rows, -1, -1, -1)
        rows = torch.cat([prefix, self._to_rows(x, None)], dim=1)
        return rows.transpose(1, 2).flatten(0, 1).contiguous()

    def accumulate_keys(self, total: Tensor, spread: Tensor) -> None:
        """Add spread gradients of keys to ``total``, (T, num_keys, size); the prefix receives those of every row."""
        rows = spread.reshape(self.num_rows, self.layout.num_keys, -1, self.layout.size).transpose(1, 2)
        total[: self.start] += rows[:, : self.start].sum(dim=0)
        total[self.tokens] += self._to_tokens(rows[:, self.start :])

    def blocks(self) -> Iterator[tuple[slice, int]]:
        """Yield the slice of each block of spread queries and the number of keys that its last position sees."""
        length = self.batch.prefix_length if self.is_prefix else self.batch.suffix_length
        for begin in range(0, length, BLOCK_POSITIONS):
            end = min(begin + BLOCK_POSITIONS, length)
            yield slice(begin * self.group, end * self.group), self.start + end

    def probabilities(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return the attention of a block of queries, whose last position is that of the last key.

        Args:
            queries: Shape (rows * num_keys, positions * group, size).
            keys: Shape (rows * num_keys, visible, size).

        Returns:
            Shape (rows * num_keys, positions * group, visible).
        """
        scores = torch.baddbmm(queries.new_empty(()), queries, keys.transpose(1, 2), beta=0, alpha=self.layout.scale)
        positions = queries.shape[1] // self.group
        future = scores.new_full((positions, positions), -torch.inf).triu_(1).unsqueeze(1)
        scores.view(len(scores), positions, self.group, -1)[..., -positions:].add_(future)
        return torch.softmax(scores, dim=-1)


def _segments(layout: HeadLayout, batch: PackedBatch) -> list[_Segment]:
    suffixes = _Segment(layout, batch, is_prefix=False)
    return [_Segment(layout, batch, is_prefix=True), suffixes] if batch.prefix_length else [suffixes]
