"""Saving, loading and listing of adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from snake_lora_pl.adapters import store
from snake_lora_pl.adapters.factory import AdapterFactory
from snake_lora_pl.errors import UserError
from snake_lora_pl.models import BaseModelSpec, QuantizationConfig, load_base_model
from tests.adapters.conftest import rewrite_metadata, rewrite_weights

IDS = torch.tensor([[5, 9, 30, 7]])


def test_directory_has_the_adapter_and_no_base_weights(adapter_dir: Path, model: PeftModel) -> None:
    names = {p.name for p in adapter_dir.iterdir()}
    assert {store.WEIGHTS_FILE, store.CONFIG_FILE, store.METADATA_FILE, store.CARD_FILE, "tokenizer.json"} <= names
    saved = load_file(adapter_dir / store.WEIGHTS_FILE)
    assert all("lora_" in name for name in saved)
    assert sum(t.numel() for t in saved.values()) == model.get_nb_trainable_parameters()[0]


def test_plain_peft_loads_the_directory_with_bit_identical_logits(
    adapter_dir: Path, model: PeftModel, tiny_llama_dir: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    before = base(IDS).logits.clone()
    plain = PeftModel.from_pretrained(base, adapter_dir)
    assert torch.equal(plain(IDS).logits, model(IDS).logits)
    assert not torch.equal(plain(IDS).logits, before)


def test_load_takes_base_from_metadata_and_computes_the_same_logits(adapter_dir: Path, model: PeftModel) -> None:
    loaded = AdapterFactory.load(adapter_dir, dtype="float32")
    assert torch.equal(loaded.eval()(IDS).logits, model(IDS).logits)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_trainable_adapter_requires_gradients_and_its_base_does_not(adapter_dir: Path) -> None:
    loaded = AdapterFactory.load(adapter_dir, is_trainable=True)
    assert {"lora_" in n for n, p in loaded.named_parameters() if p.requires_grad} == {True}


def test_metadata_is_plain_json_and_survives_a_round_trip(adapter_dir: Path) -> None:
    metadata = store.verify(adapter_dir)
    content = json.loads((adapter_dir / store.METADATA_FILE).read_text())
    assert metadata == store.AdapterMetadata(**content)
    assert metadata.peft_config["r"] == 4
    # Only torch.__version__ has the CUDA version of a build.
    assert metadata.packages["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert metadata.metrics == {"val/loss": 0.25}


def test_saving_again_replaces_the_whole_directory(adapter_dir: Path, model: PeftModel) -> None:
    (adapter_dir / "stale.txt").write_text("")
    store.save(model, adapter_dir, store.read_metadata(adapter_dir))
    assert not (adapter_dir / "stale.txt").exists()
    store.verify(adapter_dir)


def test_loaded_base_is_unchanged_if_the_adapter_does_not_fit(adapter_dir: Path, tiny_llama_dir: Path) -> None:
    tensors = load_file(adapter_dir / store.WEIGHTS_FILE)
    rewrite_weights(adapter_dir, dict(list(tensors.items())[1:]))
    base = load_base_model(str(tiny_llama_dir), dtype="float32")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(UserError, match="is missing"):
        AdapterFactory.load(adapter_dir, base)
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_loaded_base_with_an_adapter_is_rejected(adapter_dir: Path, model: PeftModel) -> None:
    before = model(IDS).logits
    for base in (model, model.get_base_model()):
        with pytest.raises(UserError, match="SharedBase"):
            AdapterFactory.load(adapter_dir, base)
    assert torch.equal(model(IDS).logits, before)


def test_loaded_base_with_a_different_quantization_logs_a_warning(
    adapter_dir: Path, tiny_llama_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = load_base_model(str(tiny_llama_dir), dtype="float32", quantization=QuantizationConfig())
    AdapterFactory.load(adapter_dir, base)
    assert any("different quantization" in message and "4-bit" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("asked", "loaded"),
    [(None, "c" * 40), (BaseModelSpec("owner/tiny", "main"), "main")],
    ids=["trained on", "asked for"],
)
def test_hub_base_is_loaded_at_the_commit_of_the_training(
    adapter_dir: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, asked: BaseModelSpec | None, loaded: str
) -> None:
    rewrite_metadata(
        adapter_dir, base_model="owner/tiny", base_model_name="owner/tiny", base_revision="c" * 40, base_sha256=None
    )
    revisions = []

    def load_from_hub(spec: BaseModelSpec) -> Any:
        revisions.append((spec.name, spec.revision))
        return load_base_model(str(tiny_llama_dir))

    monkeypatch.setattr("snake_lora_pl.models.load_base_model", load_from_hub)
    AdapterFactory.load(adapter_dir, asked)
    assert revisions == [("owner/tiny", loaded)]


def test_adapters_under_a_directory_are_listed_the_newest_last(adapter_dir: Path, tmp_path: Path) -> None:
    newer = shutil.copytree(adapter_dir, tmp_path / "a" / "newer")
    damaged = shutil.copytree(adapter_dir, tmp_path / "damaged")
    unreadable = shutil.copytree(adapter_dir, tmp_path / "unreadable")
    shutil.copytree(adapter_dir, tmp_path / ".model_artifacts.x1.tmp")
    rewrite_metadata(newer, training_timestamp="2999-01-01T00:00:00+00:00")
    (damaged / store.WEIGHTS_FILE).unlink()
    (unreadable / store.METADATA_FILE).write_text("{")
    found = store.list_adapters(tmp_path)
    assert [adapter.path for adapter in found] == [unreadable, damaged, adapter_dir, newer]
    assert found[0].metadata is None
    assert "damaged" in str(found[0].problem)
    assert found[1].weights_bytes == 0
    assert f"{store.WEIGHTS_FILE} is missing" in str(found[1].problem)
    assert found[2].problem is None
    assert found[2].metadata == store.verify(adapter_dir)
    assert found[2].weights_bytes == (adapter_dir / store.WEIGHTS_FILE).stat().st_size


def test_listing_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        store.list_adapters(tmp_path / "nowhere")
