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
from snake_lora_pl.errors import UserError
from snake_lora_pl.models import load_base_model, load_tokenizer, prepare_base_model
from snake_lora_pl.paths import RunPaths, base_model_cache_dir

SHARED_ROWS = Path(__file__).parents[2] / "shared/data/heuristics_v0.04/grid-size-10/bfs-512/BFS-512_dataset.jsonl"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_model_learns_from_real_rows_and_its_adapter_loads_in_plain_peft(
    bfs512_sample_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SNAKE_LORA_PL_CACHE", str(tmp_path / "cache"))
    try:
        prepare_base_model("smollm2-135m")
    except UserError as error:
        if "cannot download" not in str(error):  # a wrong hash or a failed conversion is a failure
            raise
        pytest.skip(f"the base model cannot be fetched here: {error}")
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
