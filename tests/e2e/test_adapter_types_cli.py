"""Each adapter type from its config to its games: real rows, all commands, the tiny model."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from snake_lora_pl.__main__ import main
from snake_lora_pl.adapters import store
from snake_lora_pl.adapters.factory import AdapterFactory
from snake_lora_pl.paths import RunPaths
from tests.small_run import small_run

pytestmark = pytest.mark.filterwarnings("ignore")

RUN_PATTERN = "logs/extensions/models/grid-size-10/llm_finetune_v0.03_*/snake_reasoning"
IDS = torch.arange(3, 40)[None]


class Run(NamedTuple):
    adapter_type: str
    paths: RunPaths
    flags: list[str]


@pytest.fixture(scope="module", params=["lora", "qlora", "adalora", "miss", "shira"])
def run(
    request: pytest.FixtureRequest,
    tiny_llama_dir: Path,
    bfs512_sample_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """A finished run of each adapter type: a preset, and the config of the type."""
    directory = tmp_path_factory.mktemp(request.param)
    configs = ["--config", "lightweight.yaml"]
    configs += ["--config", f"{request.param}.yaml"] if request.param != "lora" else []
    flags = [*configs, *small_run(tiny_llama_dir, bfs512_sample_path)]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setenv("SNAKE_LORA_PL_CACHE", str(directory / "cache"))
        patch.chdir(directory)
        learning = ["--model.learning_rate=3e-2", "--trainer.max_steps=12", "--trainer.val_check_interval=6"]
        assert main(["fit", *flags, *learning]) == 0
    (run_dir,) = directory.glob(RUN_PATTERN)
    return Run(request.param, RunPaths(run_dir), flags)


def logged(run: Run, name: str) -> list[float]:
    with open(run.paths.metrics_path, newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_loss_falls_on_real_rows(run: Run) -> None:
    first, last = logged(run, "val/loss")
    assert last < first
    assert sum(logged(run, "train/loss")[-3:]) < sum(logged(run, "train/loss")[:3])


def test_metadata_and_metrics_match_the_adapter_type(run: Run) -> None:
    metadata = store.verify(run.paths.artifacts_dir)
    assert metadata.adapter_type == run.adapter_type
    assert metadata.quantization.get("bits") == (4 if run.adapter_type == "qlora" else None)
    budget = logged(run, "train/rank_budget") if run.adapter_type == "adalora" else []
    assert budget == sorted(budget, reverse=True)
    assert (len(set(budget)) > 2) == (run.adapter_type == "adalora")


def test_metadata_and_card_describe_the_run(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads((run.paths.artifacts_dir / store.METADATA_FILE).read_text())
    assert content.keys() >= {
        "adapter_type", "base_model", "base_sha256", "grid_size", "training_timestamp", "peft_config", "step", "epoch",
        "metrics", "trainable_parameters", "total_parameters", "packages", "weights_sha256",
    }  # fmt: skip
    assert content["grid_size"] == 10
    data = content["data"]
    card = ModelCard((run.paths.artifacts_dir / store.CARD_FILE).read_text(), ignore_metadata_errors=False)
    assert card.data.tags == ["snake", run.adapter_type]
    facts = {"data_hash": data["data_hash"], "split_hash": data["split_hash"], "prompt_format": "bfs-512"}
    facts |= {"template": "instruction", "num_rows": "354", "num_games": "4", "board": "10x10"}
    facts |= {"layers": "k_proj, o_proj, q_proj, v_proj"}
    facts |= {"alpha": "16.0"} if run.adapter_type not in ("miss", "shira") else {}
    facts |= {"dropout": "0.1"} if run.adapter_type != "shira" else {}
    facts |= {"val/loss": f"{content['metrics']['val/loss']:.4g}"}
    for name, value in facts.items():
        assert f"| {name} | {value} |" in card.text
    assert ("merge it first" in card.text) == (run.adapter_type in ("adalora", "miss", "shira"))

    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/directory", str(run.paths.artifacts_dir)), names)
    loaded = AdapterFactory.load(run.paths.artifacts_dir, full_precision_base=True, dtype="float32").eval()
    with torch.no_grad():
        assert torch.equal(names["model"](input_ids=IDS).logits, loaded(input_ids=IDS).logits)

    capsys.readouterr()
    assert main(["adapters", str(run.paths.run_dir), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["adapter_type"], row["problem"], row["step"]) == (run.adapter_type, None, content["step"])
    assert row["rank"] == (12 if run.adapter_type == "adalora" else 8)


def test_checkpoint_holds_no_base_weights(run: Run, tiny_llama_dir: Path) -> None:
    content = torch.load(run.paths.last_checkpoint_path, weights_only=True)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    adapter_parts = ("lora_", "ranknum", "miss_", "shira_")
    assert all(any(part in name for part in adapter_parts) for name in content["state_dict"])
    assert sum(t.numel() for t in content["state_dict"].values()) < base.num_parameters()


def test_validate_reproduces_the_loss_of_the_run(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["validate", *run.flags, "--adapter", str(run.paths.artifacts_dir)]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("val/"))
    metadata = store.read_metadata(run.paths.artifacts_dir)
    assert float(printed["val/loss"]) == pytest.approx(metadata.metrics["val/loss"], rel=1e-4)


def test_adapter_plays(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["test", *run.flags, "--adapter", str(run.paths.artifacts_dir), "--games=2"]
    assert main([*arguments, "--play.reading=score", "--play.max_steps=3"]) == 0
    table: dict[str, Any] = json.loads(run.paths.games.table_path.read_text())
    assert table["players"]["adapter"]["num_games"] == table["players"]["base"]["num_games"] == 2
    assert 0 < table["players"]["adapter"]["steps_mean"] <= 3
    assert store.verify(run.paths.artifacts_dir).play["player"] == "adapter"


def test_merged_model_agrees_with_the_adapter(run: Run, tmp_path: Path) -> None:
    merged_dir = tmp_path / "merged"
    assert main(["merge", "--adapter", str(run.paths.artifacts_dir), "--out", str(merged_dir)]) == 0
    merged = AutoModelForCausalLM.from_pretrained(merged_dir, dtype=torch.float32)(IDS).logits
    loaded = AdapterFactory.load(run.paths.artifacts_dir, dtype="float32").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged, loaded(input_ids=IDS).logits, rtol=1e-3, atol=1e-2)
