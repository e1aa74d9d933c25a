"""Attention for decoding: heads that share keys are asked together, so that the cache is read once and never copied.

With grouped-query attention transformers repeats keys and values for every head before it calls PyTorch, which copies
the whole cache in every layer of every pass. Here the queries of a group stand one below the other instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

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
    """Scaled-dot-product attention in the form that transformers' ``AttentionInterface`` asks for.

    Args:
        module: The attention layer.
        query: Shape (batch, heads, tokens, head_dim).
        key: Shape (batch, key_heads, places, head_dim).
        value: Shape (batch, key_heads, places, head_dim).
        attention_mask: bool of shape (batch, 1, tokens, places): for each token, its own place and all before it.
        scaling: Factor of the products; None for one over the root of ``head_dim``.
        sliding_window: Places that a token sees at most, its own included; None for all.
        kwargs: What else layers pass on.

    Returns:
        Shape (batch, tokens, heads, head_dim), and None in place of weights.

    Raises:
        NotImplementedError: If the layer caps its products or has attention sinks.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{type(module).__name__} uses {name}")
    batch, heads, tokens, head_dim = query.shape
    key_heads, places = key.shape[1:3]
    groups = heads // key_heads
    if sliding_window is not None and places > sliding_window:
        ends = attention_mask.sum(dim=-1, keepdim=True)
        attention_mask = attention_mask & (torch.arange(places, device=ends.device) >= ends - sliding_window)
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
    """Let a model attend by ``grouped_attention`` for a while, if its architecture takes any attention but its own."""
    before = model.config._attn_implementation
    if model._can_set_attn_implementation():
        model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def is_grouped(model: PreTrainedModel) -> bool:
    """Whether a model attends by ``grouped_attention`` now."""
    return bool(model.config._attn_implementation == _NAME)
