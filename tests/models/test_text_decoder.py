from __future__ import annotations

import pytest
import torch

from snake_lora_pl.models.text_decoder import text_config, text_decoder
from tests.architectures import build_model


@pytest.mark.parametrize("model_type", ["llama", "llama4_text", "opt", "gpt2", "gemma3", "gemma4", "mllama"])
def test_output_head_on_the_text_decoder_gives_the_logits_of_the_model(model_type: str) -> None:
    model = build_model(model_type)
    ids = torch.tensor([[5, 9, 30, 7, 120, 44]])
    with torch.no_grad():
        hidden = text_decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
        logits = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(model.get_output_embeddings()(hidden), logits)


def test_text_decoder_of_a_multimodal_model_has_no_other_tower() -> None:
    model = build_model("gemma3")
    assert not any("vision" in name for name, _ in text_decoder(model).named_modules())
    assert text_config(model).model_type == "gemma3_text"
    assert text_config(build_model("llama")).model_type == "llama"
