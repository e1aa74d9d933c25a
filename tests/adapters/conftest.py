"""Fixtures: an adapter with random weights, in memory and on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from snake_lora_pl.adapters import store
from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.adapters.factory import AdapterFactory
from snake_lora_pl.durable import file_sha256
from snake_lora_pl.models import load_tokenizer, resolve_base_model


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
    return save_adapter(model, tmp_path / "model_artifacts", tiny_llama_dir)


def save_adapter(model: PeftModel, directory: Path, base_dir: Path, adapter_type: str = "lora") -> Path:
    """Save an adapter with the metadata that a run writes."""
    source = resolve_base_model(str(base_dir))
    trainable, total = model.get_nb_trainable_parameters()
    metadata = store.AdapterMetadata(
        adapter_type=adapter_type,
        base_model=source.canonical_id,
        base_model_name=str(base_dir),
        base_revision=source.revision,
        base_sha256=source.sha256,
        trainable_parameters=trainable,
        total_parameters=total,
        grid_size=10,
        step=12,
        metrics={"val/loss": 0.25},
        data={"data_hash": "abc", "template": "instruction"},
    )
    return store.save(model, directory, metadata, load_tokenizer(str(base_dir)))


def rewrite_metadata(adapter_dir: Path, **changes: Any) -> None:
    path = adapter_dir / store.METADATA_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite_weights(adapter_dir: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, adapter_dir / store.WEIGHTS_FILE)
    rewrite_metadata(adapter_dir, weights_sha256=file_sha256(adapter_dir / store.WEIGHTS_FILE))
