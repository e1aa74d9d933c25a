from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from snake_lora_pl.constants import IGNORE_INDEX
from snake_lora_pl.training.fused import attention
from snake_lora_pl.training.fused.attention import BlockAttention, Heads, fused_kernel_attention
from snake_lora_pl.training.packing import PackedBatch, pack

HEADS = Heads(queries=6, keys=2, size=8, scale=8**-0.5)


def make_batch(lengths: list[int], head: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(sum(lengths) + head)
    input_ids = torch.randint(10, 90, (len(lengths), max(lengths) + 1), generator=generator)
    input_ids[:, :head] = input_ids[0, :head].clone()
    input_ids[:, head] = torch.arange(len(lengths))
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for row, length in enumerate(lengths):
        labels[row, length] = 1
    batch = pack(input_ids, labels)
    assert batch is not None
    assert batch.head_length == (min(head, min(lengths) - 1) if len(lengths) > 1 else 0)
    return batch


def make_inputs(batch: PackedBatch, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = len(batch.token_ids)
    qkv = torch.randn(tokens, (HEADS.queries + 2 * HEADS.keys) * HEADS.size, generator=generator).to(dtype)
    angles = batch.position_ids[:, None] * 0.3 ** torch.arange(HEADS.size // 2)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return qkv.requires_grad_(), angles.cos().to(dtype), angles.sin().to(dtype)


def plain_attention(qkv: Tensor, cos: Tensor, sin: Tensor, batch: PackedBatch) -> Tensor:
    """Token by token: a mask of who sees whom over all packed tokens, float64 scores, one softmax."""
    tokens = len(batch.token_ids)
    x = qkv.view(tokens, -1, HEADS.size)
    a, b = x.chunk(2, dim=-1)
    rotated = x * cos + torch.cat([-b, a], dim=-1) * sin
    q, k = rotated[:, : HEADS.queries], rotated[:, HEADS.queries : HEADS.queries + HEADS.keys]
    v = x[:, -HEADS.keys :]
    head = batch.head_length
    places = batch.rest_index if batch.rest_index.numel() else torch.arange(tokens - head)
    row = torch.cat([torch.full((head,), -1), places // batch.rest_length])
    order = torch.arange(tokens)
    sees = ((row[:, None] == row) | (row == -1)) & (order <= order[:, None])
    k, v = (t.repeat_interleave(HEADS.queries // HEADS.keys, dim=1) for t in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k).mul(HEADS.scale).masked_fill(~sees, -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)


@pytest.mark.parametrize(("lengths", "head"), [([9], 0), ([5, 5, 5], 3), ([12, 4, 9], 0), ([12, 7, 9], 5), ([1, 6], 2)])
@pytest.mark.parametrize("block", [4, 96])
@pytest.mark.parametrize("keep", [0, 512])
@pytest.mark.parametrize("function", [BlockAttention.apply, fused_kernel_attention])
def test_attention_and_its_gradient_equal_the_plain_ones(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], head: int, block: int, keep: int, function
) -> None:
    monkeypatch.setattr(attention, "BLOCK_POSITIONS", block)
    monkeypatch.setattr(attention, "KEEP_PROBABILITIES", keep)
    batch = make_batch(lengths, head)
    qkv, cos, sin = make_inputs(batch)
    output = function(qkv, cos, sin, HEADS, batch)
    expected = plain_attention(qkv, cos, sin, batch)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (grad,) = torch.autograd.grad(output, qkv, upstream)
    (expected_grad,) = torch.autograd.grad(expected, qkv, upstream)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)


def test_rotary_is_orthogonal() -> None:
    batch = make_batch([7], 0)
    qkv, cos, sin = make_inputs(batch)
    x = qkv.detach().view(7, -1, HEADS.size)
    there = attention.rotary(x, cos, sin)
    torch.testing.assert_close(attention.rotary(there, cos, sin, inverse=True), x)
    assert not torch.allclose(there[1:], x[1:])


def test_torchs_kernel_agrees_in_bfloat16() -> None:
    batch = make_batch([60, 44, 52], 20)
    qkv, cos, sin = make_inputs(batch, torch.bfloat16)
    output = BlockAttention.apply(qkv, cos, sin, HEADS, batch)
    torch.testing.assert_close(
        output.float(), fused_kernel_attention(qkv, cos, sin, HEADS, batch).float(), rtol=2e-2, atol=2e-2
    )


def test_sdpa_gives_what_it_should_for_one_row() -> None:
    batch = make_batch([11], 0)
    qkv, cos, sin = make_inputs(batch)
    cos, sin = torch.ones_like(cos), torch.zeros_like(sin)  # no rotation
    q, k, v = qkv.view(11, -1, HEADS.size).transpose(0, 1).split([HEADS.queries, HEADS.keys, HEADS.keys])
    expected = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)
    torch.testing.assert_close(
        BlockAttention.apply(qkv, cos, sin, HEADS, batch), expected[0].transpose(0, 1).flatten(1), rtol=1e-5, atol=1e-6
    )
