"""Damaged, foreign and malicious adapters are rejected."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from snake_lora_pl.__main__ import main
from snake_lora_pl.adapters import store
from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.adapters.factory import AdapterFactory
from snake_lora_pl.durable import file_sha256
from snake_lora_pl.errors import UserError
from snake_lora_pl.models import load_base_model, load_tokenizer
from tests.adapters.conftest import rewrite_metadata, rewrite_weights

IDS = torch.tensor([[5, 9, 30, 7]])


@pytest.mark.parametrize("name", [store.WEIGHTS_FILE, store.CONFIG_FILE, store.METADATA_FILE])
def test_missing_file_is_reported_by_name(adapter_dir: Path, name: str) -> None:
    (adapter_dir / name).unlink()
    with pytest.raises(UserError, match=name):
        AdapterFactory.load(adapter_dir)


def test_parent_directory_is_reported_with_the_directory_of_the_adapter(adapter_dir: Path) -> None:
    with pytest.raises(UserError, match=f"{store.METADATA_FILE}.* {adapter_dir}\\."):
        AdapterFactory.load(adapter_dir.parent)


def test_directory_with_other_content_is_reported_with_its_content(adapter_dir: Path, tiny_llama_dir: Path) -> None:
    with pytest.raises(UserError, match=f"{store.METADATA_FILE}.* model.*base"):
        AdapterFactory.load(tiny_llama_dir)
    (adapter_dir / store.METADATA_FILE).unlink()
    with pytest.raises(UserError, match="snake_lora_pl.*PEFT"):
        AdapterFactory.load(adapter_dir)
    with pytest.raises(UserError, match="snake_lora_pl"):
        AdapterFactory.load(adapter_dir.parent)


def test_truncated_or_changed_weights_are_rejected(adapter_dir: Path) -> None:
    path = adapter_dir / store.WEIGHTS_FILE
    content = path.read_bytes()
    for damaged in (content[:-10], content[:-1] + bytes([content[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{path}.*sha256"):
            AdapterFactory.load(adapter_dir)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"adapter_type": 3', "[" * 5000])
def test_damaged_metadata_is_rejected(adapter_dir: Path, content: str) -> None:
    (adapter_dir / store.METADATA_FILE).write_text(content)
    with pytest.raises(UserError, match=store.METADATA_FILE):
        AdapterFactory.load(adapter_dir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": "12"}, 'step is "12".* int'),
        ({"step": True}, "step is true"),
        ({"metrics": []}, "metrics is "),
        ({"metrics": {"val/loss": "low"}}, 'metrics is {"val/loss": "low"}'),
        ({"metrics": {"val/loss": float("nan")}}, "NaN"),
        ({"base_model": None}, "base_model is null"),
        ({"base_model": "x\x1b[31m"}, r"base_model is .x.u001b"),
        ({"weights_sha256": 3}, "weights_sha256 is 3"),
        ({"quantization": {"bits": "4"}}, "bits.* '4'"),
        ({"quantization": {"color": 1}}, "quantization: .*color"),
        ({"data": {"template": 7}}, "data.template is 7"),
        ({"data": {"prompt_format": ["compact"]}}, "data.prompt_format is "),
        ({"play": {"players": 3}}, "play.player is null"),
        ({"peft_config": {"r": "8"}}, 'peft_config.r is "8".* int'),
        ({"peft_config": {"r": 4, "rank_pattern": {"q_proj": "8"}}}, "peft_config.rank_pattern is "),
        ({"peft_config": {"r": 4, "rank_pattern": {"q_proj": [True]}}}, "peft_config.rank_pattern is "),
        ({"peft_config": {"target_modules": [5]}}, "peft_config.target_modules is "),
        ({"adapter_type": "adalora"}, 'peft_config.peft_type is "LORA"'),
    ],
    ids=repr,
)
def test_metadata_with_a_wrong_type_is_reported_by_key_and_listed(
    adapter_dir: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite_metadata(adapter_dir, **changes)
    with pytest.raises(UserError, match=f"{store.METADATA_FILE}: .*{message}") as caught:
        store.read_metadata(adapter_dir)
    assert str(caught.value).isprintable()
    assert main(["adapters", str(adapter_dir)]) == 0
    assert "damaged" in capsys.readouterr().out


def test_missing_metadata_is_reported_by_key(adapter_dir: Path) -> None:
    path = adapter_dir / store.METADATA_FILE
    content = json.loads(path.read_text())
    del content["step"], content["trainable_parameters"], content["base_model"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="base_model, trainable_parameters"):
        store.read_metadata(adapter_dir)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LORAX"}, 'peft_type is "LORAX".* PEFT .*0'),
        ({"use_tomorrow": True}, "use_tomorrow is true"),
        ({"r": 10**12}, "rank 1000000000000"),
        ({"alpha_pattern": 7}, "--adapter .*AttributeError"),
        ({"init_lora_weights": "corda", "corda_config": {"cache_file": "x"}}, "--adapter"),
        ({"lora_bias": True}, "lora_B.bias is missing"),
    ],
    ids=repr,
)
def test_settings_that_peft_does_not_support_are_rejected_even_if_metadata_agrees(
    adapter_dir: Path, settings: dict[str, Any], message: str, recwarn: pytest.WarningsRecorder
) -> None:
    path = adapter_dir / store.CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    rewrite_metadata(adapter_dir, peft_config=json.loads(path.read_text()))
    with pytest.raises(UserError, match=message):
        AdapterFactory.load(adapter_dir)
    assert not [w for w in recwarn if "invalid shape" in str(w.message)]


def test_unknown_setting_at_its_default_is_ignored(adapter_dir: Path, model: PeftModel) -> None:
    path = adapter_dir / store.CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_tomorrow": False}))
    rewrite_metadata(adapter_dir, peft_config=json.loads(path.read_text()))
    assert torch.equal(AdapterFactory.load(adapter_dir, dtype="float32").eval()(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("r", 8, "r is 8, .* 4"),
        ("lora_alpha", 1, "lora_alpha is 1, .* 32"),
        ("use_dora", True, "use_dora is true, .* false"),
        ("unknown_setting", 1, "unknown_setting is 1, .* null"),
    ],
)
def test_changed_settings_are_reported_by_key(adapter_dir: Path, key: str, value: Any, message: str) -> None:
    path = adapter_dir / store.CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=f"{store.CONFIG_FILE}: .*{message}"):
        AdapterFactory.load(adapter_dir)


@pytest.mark.parametrize("name", ["adapter_model.bin", "training_args.bin", "optimizer.pt", "tokenizer_mine.py"])
def test_pickles_and_programs_are_rejected_even_next_to_valid_weights(adapter_dir: Path, name: str) -> None:
    (adapter_dir / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"{name}.*can run code"):
        AdapterFactory.load(adapter_dir)


def test_pickled_weights_are_not_loaded(adapter_dir: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("the pickle was loaded",))

    (adapter_dir / store.WEIGHTS_FILE).unlink()
    torch.save({"lora_A": Bomb()}, adapter_dir / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.bin"):
        AdapterFactory.load(adapter_dir)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["mine.Tokenizer", None]}),
        (store.CONFIG_FILE, "auto_mapping", {"parent_library": "os", "base_model_class": "x"}),
        (store.CONFIG_FILE, "megatron_config", {"x": 1}),
    ],
)
def test_settings_that_name_code_to_run_are_rejected(adapter_dir: Path, name: str, key: str, value: Any) -> None:
    path = adapter_dir / name
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    rewrite_metadata(adapter_dir, peft_config=json.loads((adapter_dir / store.CONFIG_FILE).read_text()))
    with pytest.raises(UserError, match=f"{name}: {key}"):
        AdapterFactory.load(adapter_dir)


def test_missing_and_unknown_keys_are_reported(adapter_dir: Path) -> None:
    tensors = load_file(adapter_dir / store.WEIGHTS_FILE)
    name = sorted(tensors)[0]
    tensors["other.weight"] = tensors.pop(name)
    rewrite_weights(adapter_dir, tensors)
    with pytest.raises(UserError, match=rf"{name} is missing; other\.weight is unknown"):
        AdapterFactory.load(adapter_dir)


def test_weights_that_are_not_safetensors_are_rejected(adapter_dir: Path) -> None:
    (adapter_dir / store.WEIGHTS_FILE).write_bytes(b"not tensors")
    rewrite_metadata(adapter_dir, weights_sha256=file_sha256(adapter_dir / store.WEIGHTS_FILE))
    with pytest.raises(UserError, match="SafetensorError"):
        AdapterFactory.load(adapter_dir)


def test_tensors_of_a_different_rank_are_reported_by_key(adapter_dir: Path) -> None:
    tensors = load_file(adapter_dir / store.WEIGHTS_FILE)
    rewrite_weights(adapter_dir, {n: t[:2] if "lora_A" in n else t[:, :2].contiguous() for n, t in tensors.items()})
    key = r"base_model\.model\.model\.layers\.0\.self_attn\.k_proj\.lora_A\.weight"
    with pytest.raises(UserError, match=rf"{key} is 2x32, .* 4x32 \(rank 2 instead of 4\).*and 13 more"):
        AdapterFactory.load(adapter_dir)


def test_tensors_for_a_base_of_a_different_size_are_reported_by_key(adapter_dir: Path) -> None:
    tensors = load_file(adapter_dir / store.WEIGHTS_FILE)
    key = sorted(tensors)[0]
    rewrite_weights(adapter_dir, {**tensors, key: tensors[key][:, :16].contiguous()})
    with pytest.raises(UserError, match=rf"{key} is 4x16, .* 4x32 \(base"):
        AdapterFactory.load(adapter_dir)


def test_check_weights_rejects_a_different_rank(adapter_dir: Path, tiny_llama_dir: Path) -> None:
    other = AdapterFactory.create("lora", str(tiny_llama_dir), LoRAConfig(rank=2), dtype="float32")
    with pytest.raises(UserError, match="rank 4 instead of 2"):
        store.check_weights(other, adapter_dir)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda tensor: tensor.to(torch.int8), ".*int8"),
        (lambda tensor: tensor.to(torch.complex64), ".*complex64"),
        (lambda tensor: tensor * math.nan, ".*finite"),
        (lambda tensor: tensor + math.inf, ".*finite"),
    ],
    ids=["int8", "complex", "NaN", "infinite"],
)
def test_tensors_with_invalid_values_are_rejected(
    adapter_dir: Path, tiny_llama_dir: Path, change: Callable[[torch.Tensor], torch.Tensor], why: str
) -> None:
    tensors = load_file(adapter_dir / store.WEIGHTS_FILE)
    name = sorted(tensors)[0]
    rewrite_weights(adapter_dir, {**tensors, name: change(tensors[name])})
    with pytest.raises(UserError, match=rf"{re.escape(name)}{why}"):
        AdapterFactory.load(adapter_dir, str(tiny_llama_dir))


@pytest.fixture
def other_base(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "other-base"
    model = LlamaForCausalLM.from_pretrained(tiny_llama_dir)
    torch.nn.init.zeros_(model.model.norm.weight)
    model.save_pretrained(directory)
    load_tokenizer(str(tiny_llama_dir)).save_pretrained(directory)
    return directory


def test_different_base_is_reported_with_the_correct_one(
    adapter_dir: Path, other_base: Path, tiny_llama_dir: Path
) -> None:
    with pytest.raises(UserError, match=f"{other_base}.*--model.base_model {tiny_llama_dir}"):
        AdapterFactory.load(adapter_dir, str(other_base))


def test_changed_base_weights_under_the_same_name_are_rejected(adapter_dir: Path, other_base: Path) -> None:
    rewrite_metadata(adapter_dir, base_model=str(other_base), base_model_name=str(other_base))
    with pytest.raises(UserError, match=f"{other_base}.*sha256"):
        AdapterFactory.load(adapter_dir)


def test_different_loaded_base_is_rejected(adapter_dir: Path, other_base: Path) -> None:
    with pytest.raises(UserError, match=f"--adapter {adapter_dir}.*{other_base}"):
        AdapterFactory.load(adapter_dir, load_base_model(str(other_base)))


def test_same_base_weights_in_another_directory_are_accepted(
    adapter_dir: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(tiny_llama_dir, tmp_path / "moved")
    AdapterFactory.load(adapter_dir, str(moved))
