"""Several adapters on one base: each computes as if loaded alone, and the base does not change."""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from snake_lora_pl.adapters import store
from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.adapters.factory import AdapterFactory
from snake_lora_pl.adapters.shared_base import SharedBase
from snake_lora_pl.durable import file_sha256
from snake_lora_pl.errors import UserError
from snake_lora_pl.models import QuantizationConfig, load_base_model, resolve_base_model
from snake_lora_pl.training.module import LoRALightningModule
from tests.adapters.conftest import save_adapter as save_created

IDS = torch.tensor([[5, 9, 30, 7, 41]])

CONFIGS: dict[str, Any] = {
    "small": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]),
    "large": LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "down_proj"]),
    "dora": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["v_proj"], use_dora=True),
    "adalora": AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=6, target_r=3, total_step=100, target_modules=["q_proj", "v_proj"]
    ),
    "adalora2": AdaLoraConfig(task_type="CAUSAL_LM", init_r=4, target_r=2, total_step=100, target_modules=["up_proj"]),
}


def save_adapter(directory: Path, base_dir: Path, config: Any) -> Path:
    """Return a saved adapter with random weights."""
    torch.manual_seed(0)
    model = get_peft_model(load_base_model(str(base_dir), dtype="float32"), copy.deepcopy(config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    source = resolve_base_model(str(base_dir))
    trainable, total = model.get_nb_trainable_parameters()
    metadata = store.AdapterMetadata(
        config.peft_type.value.lower(),
        source.canonical_id,
        str(base_dir),
        source.revision,
        source.sha256,
        trainable,
        total,
    )
    return store.save(model, directory, metadata)


@pytest.fixture(scope="module")
def dirs(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: save_adapter(root / name, tiny_llama_dir, config) for name, config in CONFIGS.items()}


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.clone()


@pytest.fixture(scope="module")
def alone(dirs: dict[str, Path], tiny_llama_dir: Path) -> dict[str | None, torch.Tensor]:
    """Logits of each adapter loaded alone, and of the base without an adapter."""
    logits: dict[str | None, torch.Tensor] = {
        name: logits_of(store.load(path, dtype="float32")) for name, path in dirs.items()
    }
    logits[None] = logits_of(load_base_model(str(tiny_llama_dir), dtype="float32"))
    flat = [tensor.flatten() for tensor in logits.values()]
    assert all((a - b).abs().max() > 0.1 for i, a in enumerate(flat) for b in flat[:i])
    return logits


def base_weights(shared: SharedBase) -> dict[str, torch.Tensor]:
    named = shared.model.named_parameters()
    return {
        name.split("model.", 1)[1].replace(".base_layer", ""): p
        for name, p in named
        if "lora_" not in name and "ranknum" not in name
    }


@pytest.fixture
def shared(dirs: dict[str, Path]) -> SharedBase:
    return SharedBase.open("small", dirs["small"], dtype="float32")


def test_each_adapter_computes_as_if_loaded_alone_in_any_order(
    shared: SharedBase, dirs: dict[str, Path], alone: dict[str | None, torch.Tensor]
) -> None:
    before = {name: (p.data_ptr(), p.clone()) for name, p in base_weights(shared).items()}
    for name in ("large", "adalora", "dora", "adalora2"):
        shared.load(name, dirs[name])
        assert shared.active == "small"
        assert torch.equal(logits_of(shared.model), alone["small"])
    order = ["large", "adalora", "adalora2", None, "dora", "adalora", "small", None, "large", None, "adalora2"]
    for name in order:
        assert torch.equal(logits_of(shared.use(name)), alone[name]), name
        assert shared.active == name
    with shared.model.disable_adapter():
        assert torch.equal(logits_of(shared.model), alone[None])
    assert shared.names == ["small", "large", "adalora", "dora", "adalora2"]
    after = base_weights(shared)
    assert before.keys() == after.keys()
    for name, (pointer, weights) in before.items():
        assert after[name].data_ptr() == pointer, "the base was copied"
        assert torch.equal(after[name], weights), "the base was changed"


def test_unloaded_adapter_is_removed_and_the_others_remain(
    shared: SharedBase, dirs: dict[str, Path], alone: dict[str | None, torch.Tensor]
) -> None:
    num_before = sum(p.numel() for p in shared.model.parameters())
    shared.load("large", dirs["large"])
    assert sum(p.numel() for p in shared.model.parameters()) > num_before
    shared.load("adalora", dirs["adalora"])
    shared.use("large")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        shared.unload("large")
    assert shared.active is None
    assert torch.equal(logits_of(shared.model), alone[None])
    with pytest.raises(UserError, match="'large'.*small, adalora"):
        shared.use("large")
    assert torch.equal(logits_of(shared.use("small")), alone["small"])
    assert sum(p.numel() for p in shared.model.parameters()) == num_before
    shared.unload("small")
    assert torch.equal(logits_of(shared.model), alone[None])
    assert torch.equal(logits_of(shared.use("adalora")), alone["adalora"])
    with pytest.raises(UserError, match="'adalora'"):
        shared.unload("adalora")
    shared.load("small", dirs["small"])
    assert torch.equal(logits_of(shared.model), alone["adalora"])
    shared.unload("adalora")
    assert torch.equal(logits_of(shared.use("small")), alone["small"])


def test_name_in_use_is_rejected(shared: SharedBase, dirs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="'small'"):
        shared.load("small", dirs["large"])


def test_adapter_of_a_different_base_is_rejected(
    shared: SharedBase, tiny_llama_dir: Path, tmp_path: Path, alone: dict[str | None, torch.Tensor]
) -> None:
    other = Path(shutil.copytree(tiny_llama_dir, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file({name: w * 2 for name, w in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    foreign = save_adapter(tmp_path / "foreign", other, CONFIGS["large"])
    with pytest.raises(UserError) as caught:
        shared.load("foreign", foreign)
    message = str(caught.value)
    assert f"--adapter {foreign}" in message
    assert str(other) in message
    assert str(tiny_llama_dir) in message
    assert "\n" not in message
    assert shared.names == ["small"]
    assert torch.equal(logits_of(shared.model), alone["small"])


def test_copy_of_the_base_in_another_directory_is_accepted(
    shared: SharedBase, tiny_llama_dir: Path, tmp_path: Path, alone: dict[str | None, torch.Tensor]
) -> None:
    moved = Path(shutil.copytree(tiny_llama_dir, tmp_path / "moved"))
    shared.load("large", save_adapter(tmp_path / "large", moved, CONFIGS["large"]))
    assert torch.equal(logits_of(shared.use("large")), alone["large"])


@pytest.mark.parametrize("name", ["large", "adalora"])
def test_failed_load_changes_nothing(
    name: str, shared: SharedBase, dirs: dict[str, Path], tmp_path: Path, alone: dict[str | None, torch.Tensor]
) -> None:
    broken = Path(shutil.copytree(dirs[name], tmp_path / "broken"))
    weights = load_file(broken / store.WEIGHTS_FILE)
    weights.pop(sorted(weights)[0])
    save_file(weights, broken / store.WEIGHTS_FILE)
    with pytest.raises(UserError, match=store.WEIGHTS_FILE):
        shared.load("broken", broken)
    text = (broken / store.METADATA_FILE).read_text()
    old, new = file_sha256(dirs[name] / store.WEIGHTS_FILE), file_sha256(broken / store.WEIGHTS_FILE)
    (broken / store.METADATA_FILE).write_text(text.replace(old, new))
    with pytest.raises(UserError, match="is missing"):
        shared.load("broken", broken)
    assert shared.names == ["small"]
    assert torch.equal(logits_of(shared.model), alone["small"])
    shared.load(name, dirs[name])
    assert torch.equal(logits_of(shared.use(name)), alone[name])
    assert torch.equal(logits_of(shared.use("small")), alone["small"])


def test_adapter_that_changed_on_disk_since_it_was_loaded_is_rejected(
    shared: SharedBase, dirs: dict[str, Path], tmp_path: Path
) -> None:
    mine = Path(shutil.copytree(dirs["large"], tmp_path / "mine"))
    shared.load("mine", mine)
    shared.load("adalora", dirs["adalora"])  # detaches the other adapters and attaches the active one again
    shutil.rmtree(mine)
    shutil.copytree(dirs["dora"], mine)
    with pytest.raises(UserError, match=f"{mine}.*since it was loaded"):
        shared.use("mine")
    assert shared.active == "small"


@pytest.fixture(scope="module")
def quantized(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of a 4-bit and of an 8-bit base."""
    dirs = {}
    for name, bits, rank in (("four", 4, 2), ("four too", 4, 4), ("eight", 8, 2)):
        module = LoRALightningModule(
            str(tiny_llama_dir),
            adapter_type="qlora",
            lora=LoRAConfig(rank=rank, quantization=QuantizationConfig(bits=bits)),
            dtype="float32",
        )
        module.configure_model()
        for parameter_name, parameter in module.named_parameters():
            if "lora_" in parameter_name:
                torch.nn.init.normal_(parameter)
        directory = tmp_path_factory.mktemp("quantized") / name
        dirs[name] = store.save(module.peft_model, directory, module.adapter_metadata())
    return dirs


def test_adapters_share_a_quantized_base(quantized: dict[str, Path]) -> None:
    alone = {name: logits_of(store.load(quantized[name], dtype="float32")) for name in ("four", "four too")}
    shared = SharedBase.open("four", quantized["four"], dtype="float32")
    shared.load("four too", quantized["four too"])
    for name in ("four too", "four", "four too"):
        assert torch.equal(logits_of(shared.use(name)), alone[name])


@pytest.mark.parametrize(
    ("first", "second", "part"),
    [
        ("small", "four", " 4-bit, .* unquantized"),
        ("four", "small", " unquantized, .* 4-bit"),
        ("four", "eight", " 8-bit, .* 4-bit"),
    ],
)
def test_adapters_of_bases_with_different_quantizations_are_rejected(
    first: str, second: str, part: str, dirs: dict[str, Path], quantized: dict[str, Path]
) -> None:
    every = {**dirs, **quantized}
    shared = SharedBase.open(first, every[first], dtype="float32")
    with pytest.raises(UserError, match=rf"{part}.*model\.full_precision_base=true"):
        shared.load(second, every[second])
    assert shared.names == [first]


def test_full_precision_base_is_shared_by_adapters_of_all_quantizations(
    dirs: dict[str, Path], quantized: dict[str, Path], alone: dict[str | None, torch.Tensor]
) -> None:
    options: dict[str, Any] = {"full_precision_base": True, "dtype": "float32"}
    expected = logits_of(store.load(quantized["four"], **options))
    shared = SharedBase.open("eight", quantized["eight"], **options)
    shared.load("four", quantized["four"])
    shared.load("small", dirs["small"])
    assert torch.equal(logits_of(shared.use("four")), expected)
    assert torch.equal(logits_of(shared.use("small")), alone["small"])


@pytest.mark.parametrize("adapter_type", ["miss", "shira"])
def test_adapters_of_other_types_than_lora_share_one_base(
    adapter_type: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    expected = {}
    for name in ("first", "second"):
        model = AdapterFactory.create(adapter_type, str(tiny_llama_dir), LoRAConfig(rank=4), dtype="float32")
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
        expected[name] = logits_of(model)
        save_created(model, tmp_path / name, tiny_llama_dir, adapter_type)
    assert not torch.allclose(expected["first"], expected["second"])
    shared = SharedBase.open("first", tmp_path / "first", dtype="float32")
    shared.load("second", tmp_path / "second")
    for name in ("second", "first", "second"):
        torch.testing.assert_close(logits_of(shared.use(name)), expected[name])
