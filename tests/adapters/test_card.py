"""Model cards: valid for the hub, and complete for readers."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel

from snake_lora_pl.adapters import store
from snake_lora_pl.adapters.card import merged_model_card, model_card

TABLE: dict[str, Any] = {
    "settings": {"base_model": "/home/me/base", "adapter": "/home/me/run", "num_games": 2},
    "adapters": {"adapter": {"directory": "/home/me/run", "style": "compact"}},
    "players": {
        "adapter": {"reading": "generate", "apples_mean": 12.25, "apples_low": 9.0, "win_rate": 0.5, "num_games": 2},
        "base": {"reading": "generate", "apples_mean": 0.0, "win_rate": 0.0, "num_games": 2},
    },
    "differences": {},
}


def on_the_hub(adapter_dir: Path) -> store.AdapterMetadata:
    return dataclasses.replace(store.read_metadata(adapter_dir), base_model="owner/name", base_model_name="short")


def test_card_is_valid_for_the_hub(adapter_dir: Path) -> None:
    for text in (model_card(on_the_hub(adapter_dir)), merged_model_card(on_the_hub(adapter_dir), "bfloat16")):
        card = ModelCard(text, ignore_metadata_errors=False)
        assert card.data.base_model == "owner/name"
        assert card.data.pipeline_tag == "text-generation"
        (result,) = card.data.eval_results or []
        assert (result.metric_type, result.metric_value) == ("val/loss", 0.25)
        assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


def test_card_lists_settings_data_metrics_and_versions(adapter_dir: Path) -> None:
    card = ModelCard.load(adapter_dir / store.CARD_FILE)
    assert card.data.library_name == "peft"
    metadata = store.read_metadata(adapter_dir)
    for part in (
        "12 optimizer steps",
        "| rank | 4 |",
        "| alpha | 32 |",
        "| board | 10x10 |",
        "| data_hash | abc |",
        "| template | instruction |",
        "| val/loss | 0.25 |",
        f"peft {metadata.packages['peft']}",
        str(metadata.base_sha256),
    ):
        assert part in card.text


def test_local_base_is_not_presented_as_a_hub_id(adapter_dir: Path, tiny_llama_dir: Path) -> None:
    card = ModelCard.load(adapter_dir / store.CARD_FILE)
    assert card.data.base_model is None
    assert card.data.tags == ["snake", "lora"]
    assert str(tiny_llama_dir) not in card.data.to_yaml()
    assert f"Trained on `{tiny_llama_dir}`" in card.text
    assert "huggingface.co" not in card.text


def test_code_in_the_card_loads_the_adapter(adapter_dir: Path, model: PeftModel) -> None:
    text = (adapter_dir / store.CARD_FILE).read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(code.strip().splitlines()) == 5
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/directory", str(adapter_dir)), names)
    ids = names["tokenizer"]("UP", return_tensors="pt").input_ids
    assert torch.equal(names["model"](ids).logits, model(ids).logits)


def test_games_are_recorded_as_metrics_and_as_a_table_in_the_card(adapter_dir: Path) -> None:
    store.record_play(adapter_dir, TABLE, "adapter")
    metadata = store.verify(adapter_dir)
    assert metadata.metrics["play/apples_mean"] == 12.25
    assert metadata.metrics["val/loss"] == 0.25
    assert metadata.play["players"] == TABLE["players"]
    assert "/home/me" not in json.dumps(metadata.play)
    text = (adapter_dir / store.CARD_FILE).read_text()
    assert "| | adapter | base |" in text
    assert "| apples, mean | 12.2 | 0.0 |" in text
    assert "| 95% interval, lower bound | 9.0 | - |" in text
    assert "| style | compact |" in text
    assert {result.metric_type for result in ModelCard(text).data.eval_results or []} == {
        "val/loss",
        "play/apples_mean",
    }


def test_later_games_replace_earlier_games(adapter_dir: Path) -> None:
    store.record_play(adapter_dir, TABLE, "adapter")
    players = {"a": {"apples_mean": 1.0}}
    store.record_play(adapter_dir, {"settings": {}, "adapters": {}, "players": players}, "a")
    metrics = store.read_metadata(adapter_dir).metrics
    assert {name: value for name, value in metrics.items() if name.startswith("play/")} == {"play/apples_mean": 1.0}


def test_untrusted_text_cannot_break_a_table(adapter_dir: Path) -> None:
    metadata = dataclasses.replace(
        store.read_metadata(adapter_dir), data={"template": "a|b\nc", "num_skipped": {"x": 3}}
    )
    assert "| template | a\\|b c |" in model_card(metadata)
    assert "| num_skipped | x: 3 |" in model_card(metadata)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({}, "vllm serve owner/name --enable-lora --max-lora-rank 8 --lora-modules snake=path/to/this/directory"),
        ({"use_dora": True}, "(vLLM does not support DoRA): merge it first"),
    ],
)
def test_card_has_the_vllm_command_or_the_obstacles(adapter_dir: Path, changes: dict[str, Any], part: str) -> None:
    metadata = on_the_hub(adapter_dir)
    metadata = dataclasses.replace(metadata, peft_config={**metadata.peft_config, **changes})
    assert part in model_card(metadata)


def test_card_of_an_adapter_of_a_quantized_base_lists_the_quantization(adapter_dir: Path) -> None:
    metadata = dataclasses.replace(store.read_metadata(adapter_dir), quantization={"bits": 4, "quant_type": "nf4"})
    text = model_card(metadata)
    assert "| base quantization | bits: 4, quant_type: nf4 |" in text
    assert "4-bit base" in text
    assert "4-bit" not in model_card(store.read_metadata(adapter_dir))
