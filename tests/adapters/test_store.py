from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from snake_lora_pl.adapters import store
from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.adapters.factory import AdapterFactory
from snake_lora_pl.errors import UserError
from snake_lora_pl.models import load_tokenizer, resolve_base_model
from snake_lora_pl.models.wheel import file_sha256


@pytest.fixture
def model(tiny_llama_dir: Path) -> PeftModel:
    torch.manual_seed(0)
    model = AdapterFactory.create("lora", str(tiny_llama_dir), LoRAConfig(rank=4), dtype="float32")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


@pytest.fixture
def adapter_dir(model: PeftModel, tiny_llama_dir: Path, tmp_path: Path) -> Path:
    source = resolve_base_model(str(tiny_llama_dir))
    trainable, total = model.get_nb_trainable_parameters()
    metadata = store.AdapterMetadata(
        adapter_type="lora",
        base_model=source.canonical_id,
        base_model_name=str(tiny_llama_dir),
        base_revision=source.revision,
        base_sha256=source.sha256,
        trainable_parameters=trainable,
        total_parameters=total,
        grid_size=10,
        step=12,
        metrics={"val/loss": 0.25},
        data={"data_hash": "abc", "template": "instruction"},
    )
    return store.save(model, tmp_path / "model_artifacts", metadata, load_tokenizer(str(tiny_llama_dir)))


IDS = torch.tensor([[5, 9, 30, 7]])


def rewrite_metadata(adapter_dir: Path, **changes: Any) -> None:
    path = adapter_dir / store.METADATA_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite_weights(adapter_dir: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, adapter_dir / store.WEIGHTS_FILE)
    rewrite_metadata(adapter_dir, weights_sha256=file_sha256(adapter_dir / store.WEIGHTS_FILE))


def test_the_directory_holds_the_adapter_and_no_base_weights(adapter_dir: Path, model: PeftModel) -> None:
    names = {p.name for p in adapter_dir.iterdir()}
    assert {store.WEIGHTS_FILE, store.CONFIG_FILE, store.METADATA_FILE, store.CARD_FILE, "tokenizer.json"} <= names
    saved = load_file(adapter_dir / store.WEIGHTS_FILE)
    assert all("lora_" in name for name in saved)
    assert sum(t.numel() for t in saved.values()) == model.get_nb_trainable_parameters()[0]


def test_plain_peft_loads_the_directory_with_the_same_logits_bit_for_bit(
    adapter_dir: Path, model: PeftModel, tiny_llama_dir: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    before = base(IDS).logits.clone()
    plain = PeftModel.from_pretrained(base, adapter_dir)
    assert torch.equal(plain(IDS).logits, model(IDS).logits)
    assert not torch.equal(plain(IDS).logits, before)


def test_load_gives_the_same_logits_and_takes_the_base_from_the_metadata(adapter_dir: Path, model: PeftModel) -> None:
    loaded = AdapterFactory.load(adapter_dir, dtype="float32")
    assert torch.equal(loaded.eval()(IDS).logits, model(IDS).logits)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_load_trainable_gives_gradients_to_the_adapter_only(adapter_dir: Path) -> None:
    loaded = AdapterFactory.load(adapter_dir, is_trainable=True)
    assert {"lora_" in n for n, p in loaded.named_parameters() if p.requires_grad} == {True}


def test_metadata_is_plain_json_and_survives_a_round_trip(adapter_dir: Path) -> None:
    metadata = store.verify(adapter_dir)
    content = json.loads((adapter_dir / store.METADATA_FILE).read_text())
    assert metadata == store.AdapterMetadata(**content)
    assert metadata.peft_config["r"] == 4
    assert metadata.packages["torch"] == torch.__version__
    assert metadata.metrics == {"val/loss": 0.25}


def test_the_model_card_is_valid_and_says_what_was_trained(adapter_dir: Path) -> None:
    card = ModelCard.load(adapter_dir / store.CARD_FILE)
    assert card.data.library_name == "peft"
    assert "12 optimiser steps" in card.text
    assert "| rank | 4 |" in card.text


def test_saving_again_replaces_the_whole_directory(adapter_dir: Path, model: PeftModel) -> None:
    (adapter_dir / "stale.txt").write_text("")
    store.save(model, adapter_dir, store.read_metadata(adapter_dir))
    assert not (adapter_dir / "stale.txt").exists()
    store.verify(adapter_dir)


@pytest.mark.parametrize("name", [store.WEIGHTS_FILE, store.CONFIG_FILE, store.METADATA_FILE])
def test_a_missing_file_is_named(adapter_dir: Path, name: str) -> None:
    (adapter_dir / name).unlink()
    with pytest.raises(UserError, match=name):
        AdapterFactory.load(adapter_dir)


def test_a_directory_above_the_adapter_is_answered_with_the_right_one(adapter_dir: Path) -> None:
    with pytest.raises(UserError, match=f"Found one in {adapter_dir}"):
        AdapterFactory.load(adapter_dir.parent)


def test_a_truncated_or_changed_weights_file_is_refused(adapter_dir: Path) -> None:
    path = adapter_dir / store.WEIGHTS_FILE
    content = path.read_bytes()
    for damaged in (content[:-10], content[:-1] + bytes([content[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="truncated or changed"):
            AdapterFactory.load(adapter_dir)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"adapter_type": 3', "[" * 5000])
def test_damaged_metadata_is_refused(adapter_dir: Path, content: str) -> None:
    (adapter_dir / store.METADATA_FILE).write_text(content)
    with pytest.raises(UserError, match="damaged"):
        AdapterFactory.load(adapter_dir)


def test_missing_and_unknown_keys_are_named(adapter_dir: Path) -> None:
    tensors = load_file(adapter_dir / store.WEIGHTS_FILE)
    name = sorted(tensors)[0]
    tensors["other.weight"] = tensors.pop(name)
    rewrite_weights(adapter_dir, tensors)
    with pytest.raises(UserError, match=rf"missing 1 such as {name}.*1 unknown such as .*other\.weight"):
        AdapterFactory.load(adapter_dir)


def test_tensors_of_another_rank_are_refused(adapter_dir: Path) -> None:
    tensors = load_file(adapter_dir / store.WEIGHTS_FILE)
    rewrite_weights(adapter_dir, {n: t[:2] if "lora_A" in n else t[:, :2].contiguous() for n, t in tensors.items()})
    with pytest.raises(UserError, match="does not fit"):
        AdapterFactory.load(adapter_dir)


@pytest.fixture
def other_base(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "other-base"
    model = LlamaForCausalLM.from_pretrained(tiny_llama_dir)
    torch.nn.init.zeros_(model.model.norm.weight)
    model.save_pretrained(directory)
    load_tokenizer(str(tiny_llama_dir)).save_pretrained(directory)
    return directory


def test_another_base_is_refused_and_the_right_one_named(
    adapter_dir: Path, other_base: Path, tiny_llama_dir: Path
) -> None:
    with pytest.raises(UserError, match=f"trained on {tiny_llama_dir}, not on .*--model.base_model {tiny_llama_dir}"):
        AdapterFactory.load(adapter_dir, str(other_base))


def test_changed_weights_under_the_same_name_are_refused(adapter_dir: Path, other_base: Path) -> None:
    rewrite_metadata(adapter_dir, base_model=str(other_base), base_model_name=str(other_base))
    with pytest.raises(UserError, match="another copy of"):
        AdapterFactory.load(adapter_dir)


def test_the_same_weights_in_another_place_are_accepted(
    adapter_dir: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    import shutil

    moved = shutil.copytree(tiny_llama_dir, tmp_path / "moved")
    AdapterFactory.load(adapter_dir, str(moved))
