"""Each private name exists and is still needed: there is no public substitute."""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from snake_lora_pl.models import QuantizationConfig, load_base_model, repeated_layers
from snake_lora_pl.models import transformers_internals as internals
from tests.architectures import save_model


def test_layer_classes_are_declared_by_the_architecture_only_privately(tiny_llama_dir: Path) -> None:
    model = load_base_model(str(tiny_llama_dir), dtype="float32")
    assert repeated_layers(model) == list(model.model.layers)
    assert not hasattr(model, "no_split_modules"), "transformers publishes the classes now"


def test_commit_is_unknown_to_transformers_for_a_local_snapshot(tiny_llama_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    assert internals.commit_hash(model) is None
    internals.set_commit_hash(model, "c" * 40)
    assert internals.commit_hash(model) == "c" * 40
    assert not hasattr(model.config, "commit_hash"), "transformers publishes the commit now"


def test_activation_checkpointing_is_enabled_by_the_name_that_is_not_deprecated(tiny_llama_dir: Path) -> None:
    model = load_base_model(str(tiny_llama_dir), dtype="float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        internals.enable_activation_checkpointing(model)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


def test_oldest_supported_version_still_has_the_old_name_of_activation_checkpointing() -> None:
    (minor,) = re.findall(r'"transformers>=5\.(\d+)', (Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert int(minor) < 23


def test_cpu_features_are_reported_only_privately() -> None:
    assert isinstance(internals.has_x86_bfloat16_instructions(), bool)
    assert isinstance(internals.has_onednn_bfloat16(), bool)
    assert not hasattr(torch.cpu, "is_avx512_bf16_supported"), "torch publishes the CPU's features now"


def test_bitsandbytes_still_logs_each_cast_of_an_8bit_layer() -> None:
    bnb = pytest.importorskip("bitsandbytes")

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    layer = bnb.nn.Linear8bitLt(32, 32, bias=False, has_fp16_weights=False).to("cpu").eval()
    try:
        layer(torch.ones(1, 32))
        assert len(messages) == 1, "bitsandbytes no longer logs the cast"
        internals.silence_8bit_cast_warnings()
        layer(torch.ones(1, 32))
        assert len(messages) == 1
    finally:
        logger.removeHandler(handler)


def test_transformers_still_dequantizes_transposed_layers_to_linear_ones(tiny_llama_dir: Path, tmp_path: Path) -> None:
    directory = save_model("gpt2", tmp_path / "gpt2", tiny_llama_dir)
    model = load_base_model(str(directory), dtype="float32", quantization=QuantizationConfig())
    layers = [name for name, module in model.named_modules() if internals.was_conv1d(module)]
    assert len(layers) == 8
    plain = model.dequantize(dtype=torch.float32)
    assert type(plain.get_submodule(layers[0])) is torch.nn.Linear, "dequantize() restores Conv1D now"
