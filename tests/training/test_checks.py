from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.errors import UserError
from snake_lora_pl.models import QuantizationConfig
from snake_lora_pl.training import checks
from tests.architectures import save_model
from tests.training.conftest import make_loader, make_rows, make_trainer


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


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("bf16-mixed", "bfloat16"),
        ("bf16-true", "bfloat16"),
        ("16-mixed", "float16"),
        (16, "float16"),
        ("64-true", "auto"),
    ],
)
def test_precision_other_than_float32_is_refused_and_the_dtype_of_the_base_named(
    precision: str | int, dtype: str
) -> None:
    with pytest.raises(UserError, match=rf"trainer\.precision={precision}: .*model\.dtype={dtype}\."):
        checks.check_precision(precision)


@pytest.mark.parametrize("precision", [None, 32, "32", "32-true"])
def test_default_precision_is_accepted(precision: str | int | None) -> None:
    checks.check_precision(precision)


def test_module_refuses_a_trainer_of_another_precision(make_module, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, precision="bf16-true")
    with pytest.raises(UserError, match=r"trainer\.precision=bf16-true"):
        trainer.fit(make_module(), make_loader(make_rows(2), 2))


def test_tokenizer_with_more_tokens_than_embeddings_is_refused(make_module) -> None:
    module = make_module()
    module.configure_model()
    module.tokenizer.add_tokens(["<new>"])
    with pytest.raises(UserError, match=r"model\.base_model NAME: .*385.*384"):
        checks.check_vocabulary(module.peft_model, module.tokenizer, "NAME")


class Row(NamedTuple):
    input_ids: list[int]
    source: str


def test_row_longer_than_the_model_reads_is_named(make_module) -> None:
    module = make_module()
    module.configure_model()
    module.check_rows([Row([5] * 2048, "f:1")])
    with pytest.raises(UserError, match=r"^f:2: .*2,049.*2,048.*data\.max_length=2048"):
        module.check_rows([Row([5] * 2048, "f:1"), Row([5] * 2049, "f:2")])


def test_token_without_an_embedding_is_named(make_module) -> None:
    module = make_module()
    module.configure_model()
    module.tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    module.check_rows([Row([383], "f:1")])
    with pytest.raises(UserError, match=r"^f:2: .*<\|user\|>.* 384"):
        module.check_rows([Row([5, 5], "f:1"), Row([384], "f:2")])
    with pytest.raises(UserError, match=r"^f:2: .*<\|user\|>.* 384"):
        module.check_prompts({"f:1": [5, 5], "f:2": [384]})


def test_longest_prompt_and_its_completion_must_fit(make_module) -> None:
    module = make_module(max_new_tokens=48)
    module.configure_model()
    module.check_prompts({"f:1": [5] * 2000})
    with pytest.raises(UserError, match=r"^f:2: .*2,001.*model\.max_new_tokens.*2,048.*at most 47"):
        module.check_prompts({"f:1": [5], "f:2": [5] * 2001})


def test_padding_beyond_the_last_position_is_ignored(make_module, tiny_llama_dir: Path, tmp_path: Path) -> None:
    directory = save_model("gpt2", tmp_path / "model", tiny_llama_dir, n_positions=13)
    module = make_module(base_model=str(directory))
    module.configure_model()
    module.peft_model.eval()  # without dropout
    ids = torch.arange(3, 16)[None]
    whole = {"input_ids": ids, "labels": ids, "sources": ["f:1"]}
    padded = {"input_ids": F.pad(ids, (0, 3), value=2), "labels": F.pad(ids, (0, 3), value=-100), "sources": ["f:1"]}
    torch.testing.assert_close(module.training_step(padded, 0), module.training_step(whole, 0))
