from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import eager_attention_forward

from snake_lora_pl.decoding.grouped_attention import grouped, grouped_attention, is_grouped
from snake_lora_pl.decoding.transformers_internals import attention_implementation


class Layer(nn.Module):
    def __init__(self, num_groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = num_groups


def tensors(num_groups: int, num_tokens: int, num_positions: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    batch, key_heads, width = 3, 2, 8
    query = torch.randn(batch, num_groups * key_heads, num_tokens, width, generator=generator)
    key, value = torch.randn(2, batch, key_heads, num_positions, width, generator=generator)
    ends = torch.tensor([num_positions, num_positions - 2, num_positions - 3])
    positions = ends[:, None] - num_tokens + torch.arange(num_tokens)
    return query, key, value, positions


@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("num_tokens", [1, 4])
@pytest.mark.parametrize("sliding_window", [None, 5, 100])
def test_grouped_attention_equals_eager_attention(num_groups: int, num_tokens: int, sliding_window: int | None) -> None:
    query, key, value, positions = tensors(num_groups, num_tokens, num_positions=11)
    columns = torch.arange(11)
    mask = columns <= positions[:, None, :, None]
    visible = mask if sliding_window is None else mask & (columns > positions[:, None, :, None] - sliding_window)
    layer = Layer(num_groups).eval()
    grouped_output, _ = grouped_attention(layer, query, key, value, mask, scaling=0.3, sliding_window=sliding_window)
    additive = torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))
    eager_output, _ = eager_attention_forward(layer, query, key, value, additive, scaling=0.3)
    torch.testing.assert_close(grouped_output, eager_output)


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_layers_with_unsupported_features_are_rejected(name: str) -> None:
    query, key, value, positions = tensors(1, 1, 4)
    with pytest.raises(NotImplementedError, match=f"Layer.*{name}"):
        grouped_attention(Layer(1), query, key, value, positions, **{name: 30.0})


def test_model_uses_grouped_attention_only_inside_the_block() -> None:
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    model = LlamaForCausalLM(config)
    before = attention_implementation(model)
    with pytest.raises(RuntimeError, match="lost"), grouped(model):
        assert is_grouped(model)
        raise RuntimeError("lost")
    assert attention_implementation(model) == before
    assert not is_grouped(model)
