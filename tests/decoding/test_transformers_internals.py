"""Each private or version-dependent name of transformers works, and is still needed."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch
from transformers import (
    DynamicCache,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from snake_lora_pl.decoding.transformers_internals import (
    attention_implementation,
    cache_argument_name,
    can_set_attention_implementation,
)

SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}


def test_attention_implementation_is_the_one_that_was_set() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert attention_implementation(model) == name


def test_only_architectures_with_the_attention_interface_can_set_it() -> None:
    assert can_set_attention_implementation(LlamaForCausalLM(LlamaConfig(**SHAPE)))
    config = GPTNeoConfig(hidden_size=8, num_layers=1, num_heads=2, attention_types=[[["global"], 1]], vocab_size=9)
    assert not can_set_attention_implementation(GPTNeoForCausalLM(config))


def test_no_public_name_replaces_the_private_ones() -> None:
    assert not hasattr(PreTrainedConfig(), "attn_implementation")
    assert not hasattr(PreTrainedModel, "can_set_attn_implementation")


def test_model_takes_its_cache_by_the_name_that_is_not_deprecated() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = model(input_ids=torch.tensor([[1]]), **{cache_argument_name(model): DynamicCache()})
    assert output.logits.shape == (1, 1, 9)


def test_name_is_found_behind_a_forward_that_does_not_name_it() -> None:
    class New(LlamaForCausalLM):
        def forward(self, cache: object = None, **kwargs: object) -> None: ...

    class Old(LlamaForCausalLM):
        def forward(self, past_key_values: object = None, **kwargs: object) -> None: ...

    for parent, name in ((New, "cache"), (Old, "past_key_values")):

        class Child(parent):  # type: ignore[misc,valid-type]
            def forward(self, **kwargs: object) -> None: ...

        assert cache_argument_name(Child(LlamaConfig(**SHAPE))) == name


def test_oldest_supported_version_still_has_the_old_name() -> None:
    (minor,) = re.findall(r'"transformers>=5\.(\d+)', (Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert int(minor) < 24
