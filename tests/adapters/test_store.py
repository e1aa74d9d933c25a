from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from snake_lora_pl.__main__ import main
from snake_lora_pl.adapters import store
from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.adapters.factory import AdapterFactory
from snake_lora_pl.durable import file_sha256
from snake_lora_pl.errors import UserError
from snake_lora_pl.models import BaseModelSpec, QuantizationConfig, load_base_model, load_tokenizer
from tests.adapters.conftest import rewrite_metadata

IDS = torch.tensor([[5, 9, 30, 7]])


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
    # A build from the package index names its CUDA version in the module alone.
    assert metadata.packages["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert metadata.metrics == {"val/loss": 0.25}


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


def test_what_is_there_in_place_of_an_adapter_is_said(adapter_dir: Path, tiny_llama_dir: Path) -> None:
    with pytest.raises(UserError, match=f"no {store.METADATA_FILE} here. It is a whole model: give it as the base"):
        AdapterFactory.load(tiny_llama_dir)
    (adapter_dir / store.METADATA_FILE).unlink()
    with pytest.raises(UserError, match="that snake_lora_pl did not write, or lost that file: load it with PEFT"):
        AdapterFactory.load(adapter_dir)
    with pytest.raises(UserError, match="Was it written by snake_lora_pl"):
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": "12"}, 'step is "12", not of type int'),
        ({"step": True}, "step is true"),
        ({"metrics": []}, "metrics is "),
        ({"metrics": {"val/loss": "low"}}, 'metrics is {"val/loss": "low"}'),
        ({"metrics": {"val/loss": float("nan")}}, "NaN is no JSON"),
        ({"base_model": None}, "base_model is null"),
        ({"base_model": "x\x1b[31m"}, r"base_model is .x.u001b"),
        ({"weights_sha256": 3}, "weights_sha256 is 3"),
        ({"quantization": {"bits": "4"}}, "bits must be 4 or 8, not '4'"),
        ({"quantization": {"color": 1}}, "quantization: .*color"),
        ({"data": {"template": 7}}, "data.template is 7"),
        ({"data": {"prompt_format": ["compact"]}}, "data.prompt_format is "),
        ({"play": {"players": 3}}, "play.player is null"),
        ({"peft_config": {"r": "8"}}, 'peft_config.r is "8", not of type int | None'),
        ({"peft_config": {"r": 4, "rank_pattern": {"q_proj": "8"}}}, "peft_config.rank_pattern is "),
        ({"peft_config": {"r": 4, "rank_pattern": {"q_proj": [True]}}}, "peft_config.rank_pattern is "),
        ({"peft_config": {"target_modules": [5]}}, "peft_config.target_modules is "),
    ],
    ids=repr,
)
def test_metadata_of_another_type_is_refused_by_key_and_listed(
    adapter_dir: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite_metadata(adapter_dir, **changes)
    with pytest.raises(UserError, match=f"{store.METADATA_FILE}: damaged .*{message}") as caught:
        store.read_metadata(adapter_dir)
    assert str(caught.value).isprintable()
    assert main(["adapters", str(adapter_dir)]) == 0
    assert "damaged" in capsys.readouterr().out


def test_missing_metadata_is_named(adapter_dir: Path) -> None:
    path = adapter_dir / store.METADATA_FILE
    content = json.loads(path.read_text())
    del content["step"], content["trainable_parameters"], content["base_model"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"damaged \(base_model, trainable_parameters missing\)"):
        store.read_metadata(adapter_dir)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LORAX"}, 'peft_type is "LORAX", which PEFT .* does not know. .* saved with .0'),
        ({"use_tomorrow": True}, "use_tomorrow is true, which PEFT .* does not know"),
        ({"r": 10**12}, "names rank 1000000000000, but no weight"),
        ({"alpha_pattern": 7}, "does not fit .*AttributeError"),
        ({"init_lora_weights": "corda", "corda_config": {"cache_file": "x"}}, "does not fit"),
        ({"lora_bias": True}, "lora_B.bias is missing"),
    ],
    ids=repr,
)
def test_settings_that_nobody_saved_are_refused_though_metadata_agrees(
    adapter_dir: Path, settings: dict[str, Any], message: str, recwarn: pytest.WarningsRecorder
) -> None:
    path = adapter_dir / store.CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    rewrite_metadata(adapter_dir, peft_config=json.loads(path.read_text()))
    with pytest.raises(UserError, match=message):
        AdapterFactory.load(adapter_dir)
    assert not [w for w in recwarn if "invalid shape" in str(w.message)]


def test_a_setting_at_its_default_that_this_peft_does_not_know_changes_nothing(
    adapter_dir: Path, model: PeftModel
) -> None:
    path = adapter_dir / store.CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_tomorrow": False}))
    rewrite_metadata(adapter_dir, peft_config=json.loads(path.read_text()))
    assert torch.equal(AdapterFactory.load(adapter_dir, dtype="float32").eval()(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("r", 8, "r is 8, .* says 4"),
        ("lora_alpha", 1, "lora_alpha is 1, .* says 32"),
        ("use_dora", True, "use_dora is true, .* says false"),
        ("unheard_of", 1, "unheard_of is 1, .* says null"),
    ],
)
def test_changed_settings_are_refused_by_key(adapter_dir: Path, key: str, value: Any, message: str) -> None:
    path = adapter_dir / store.CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=f"{store.CONFIG_FILE}: changed since it was saved: {message}"):
        AdapterFactory.load(adapter_dir)


@pytest.mark.parametrize("name", ["adapter_model.bin", "training_args.bin", "optimizer.pt", "tokenizer_mine.py"])
def test_pickles_and_programs_are_refused_even_beside_good_weights(adapter_dir: Path, name: str) -> None:
    (adapter_dir / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"holds {name}; pickles and programs can run code"):
        AdapterFactory.load(adapter_dir)


def test_an_adapter_of_pickled_weights_alone_is_not_read(adapter_dir: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("the pickle was read",))

    (adapter_dir / store.WEIGHTS_FILE).unlink()
    torch.save({"lora_A": Bomb()}, adapter_dir / "adapter_model.bin")
    with pytest.raises(UserError, match="holds adapter_model.bin"):
        AdapterFactory.load(adapter_dir)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["mine.Tokenizer", None]}),
        (store.CONFIG_FILE, "auto_mapping", {"parent_library": "os", "base_model_class": "x"}),
        (store.CONFIG_FILE, "megatron_config", {"x": 1}),
    ],
)
def test_settings_that_name_code_to_run_are_refused(adapter_dir: Path, name: str, key: str, value: Any) -> None:
    path = adapter_dir / name
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    rewrite_metadata(adapter_dir, peft_config=json.loads((adapter_dir / store.CONFIG_FILE).read_text()))
    with pytest.raises(UserError, match=f"{name}: {key} names code to run"):
        AdapterFactory.load(adapter_dir)


def test_missing_and_unknown_keys_are_named(adapter_dir: Path) -> None:
    tensors = load_file(adapter_dir / store.WEIGHTS_FILE)
    name = sorted(tensors)[0]
    tensors["other.weight"] = tensors.pop(name)
    rewrite_weights(adapter_dir, tensors)
    with pytest.raises(UserError, match=rf"{name} is missing; other\.weight is unknown\. Use the base"):
        AdapterFactory.load(adapter_dir)


def test_weights_that_are_no_safetensors_are_refused(adapter_dir: Path) -> None:
    (adapter_dir / store.WEIGHTS_FILE).write_bytes(b"no tensors")
    rewrite_metadata(adapter_dir, weights_sha256=file_sha256(adapter_dir / store.WEIGHTS_FILE))
    with pytest.raises(UserError, match="SafetensorError"):
        AdapterFactory.load(adapter_dir)


def test_tensors_of_another_rank_are_refused_by_key(adapter_dir: Path) -> None:
    tensors = load_file(adapter_dir / store.WEIGHTS_FILE)
    rewrite_weights(adapter_dir, {n: t[:2] if "lora_A" in n else t[:, :2].contiguous() for n, t in tensors.items()})
    key = r"base_model\.model\.model\.layers\.0\.self_attn\.k_proj\.lora_A\.weight"
    with pytest.raises(UserError, match=rf"{key} is 2x32, 4x32 is asked for \(rank 2 instead of 4\).*and 13 more"):
        AdapterFactory.load(adapter_dir)


def test_tensors_for_a_base_of_another_size_are_refused_by_key(adapter_dir: Path) -> None:
    tensors = load_file(adapter_dir / store.WEIGHTS_FILE)
    key = sorted(tensors)[0]
    rewrite_weights(adapter_dir, {**tensors, key: tensors[key][:, :16].contiguous()})
    with pytest.raises(UserError, match=rf"{key} is 4x16, 4x32 is asked for \(a base of another size\)"):
        AdapterFactory.load(adapter_dir)


def test_a_loaded_base_is_left_as_it_was_by_an_adapter_that_does_not_fit(
    adapter_dir: Path, tiny_llama_dir: Path
) -> None:
    tensors = load_file(adapter_dir / store.WEIGHTS_FILE)
    rewrite_weights(adapter_dir, dict(list(tensors.items())[1:]))
    base = load_base_model(str(tiny_llama_dir), dtype="float32")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(UserError, match="is missing"):
        AdapterFactory.load(adapter_dir, base)
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_of_another_rank_are_refused_by_a_model_that_carries_an_adapter(
    adapter_dir: Path, tiny_llama_dir: Path
) -> None:
    other = AdapterFactory.create("lora", str(tiny_llama_dir), LoRAConfig(rank=2), dtype="float32")
    with pytest.raises(UserError, match="rank 4 instead of 2"):
        store.check_weights(other, adapter_dir)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda tensor: tensor.to(torch.int8), "is of int8, no type of a weight"),
        (lambda tensor: tensor.to(torch.complex64), "is of complex64, no type of a weight"),
        (lambda tensor: tensor * math.nan, "holds numbers that are not finite"),
        (lambda tensor: tensor + math.inf, "holds numbers that are not finite"),
    ],
    ids=["int8", "complex", "NaN", "infinite"],
)
def test_values_that_are_no_weights_are_refused(
    adapter_dir: Path, tiny_llama_dir: Path, change: Callable[[torch.Tensor], torch.Tensor], why: str
) -> None:
    tensors = load_file(adapter_dir / store.WEIGHTS_FILE)
    name = sorted(tensors)[0]
    rewrite_weights(adapter_dir, {**tensors, name: change(tensors[name])})
    with pytest.raises(UserError, match=rf"damaged \({re.escape(name)} {why}\)"):
        AdapterFactory.load(adapter_dir, str(tiny_llama_dir))


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


def test_a_loaded_base_that_is_another_is_refused(adapter_dir: Path, other_base: Path) -> None:
    with pytest.raises(UserError, match="trained on .*, not on"):
        AdapterFactory.load(adapter_dir, load_base_model(str(other_base)))


def test_a_loaded_base_that_carries_an_adapter_is_refused(adapter_dir: Path, model: PeftModel) -> None:
    before = model(IDS).logits
    for base in (model, model.get_base_model()):
        with pytest.raises(UserError, match="the base model carries an adapter already"):
            AdapterFactory.load(adapter_dir, base)
    assert torch.equal(model(IDS).logits, before)


def test_a_loaded_base_in_other_bits_is_warned_of(
    adapter_dir: Path, tiny_llama_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = load_base_model(str(tiny_llama_dir), dtype="float32", quantization=QuantizationConfig())
    AdapterFactory.load(adapter_dir, base)
    assert any("stored otherwise than the one given, which is in 4 bits" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("asked", "loaded"),
    [(None, "c" * 40), (BaseModelSpec("owner/tiny", "main"), "main")],
    ids=["trained on", "asked for"],
)
def test_a_base_on_the_hub_is_loaded_at_the_commit_that_was_trained_on(
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


def test_the_same_weights_in_another_place_are_accepted(
    adapter_dir: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    import shutil

    moved = shutil.copytree(tiny_llama_dir, tmp_path / "moved")
    AdapterFactory.load(adapter_dir, str(moved))


def test_every_adapter_under_a_directory_is_listed_the_newest_last(adapter_dir: Path, tmp_path: Path) -> None:
    import shutil

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


def test_listing_what_is_no_directory_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        store.list_adapters(tmp_path / "nowhere")
