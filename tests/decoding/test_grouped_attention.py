from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import eager_attention_forward

from snake_lora_pl.decoding.grouped_attention import grouped, grouped_attention, is_grouped


class Layer(nn.Module):
    def __init__(self, num_groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = num_groups


def tensors(num_groups: int, num_tokens: int, num_places: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    batch, key_heads, width = 3, 2, 8
    query = torch.randn(batch, num_groups * key_heads, num_tokens, width, generator=generator)
    key, value = torch.randn(2, batch, key_heads, num_places, width, generator=generator)
    ends = torch.tensor([num_places, num_places - 2, num_places - 3])
    positions = ends[:, None] - num_tokens + torch.arange(num_tokens)
    return query, key, value, positions


@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("num_tokens", [1, 4])
@pytest.mark.parametrize("sliding_window", [None, 5, 100])
def test_it_is_plain_attention(num_groups: int, num_tokens: int, sliding_window: int | None) -> None:
    query, key, value, positions = tensors(num_groups, num_tokens, num_places=11)
    places = torch.arange(11)
    mask = places <= positions[:, None, :, None]
    seen = mask if sliding_window is None else mask & (places > positions[:, None, :, None] - sliding_window)
    layer = Layer(num_groups).eval()
    ours, _ = grouped_attention(layer, query, key, value, mask, scaling=0.3, sliding_window=sliding_window)
    additive = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))
    plain, _ = eager_attention_forward(layer, query, key, value, additive, scaling=0.3)
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_layers_that_do_more_are_refused(name: str) -> None:
    query, key, value, positions = tensors(1, 1, 4)
    with pytest.raises(NotImplementedError, match=f"Layer uses {name}"):
        grouped_attention(Layer(1), query, key, value, positions, **{name: 30.0})


def test_a_model_attends_so_for_a_while_and_then_as_before() -> None:
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    model = LlamaForCausalLM(config)
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="lost"), grouped(model):
        assert is_grouped(model)
        raise RuntimeError("lost")
    assert model.config._attn_implementation == before
    assert not is_grouped(model)
