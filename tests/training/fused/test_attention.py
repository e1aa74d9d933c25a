from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from snake_lora_pl.constants import IGNORE_INDEX
from snake_lora_pl.training.fused import attention
from snake_lora_pl.training.fused.attention import BlockAttention, HeadLayout, sdpa_attention
from snake_lora_pl.training.packing import PackedBatch, pack

LAYOUT = HeadLayout(num_queries=6, num_keys=2, size=8, scale=8**-0.5)


def make_batch(lengths: list[int], prefix: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(sum(lengths) + prefix)
    input_ids = torch.randint(10, 90, (len(lengths), max(lengths) + 1), generator=generator)
    input_ids[:, :prefix] = input_ids[0, :prefix].clone()
    input_ids[:, prefix] = torch.arange(len(lengths))
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for row, length in enumerate(lengths):
        labels[row, length] = 1
    batch = pack(input_ids, labels)
    assert batch is not None
    assert batch.prefix_length == (min(prefix, min(lengths) - 1) if len(lengths) > 1 else 0)
    return batch


def make_inputs(batch: PackedBatch, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = len(batch.token_ids)
    qkv = torch.randn(tokens, (LAYOUT.num_queries + 2 * LAYOUT.num_keys) * LAYOUT.size, generator=generator).to(dtype)
    angles = batch.position_ids[:, None] * 0.3 ** torch.arange(LAYOUT.size // 2)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return qkv.requires_grad_(), angles.cos().to(dtype), angles.sin().to(dtype)


def plain_attention(qkv: Tensor, cos: Tensor, sin: Tensor, batch: PackedBatch) -> Tensor:
    """Compute attention with one mask over all packed tokens and one softmax."""
    tokens = len(batch.token_ids)
    x = qkv.view(tokens, -1, LAYOUT.size)
    a, b = x.chunk(2, dim=-1)
    rotated = x * cos + torch.cat([-b, a], dim=-1) * sin
    q, k = rotated[:, : LAYOUT.num_queries], rotated[:, LAYOUT.num_queries : LAYOUT.num_queries + LAYOUT.num_keys]
    v = x[:, -LAYOUT.num_keys :]
    prefix = batch.prefix_length
    positions = batch.suffix_index if batch.suffix_index.numel() else torch.arange(tokens - prefix)
    row = torch.cat([torch.full((prefix,), -1), positions // batch.suffix_length])  # -1 for the prefix
    order = torch.arange(tokens)
    sees = ((row[:, None] == row) | (row == -1)) & (order <= order[:, None])
    k, v = (t.repeat_interleave(LAYOUT.num_queries // LAYOUT.num_keys, dim=1) for t in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k).mul(LAYOUT.scale).masked_fill(~sees, -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)


@pytest.mark.parametrize(
    ("lengths", "prefix"), [([9], 0), ([5, 5, 5], 3), ([12, 4, 9], 0), ([12, 7, 9], 5), ([1, 6], 2)]
)
@pytest.mark.parametrize("block", [4, 96])
@pytest.mark.parametrize("keep", [0, 512])
@pytest.mark.parametrize("function", [BlockAttention.apply, sdpa_attention])
def test_attention_and_its_gradient_equal_those_of_masked_attention(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], prefix: int, block: int, keep: int, function
) -> None:
    monkeypatch.setattr(attention, "BLOCK_POSITIONS", block)
    monkeypatch.setattr(attention, "KEEP_PROBABILITIES", keep)
    batch = make_batch(lengths, prefix)
    qkv, cos, sin = make_inputs(batch)
    output = function(qkv, cos, sin, LAYOUT, batch)
    expected = plain_attention(qkv, cos, sin, batch)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (grad,) = torch.autograd.grad(output, qkv, upstream)
    (expected_grad,) = torch.autograd.grad(expected, qkv, upstream)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)


def test_rotation_is_orthogonal() -> None:
    batch = make_batch([7], 0)
    qkv, cos, sin = make_inputs(batch)
    x = qkv.detach().view(7, -1, LAYOUT.size)
    rotated = attention.rotate(x, cos, sin)
    torch.testing.assert_close(attention.rotate(rotated, cos, sin, inverse=True), x)
    assert not torch.allclose(rotated[1:], x[1:])


def test_block_attention_agrees_with_sdpa_in_bfloat16() -> None:
    batch = make_batch([60, 44, 52], 20)
    qkv, cos, sin = make_inputs(batch, torch.bfloat16)
    output = BlockAttention.apply(qkv, cos, sin, LAYOUT, batch)
    torch.testing.assert_close(
        output.float(), sdpa_attention(qkv, cos, sin, LAYOUT, batch).float(), rtol=2e-2, atol=2e-2
    )


def test_attention_of_one_row_equals_causal_sdpa() -> None:
    batch = make_batch([11], 0)
    qkv, cos, sin = make_inputs(batch)
    cos, sin = torch.ones_like(cos), torch.zeros_like(sin)  # no rotation
    q, k, v = (
        qkv.view(11, -1, LAYOUT.size).transpose(0, 1).split([LAYOUT.num_queries, LAYOUT.num_keys, LAYOUT.num_keys])
    )
    expected = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)
    torch.testing.assert_close(
        BlockAttention.apply(qkv, cos, sin, LAYOUT, batch), expected[0].transpose(0, 1).flatten(1), rtol=1e-5, atol=1e-6
    )
