"""Causal attention over a packed batch: a row sees the shared head and itself, never another row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

from snake_lora_pl.training.packing import PackedBatch

# Positions that attend at once; what lies above the diagonal is computed only within such a block.
BLOCK_POSITIONS = 96
# Length of rows up to which probabilities are kept for the backward pass.
KEEP_PROBABILITIES = 512


class Heads(NamedTuple):
    """How queries, keys and values lie side by side in one tensor.

    Args:
        queries: Query heads.
        keys: Key heads, as many as value heads; divides ``queries``.
        size: Features of a head.
        scale: Factor of the scores.
    """

    queries: int
    keys: int
    size: int
    scale: float


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotary position embedding with the halves of a head as pairs, as Llama has it (https://arxiv.org/abs/2104.09864).

    Args:
        x: Shape (T, heads, size).
        cos: Shape (T, 1, size), its two halves equal.
        sin: Likewise.
        inverse: Rotate back; the transpose, so also the backward pass.
    """
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    c, s = cos[..., :half], sin[..., :half]
    output = torch.empty_like(x)
    sign = -1 if inverse else 1
    torch.mul(a, c, out=output[..., :half]).addcmul_(b, s, value=-sign)
    torch.mul(b, c, out=output[..., half:]).addcmul_(a, s, value=sign)
    return output


def attend(qkv: Tensor, cos: Tensor, sin: Tensor, heads: Heads, batch: PackedBatch) -> Tensor:
    """Rotate queries and keys by position and attend.

    Args:
        qkv: Queries, keys and values side by side; shape (T, (queries + 2 * keys) * size).
        cos: Shape (T, 1, size).
        sin: Shape (T, 1, size).
        heads: How ``qkv`` is divided.
        batch: Which token stands where.

    Returns:
        Shape (T, queries * size).
    """
    if qkv.device.type == "cpu":
        return BlockAttention.apply(qkv, cos, sin, heads, batch)
    return fused_kernel_attention(qkv, cos, sin, heads, batch)


def fused_kernel_attention(qkv: Tensor, cos: Tensor, sin: Tensor, heads: Heads, batch: PackedBatch) -> Tensor:
    """As ``attend``, through torch's scaled-dot-product attention on rows that are padded for it alone."""
    x = qkv.unflatten(-1, (-1, heads.size))
    qk, values = x[:, : heads.queries + heads.keys], x[:, heads.queries + heads.keys :]
    a, b = qk.chunk(2, dim=-1)
    rotated = qk * cos + torch.cat([-b, a], dim=-1) * sin
    packed = torch.cat([rotated, values], dim=1)
    # The head's queries are computed for every row and read from the first: the kernel wants square scores.
    shared = packed[: batch.head_length].expand(batch.num_rows, -1, -1, -1)
    rows = torch.cat([shared, batch.rests(packed)], dim=1).transpose(1, 2)
    q, k, v = rows.split([heads.queries, heads.keys, heads.keys], dim=1)  # (B, heads, length, size)
    output = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=heads.scale, enable_gqa=heads.keys != heads.queries
    )
    output = output.transpose(1, 2).flatten(2)  # (B, length, queries * size)
    return torch.cat([output[0, : batch.head_length], batch.without_padding(output[:, batch.head_length :])])


class BlockAttention(torch.autograd.Function):
    """Rotary embedding and attention by plain products of matrices, block of queries by block.

    On a CPU torch's fused kernel takes three times as long (torch 2.13, bfloat16, heads of 64 features). Scores
    are rounded to the inputs' type, as in transformers' ``eager`` attention.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: Heads, batch: PackedBatch) -> Tensor:
        """As ``attend``."""
        x = qkv.unflatten(-1, (-1, heads.size))
        rotated = rotary(x[:, : -heads.keys], cos, sin)
        values = x[:, -heads.keys :]
        # Few enough to keep while rows are short; otherwise computed again in the backward pass, so that memory grows
        # with the rows' length and not with its square.
        keep = ctx.needs_input_grad[0] and batch.head_length + batch.rest_length <= KEEP_PROBABILITIES
        outputs, kept = [], []
        for part in _parts(heads, batch):
            queries = part.spread_queries(rotated[:, : heads.queries])
            keys = part.spread_keys(rotated[:, heads.queries :])
            spread_values = part.spread_keys(values)
            output = torch.empty_like(queries)
            for span, end in part.blocks():
                probabilities = part.probabilities(queries[:, span], keys[:, :end])
                torch.bmm(probabilities, spread_values[:, :end], out=output[:, span])
                if keep:
                    kept.append(probabilities)
            outputs.append(part.gather_queries(output))
        ctx.heads, ctx.batch = heads, batch
        ctx.save_for_backward(rotated, values, cos, sin, *kept)
        return torch.cat(outputs).flatten(1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        """The gradient of qkv."""
        rotated, values, cos, sin, *kept = ctx.saved_tensors
        kept_blocks = iter(kept)
        heads: Heads = ctx.heads
        grad_output = grad_outputs[0].view(-1, heads.queries, heads.size)
        grad_queries, grad_keys, grad_values = [], torch.zeros_like(values), torch.zeros_like(values)
        for part in _parts(heads, ctx.batch):
            queries = part.spread_queries(rotated[:, : heads.queries])
            keys = part.spread_keys(rotated[:, heads.queries :])
            spread_values = part.spread_keys(values)
            grad_out = part.spread_queries(grad_output, padding=0)
            grad_q, grad_k, grad_v = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(keys)
            for span, end in part.blocks():
                probabilities = next(kept_blocks, None)
                if probabilities is None:
                    probabilities = part.probabilities(queries[:, span], keys[:, :end])
                grad_block = grad_out[:, span]
                grad_v[:, :end].baddbmm_(probabilities.transpose(1, 2), grad_block)
                grad_probabilities = torch.bmm(grad_block, spread_values[:, :end].transpose(1, 2))
                grad_scores = torch._softmax_backward_data(grad_probabilities, probabilities, -1, keys.dtype)
                torch.bmm(grad_scores, keys[:, :end], out=grad_q[:, span])
                grad_k[:, :end].baddbmm_(grad_scores.transpose(1, 2), queries[:, span])
            grad_queries.append(part.gather_queries(grad_q.mul_(heads.scale)))
            part.add_keys(grad_keys, grad_k.mul_(heads.scale))
            part.add_keys(grad_values, grad_v)
        grad_rotated = torch.cat([torch.cat(grad_queries), grad_keys], dim=1)
        grad = torch.cat([rotary(grad_rotated, cos, sin, inverse=True), grad_values], dim=1)
        return grad.flatten(1), None, None, None, None


class _Part:
    """Queries that stand at the same positions in every row, and the keys up to them: the head, or the rests.

    Spread tensors have rows and key heads as their batch: queries (rows * keys, length * group, size), where the
    ``group`` query heads of a key head stand side by side at each position, and keys (rows * keys, start + length,
    size). So a block of queries is a slice, and one product serves the whole group.
    """

    def __init__(self, heads: Heads, batch: PackedBatch, *, is_head: bool) -> None:
        self.heads, self.batch, self.is_head = heads, batch, is_head
        self.rows = 1 if is_head else batch.num_rows
        self.start = 0 if is_head else batch.head_length
        self.tokens = slice(0, batch.head_length) if is_head else slice(batch.head_length, None)
        self.group = heads.queries // heads.keys

    def _to_rows(self, x: Tensor, padding: int | None) -> Tensor:
        """Its tokens of x, (T, n, size), as (rows, length, n, size); padding None leaves any token's value there."""
        if self.is_head:
            return x[self.tokens][None]
        if padding is None or not self.batch.rest_index.numel():
            return self.batch.rests(x)
        padded = x.new_full((len(self.batch.padded_index), *x.shape[1:]), padding)
        return padded.index_copy_(0, self.batch.rest_index, x[self.tokens]).unflatten(0, (self.rows, -1))

    def _to_tokens(self, rows: Tensor) -> Tensor:
        """The inverse of ``_to_rows``: (number of its tokens, n, size)."""
        return rows[0] if self.is_head else self.batch.without_padding(rows)

    def spread_queries(self, x: Tensor, padding: int | None = None) -> Tensor:
        rows = self._to_rows(x, padding).unflatten(2, (self.heads.keys, self.group))
        return rows.transpose(1, 2).flatten(2, 3).flatten(0, 1).contiguous()

    def gather_queries(self, spread: Tensor) -> Tensor:
        rows = spread.unflatten(1, (-1, self.group)).unflatten(0, (self.rows, self.heads.keys))
        return self._to_tokens(rows.transpose(1, 2).flatten(2, 3))

    def spread_keys(self, x: Tensor) -> Tensor:
        head = x[: self.start].expand(self.rows, -1, -1, -1)
        rows = torch.cat([head, self._to_rows(x, None)], dim=1)
        return rows.transpose(1, 2).flatten(0, 1).contiguous()

    def add_keys(self, total: Tensor, spread: Tensor) -> None:
        """Add what keys received to ``total``, (T, keys, size); the head's receive from every row."""
        rows = spread.unflatten(0, (self.rows, self.heads.keys)).transpose(1, 2)
        total[: self.start] += rows[:, : self.start].sum(dim=0)
        total[self.tokens] += self._to_tokens(rows[:, self.start :])

    def blocks(self) -> Iterator[tuple[slice, int]]:
        """Where the queries of each block lie, and the number of keys that its last position sees."""
        length = self.batch.head_length if self.is_head else self.batch.rest_length
        for begin in range(0, length, BLOCK_POSITIONS):
            end = min(begin + BLOCK_POSITIONS, length)
            yield slice(begin * self.group, end * self.group), self.start + end

    def probabilities(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Attention of a block of queries, the last of which stands at the last key: (rows * keys, queries, keys)."""
        scores = torch.baddbmm(queries.new_empty(()), queries, keys.transpose(1, 2), beta=0, alpha=self.heads.scale)
        positions = queries.shape[1] // self.group
        future = scores.new_full((positions, positions), -torch.inf).triu_(1).unsqueeze(1)
        scores.unflatten(1, (positions, self.group))[..., -positions:].add_(future)
        return torch.softmax(scores, dim=-1)


def _parts(heads: Heads, batch: PackedBatch) -> list[_Part]:
    rests = _Part(heads, batch, is_head=False)
    return [_Part(heads, batch, is_head=True), rests] if batch.head_length else [rests]
