from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from snake_lora_pl.models.limits import context_length


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        ("llama", {"max_position_embeddings": 64}, 64),
        ("gpt2", {"n_positions": 128}, 128),
        ("mpt", {"max_seq_len": 128}, 128),
        ("bloom", {}, None),
        ("mamba", {}, None),
        ("xlnet", {}, None),
        ("falcon", {"alibi": True}, None),
        ("falcon", {"alibi": False, "max_position_embeddings": 64}, 64),
        ("llama", {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 256),
        ("llama", {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 128),
        # The config states the lifted limit.
        (
            "qwen2",
            {
                "max_position_embeddings": 256,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            },
            256,
        ),
        ("gemma3", {"text_config": {"max_position_embeddings": 96}}, 96),
    ],
)
def test_context_length_is_that_of_the_positions(model_type: str, settings: dict[str, Any], expected: int) -> None:
    assert context_length(AutoConfig.for_model(model_type, **settings)) == expected
