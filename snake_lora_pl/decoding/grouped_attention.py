"""Grouped-query attention that reads the key-value cache once and does not copy it.

With grouped-query attention, transformers repeats keys and values for every query head before it calls PyTorch, which
copies the whole cache in every layer of every pass. Here the queries of a group are stacked along the token dimension.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from snake_lora_pl.decoding.transformers_internals import attention_implementation, can_set_attention_implementation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "snake_lora_pl_grouped"


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute scaled dot-product attention with the signature of transformers' ``AttentionInterface``.

    See https://huggingface.co/docs/transformers/attention_interface.

    Args:
        module: Attention layer.
        query: Shape (batch, heads, tokens, head_dim).
        key: Shape (batch, key_heads, positions, head_dim).
        value: Shape (batch, key_heads, positions, head_dim).
        attention_mask: bool of shape (batch, 1, tokens, positions); True up to and including each token's position.
        scaling: Factor of the dot products; None for ``head_dim ** -0.5``.
        sliding_window: Number of positions that a token attends to, its own included; None for all.
        kwargs: Other arguments of attention layers.

    Returns:
        Output of shape (batch, tokens, heads, head_dim), and None in place of attention weights.

    Raises:
        NotImplementedError: If the layer uses soft-capping, attention sinks or a position bias.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{type(module).__name__} uses {name}")
    batch, heads, tokens, head_dim = query.shape
    key_heads, num_positions = key.shape[1:3]
    groups = heads // key_heads
    if sliding_window is not None and num_positions > sliding_window:
        ends = attention_mask.sum(dim=-1, keepdim=True)
        attention_mask = attention_mask & (torch.arange(num_positions, device=ends.device) >= ends - sliding_window)
    output = scaled_dot_product_attention(
        query.reshape(batch, key_heads, groups * tokens, head_dim),
        key,
        value,
        attn_mask=attention_mask.repeat(1, 1, groups, 1),
        scale=scaling,
    )
    return output.reshape(batch, heads, tokens, -1).transpose(1, 2), None


AttentionInterface.register(_NAME, grouped_attention)


@contextlib.contextmanager
def grouped(model: PreTrainedModel) -> Iterator[None]:
    """Make a model use ``grouped_attention`` in the block if its architecture supports ``AttentionInterface``."""
    before = attention_implementation(model)
    if can_set_attention_implementation(model):
        model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def is_grouped(model: PreTrainedModel) -> bool:
    """Return whether a model uses ``grouped_attention`` now."""
    return attention_implementation(model) == _NAME
