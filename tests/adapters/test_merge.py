"""A merged model has the adapter's logits without PEFT, for every adapter type and target layer."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from snake_lora_pl.adapters import merge as merge_module
from snake_lora_pl.adapters import store
from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.adapters.factory import AdapterFactory
from snake_lora_pl.adapters.merge import merge
from snake_lora_pl.errors import UserError
from snake_lora_pl.models import load_base_model
from snake_lora_pl.models.quantization import QuantizationConfig
from tests.adapters.conftest import rewrite_metadata, save_adapter
from tests.architectures import save_model

IDS = torch.tensor([[5, 9, 30, 7, 201]])
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(IDS).logits


def make_adapter(peft_config: Any, base_dir: Path, directory: Path) -> tuple[Path, torch.Tensor]:
    """Return a saved adapter with random weights, and its logits."""
    torch.manual_seed(0)
    model = get_peft_model(load_base_model(str(base_dir), dtype="float32"), peft_config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    with torch.no_grad():
        expected = model(IDS).logits
    return save_adapter(model, directory, base_dir), expected


@pytest.fixture(scope="module")
def base_dirs(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model with tied and with untied embeddings."""
    untied_dir = tmp_path_factory.mktemp("untied")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, tie_word_embeddings=False)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    model.save_pretrained(untied_dir)
    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(untied_dir)
    return {"tied": tiny_llama_dir, "untied": untied_dir}


@pytest.mark.parametrize("embeddings", ["tied", "untied"])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ATTENTION},
        {"target_modules": "all-linear"},
        {"target_modules": ATTENTION, "use_dora": True},
        {"target_modules": ATTENTION, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
        # An adapter on one of two tied layers must not reach the other (peft#2018), also after loading
        # (transformers#45127).
        {"target_modules": [*ATTENTION, "lm_head"]},
        {"target_modules": [*ATTENTION, "embed_tokens"]},
        {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
        {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]},
    ],
    ids=["attention", "all-linear", "dora", "rslora", "lm_head", "embedding", "saved lm_head", "saved embedding"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_merged_model_has_the_logits_of_the_adapter(
    settings: dict[str, Any], embeddings: str, base_dirs: dict[str, Path], tmp_path: Path
) -> None:
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)
    adapter_dir, expected = make_adapter(config, base_dirs[embeddings], tmp_path / "adapter")
    merged = merge(adapter_dir, tmp_path / "merged")
    torch.testing.assert_close(logits(tmp_path / "merged"), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(base_dirs[embeddings]), expected, atol=0.1)
    assert merged.logit_difference < 1e-3


def test_adapter_that_peft_cannot_merge_is_reported_and_leaves_no_files(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_bias=True, task_type="CAUSAL_LM", target_modules=ATTENTION)
    adapter_dir, _ = make_adapter(config, tiny_llama_dir, tmp_path / "adapter")
    with pytest.raises(UserError, match="cannot be merged: .*lora_bias"):
        merge(adapter_dir, tmp_path / "out" / "merged")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("adapter_type", "settings"),
    [("miss", {}), ("miss", {"rank": 5}), ("miss", {"target_modules": "all-linear"}), ("shira", {})],
    ids=str,
)
def test_miss_and_shira_are_merged(
    adapter_type: str, settings: dict[str, Any], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    lora = LoRAConfig(**{"rank": 4, **settings})
    model = AdapterFactory.create(adapter_type, str(tiny_llama_dir), lora, dtype="float32")
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        expected = model.eval()(IDS).logits
    adapter_dir = save_adapter(model, tmp_path / "adapter", tiny_llama_dir, adapter_type)
    merge(adapter_dir, tmp_path / "merged")
    torch.testing.assert_close(logits(tmp_path / "merged"), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(tiny_llama_dir), expected, atol=0.1)


def test_adalora_is_merged(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = AdaLoraConfig(
        init_r=4, target_r=2, tinit=1, tfinal=1, total_step=10, target_modules=ATTENTION, task_type="CAUSAL_LM"
    )
    adapter_dir, expected = make_adapter(config, tiny_llama_dir, tmp_path / "adapter")
    merge(adapter_dir, tmp_path / "merged")
    torch.testing.assert_close(logits(tmp_path / "merged"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_adapter_of_a_quantized_base_is_merged_into_the_dequantized_base(
    bits: int, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = LoRAConfig(rank=4, quantization=QuantizationConfig(bits=bits))
    model = AdapterFactory.create("qlora", str(tiny_llama_dir), config, dtype="float32").eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    with torch.no_grad():
        expected = model(IDS).logits
    adapter_dir = save_adapter(model, tmp_path / "adapter", tiny_llama_dir, "qlora")
    rewrite_metadata(adapter_dir, quantization=dataclasses.asdict(config.quantization))
    merged = merge(adapter_dir, tmp_path / "merged")

    assert "quantization_config" not in json.loads((merged.path / "config.json").read_text())
    # 8-bit layers also round activations, unlike plain layers.
    tolerance = 1e-3 if bits == 4 else 0.1
    difference = (logits(merged.path) - expected).abs().max()
    assert difference < tolerance * expected.std()
    # On the full weights, the adapter computes different logits.
    on_full_weights = store.load(adapter_dir, full_precision_base=True, dtype="float32").eval()
    with torch.no_grad():
        assert (on_full_weights(IDS).logits - expected).abs().max() > difference + tolerance / 2 * expected.std()


def test_text_decoder_that_transformers_cannot_load_is_not_written(tiny_llama_dir: Path, tmp_path: Path) -> None:
    base_dir = save_model("mllama", tmp_path / "base", tiny_llama_dir)
    model = AdapterFactory.create("lora", str(base_dir), LoRAConfig(rank=2), dtype="float32")
    adapter_dir = save_adapter(model, tmp_path / "adapter", base_dir)
    with pytest.raises(UserError, match=r"--out .*MllamaTextConfig"):
        merge(adapter_dir, tmp_path / "out" / "merged")
    assert not (tmp_path / "out" / "merged").exists()


def test_merged_directory_has_model_tokenizer_and_card(adapter_dir: Path, tmp_path: Path) -> None:
    merged = merge(adapter_dir, tmp_path / "merged")
    names = {path.name for path in merged.path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert not {name for name in names if "adapter" in name}
    assert AutoTokenizer.from_pretrained(merged.path).eos_token == "<|im_end|>"
    card = ModelCard.load(merged.path / "README.md")
    assert card.data.library_name == "transformers"
    assert store.read_metadata(adapter_dir).weights_sha256 in card.text


@pytest.mark.parametrize(("dtype", "stored"), [("auto", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16")])
def test_dtype_is_that_of_the_base_or_as_requested(adapter_dir: Path, tmp_path: Path, dtype: str, stored: str) -> None:
    merged = merge(adapter_dir, tmp_path / "merged", dtype=dtype)
    assert merged.dtype == stored
    assert json.loads((merged.path / "config.json").read_text())["dtype"] == stored
    assert str(AutoModelForCausalLM.from_pretrained(merged.path).dtype) == f"torch.{stored}"


def test_unknown_dtype_is_rejected(adapter_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dtype.*auto, float32.*'int4'"):
        merge(adapter_dir, tmp_path / "merged", dtype="int4")


def test_existing_files_are_not_overwritten(adapter_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--out .*directory"):
        merge(adapter_dir, adapter_dir)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out .*file"):
        merge(adapter_dir, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert merge(adapter_dir, tmp_path / "empty").path == tmp_path / "empty"


def test_merged_model_with_different_logits_is_rejected_and_leaves_no_files(
    adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_module, "_merge", lambda model: model.unload())
    with pytest.raises(UserError, match="not written.*merged model differ"):
        merge(adapter_dir, tmp_path / "out" / "merged")
    assert not (tmp_path / "out").exists()


def test_directory_whose_logits_differ_when_read_back_does_not_appear(
    adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = PreTrainedModel.save_pretrained

    def save_damaged(model: PreTrainedModel, directory: str) -> None:
        model.model.norm.weight.data *= 0.9
        save(model, directory)
        model.model.norm.weight.data /= 0.9

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_damaged)
    with pytest.raises(UserError, match="not written.*read back.*differ"):
        merge(adapter_dir, tmp_path / "out" / "merged")
    assert list((tmp_path / "out").iterdir()) == []


def test_different_base_is_rejected_and_the_same_base_in_another_directory_accepted(
    adapter_dir: Path, base_dirs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"--base_model {base_dirs['tied']}"):
        merge(adapter_dir, tmp_path / "merged", base_model=str(base_dirs["untied"]))
    moved = shutil.copytree(base_dirs["tied"], tmp_path / "moved")
    rewrite_metadata(adapter_dir, base_model_name=str(tmp_path / "gone"))
    with pytest.raises(UserError, match="gone.*--base_model"):
        merge(adapter_dir, tmp_path / "merged")
    merge(adapter_dir, tmp_path / "merged", base_model=str(moved))


def test_full_disk_leaves_no_files(adapter_dir: Path, tmp_path: Path) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match="--out .*cannot be written"):
            merge(adapter_dir, tmp_path / "out" / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "out").iterdir()) == []
