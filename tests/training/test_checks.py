from __future__ import annotations

from typing import Any

import pytest

from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.errors import UserError
from snake_lora_pl.models import QuantizationConfig
from snake_lora_pl.training import checks


def test_all_invalid_settings_are_reported_at_once(make_module) -> None:
    with pytest.raises(UserError) as error:
        make_module(
            learning_rate=-1.0,
            weight_decay=-1.0,
            warmup_steps=-1,
            adapter_type="lorra",
            betas=(0.9, 1.0),
            final_learning_rate_fraction=2.0,
            max_new_tokens=0,
            loss_chunk_tokens=2**21,
        )
    for key in (
        "learning_rate", "weight_decay", "warmup_steps", "adapter_type", "betas", "final_learning_rate_fraction",
        "max_new_tokens", "loss_chunk_tokens",
    ):  # fmt: skip
        assert f"model.{key} must be" in str(error.value)


@pytest.mark.parametrize(
    ("adapter_type", "settings", "expected"),
    [
        ("qlora", {"quantization": QuantizationConfig(bits=8)}, r"8-bit.*ddp\.yaml.*bits=4"),
        ("adalora", {}, r"adalora.*ddp\.yaml"),
        ("lora", {"init_lora_weights": "orthogonal", "use_dora": True}, None),
        ("qlora", {}, None),
        ("qlora", {"quantization": QuantizationConfig(storage_dtype="bfloat16")}, None),
    ],
)
def test_models_that_cannot_be_sharded_are_refused(
    make_module, adapter_type: str, settings: dict[str, Any], expected: str | None
) -> None:
    module = make_module(adapter_type=adapter_type, lora=LoRAConfig(rank=4, alpha=8, **settings))
    module.configure_model()
    if expected is None:
        checks.check_shardable(module.peft_model, adapter_type, module.lora)
        return
    with pytest.raises(UserError, match=rf"trainer\.strategy: .*{expected}"):
        checks.check_shardable(module.peft_model, adapter_type, module.lora)


def test_tokenizer_with_more_tokens_than_embeddings_is_refused(make_module) -> None:
    module = make_module()
    module.configure_model()
    module.tokenizer.add_tokens(["<new>"])
    with pytest.raises(UserError, match=r"model\.base_model NAME: .*385.*384"):
        checks.check_vocabulary(module.peft_model, module.tokenizer, "NAME")


def test_prompt_longer_than_the_model_reads_names_its_row(make_module) -> None:
    module = make_module()
    module.configure_model()
    batch = {"input_ids": [[5] * 2048, [5] * 2049], "sources": ["f:1", "f:2"]}
    with pytest.raises(UserError, match=r"^f:2: .*2,049.*2,048"):
        checks.check_prompt_lengths(batch, module.peft_model)
    checks.check_prompt_lengths({"input_ids": [[5] * 2048], "sources": ["f:1"]}, module.peft_model)
