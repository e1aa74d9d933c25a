"""The real thing: smollm2-135m on real rows, through the command line."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from snake_lora_pl.__main__ import main
from snake_lora_pl.adapters import store
from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.adapters.factory import AdapterFactory
from snake_lora_pl.adapters.gguf import find_converter
from snake_lora_pl.errors import UserError
from snake_lora_pl.models import load_base_model, load_tokenizer, prepare_base_model, resolve_base_model
from snake_lora_pl.paths import RunPaths, base_model_cache_dir

SHARED_ROWS = Path(__file__).parents[3] / "shared/data/heuristics_v0.04/grid-size-10/bfs-512/BFS-512_dataset.jsonl"


@pytest.fixture(scope="module")
def fetched_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the base model; skips the test where it cannot be fetched."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SNAKE_LORA_PL_CACHE", str(cache))
        try:
            prepare_base_model("smollm2-135m")
        except UserError as error:
            if "cannot download" not in str(error):  # a wrong hash or a failed conversion is a failure
                raise
            pytest.skip(f"the base model cannot be fetched here: {error}")
    return cache


@pytest.fixture(autouse=True)
def _in_fetched_cache(fetched_cache: Path, _isolated_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNAKE_LORA_PL_CACHE", str(fetched_cache))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_model_learns_from_real_rows_and_its_adapter_loads_in_plain_peft(
    bfs512_sample_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = SHARED_ROWS if SHARED_ROWS.is_file() else bfs512_sample_path

    arguments = ["--config", "balanced.yaml", "--config", "quickstart.yaml", f"--data.train_path={rows}"]
    arguments += ["--trainer.limit_val_batches=1", "--trainer.accelerator=cpu"]
    assert main(["fit", *arguments, "--trainer.max_steps=6", "--data.batch_size=4"]) == 0

    (run_dir,) = tmp_path.glob("logs/extensions/models/grid-size-10/*/snake_reasoning")
    with open(RunPaths(run_dir).metrics_path, newline="") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.2

    adapter_dir = RunPaths(run_dir).artifacts_dir
    metadata = store.verify(adapter_dir)
    assert metadata.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert 0.001 < metadata.trainable_parameters / metadata.total_parameters < 0.015
    ids = torch.tensor([load_tokenizer("smollm2-135m")("You are playing Snake on a 10x10 grid.")["input_ids"]])
    ours = store.load(adapter_dir).eval()(ids).logits
    plain_base = AutoModelForCausalLM.from_pretrained(
        base_model_cache_dir("smollm2-135m"), dtype=load_base_model("smollm2-135m").dtype
    )
    untrained = plain_base(ids).logits
    plain = PeftModel.from_pretrained(plain_base, adapter_dir)(ids).logits
    assert torch.equal(plain, ours)
    assert not torch.equal(plain, untrained)

    merged_dir = tmp_path / "merged"
    assert main(["merge", "--adapter", str(adapter_dir), "--out", str(merged_dir), "--dtype", "float32"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(merged_dir)(ids).logits
    expected = store.load(adapter_dir, dtype="float32").eval()(ids).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_llama_cpp_s_own_converter_writes_the_merged_weights(tmp_path: Path) -> None:
    try:
        find_converter()
    except UserError as error:
        pytest.skip(str(error))
    model = AdapterFactory.create("lora", "smollm2-135m", LoRAConfig(rank=4), dtype="float32")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    source = resolve_base_model("smollm2-135m")
    metadata = store.AdapterMetadata(
        adapter_type="lora",
        base_model=source.canonical_id,
        base_model_name="smollm2-135m",
        base_revision=None,
        base_sha256=source.sha256,
        trainable_parameters=0,
        total_parameters=0,
    )
    adapter_dir = store.save(model, tmp_path / "adapter", metadata)
    out = tmp_path / "out"
    assert (
        main(["export", "--adapter", str(adapter_dir), "--format", "gguf", "--template", "raw", "--out", str(out)]) == 0
    )
    assert {path.name for path in out.iterdir()} == {"model.gguf", "Modelfile"}
    written = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32).state_dict()
    for name, weight in model.merge_and_unload().state_dict().items():
        # bfloat16, as the base is stored: eight bits.
        torch.testing.assert_close(written[name], weight, rtol=2**-8, atol=1e-6)
