from __future__ import annotations

from pathlib import Path

import pytest

from snake_lora_pl.errors import UserError
from snake_lora_pl.models import load_base_model
from snake_lora_pl.models.causality import is_causal
from tests.architectures import build_model, save_model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "xlnet", "xlm", "t5"])
def test_models_that_are_not_causal_are_refused(
    tiny_llama_dir: Path, tmp_path: Path, model_type: str, dtype: str
) -> None:
    directory = save_model(model_type, tmp_path / "model", tiny_llama_dir)
    with pytest.raises(UserError, match=rf"(?i) {model_type}\w* is not a causal language model"):
        load_base_model(str(directory), dtype=dtype)


def test_architecture_without_language_model_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    directory = save_model("llama", tmp_path / "model", tiny_llama_dir)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(image_size=32, **sizes)).save_pretrained(directory)
    with pytest.raises(UserError, match="ViT is not a causal language model"):
        load_base_model(str(directory))


# Kinds of layers that mix tokens, each in its own way.
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "mixtral", "mamba2", "recurrent_gemma", "qwen3_next"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_causal_models_are_accepted(model_type: str, dtype: str) -> None:
    import torch

    assert is_causal(build_model(model_type).to(getattr(torch, dtype)))


def test_bert_is_causal_as_a_decoder() -> None:
    assert is_causal(build_model("bert", is_decoder=True))
    assert not is_causal(build_model("bert"))
