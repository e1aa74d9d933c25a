"""Runs with a row whose loss is not finite."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from snake_lora_pl.__main__ import main
from snake_lora_pl.data.generated_rows import write_dataset

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

RUN_PATTERN = "logs/extensions/models/grid-size-5/llm_finetune_v0.03_*/snake_reasoning"
BAD_LINE = 30


@pytest.fixture(scope="module")
def rows_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, one of which holds a character that the others do not."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_dataset(path, 2, 5, "bfs", "compact", 0)
    rows = [json.loads(line) for line in path.read_text().splitlines()][:60]
    rows[BAD_LINE - 1]["prompt"] += "☃"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def broken_model_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a NaN embedding of that character."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    directory = Path(shutil.copytree(tiny_llama_dir, tmp_path_factory.mktemp("models") / "broken"))
    model = LlamaForCausalLM.from_pretrained(directory)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    bad_ids = AutoTokenizer.from_pretrained(directory)("☃").input_ids
    model.model.embed_tokens.weight.data[bad_ids] = torch.nan
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_nonfinite_row_is_named_or_its_step_is_skipped(
    rows_path: Path,
    broken_model_dir: Path,
    tmp_path: Path,
    devices: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "--config=balanced.yaml", f"--data.train_path={rows_path}", "--data.batch_size=2"]
    arguments += [f"--model.base_model={broken_model_dir}", "--data.val_fraction=0", "--model.dtype=float32"]
    arguments += ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", f"--trainer.devices={devices}"]
    arguments += [f"--trainer.strategy={'ddp' if devices > 1 else 'auto'}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}

    def run(*flags: str) -> tuple[int, str]:
        if devices == 1:
            code = main([*arguments, *flags])
        else:
            command = [sys.executable, "-m", "snake_lora_pl", *arguments, *flags]
            code = subprocess.run(command, env=environment, timeout=200, check=False).returncode
        return code, capfd.readouterr().err + caplog.text

    code, written = run()
    assert code == 2, written
    assert "Traceback" not in written
    assert "not finite" in written
    assert f"{rows_path}:{BAD_LINE}" in written
    shutil.rmtree(tmp_path / "logs")
    caplog.clear()

    code, written = run("--model.on_nonfinite=skip")
    assert code == 0, written
    assert f"{rows_path}:{BAD_LINE}" in written
    (run_dir,) = tmp_path.glob(RUN_PATTERN)
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert [row["train/loss"] == "nan" for row in rows].count(True) == 1
    assert float(rows[-1]["train/skipped_steps"]) == 1
    assert rows[-1]["train/loss"] != "nan"


def test_nonfinite_validation_row_is_named_or_skipped(
    rows_path: Path,
    broken_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = rows_path.read_text().splitlines(keepends=True)
    (tmp_path / "good.jsonl").write_text("".join(lines[: BAD_LINE - 1]))
    (tmp_path / "bad.jsonl").write_text("".join(lines[BAD_LINE - 3 : BAD_LINE + 1]))
    arguments = ["fit", "--config=balanced.yaml", "--data.train_path=good.jsonl", "--data.val_path=bad.jsonl"]
    arguments += [f"--model.base_model={broken_model_dir}", "--model.dtype=float32", "--data.batch_size=2"]
    arguments += ["--trainer.max_steps=2", "--trainer.accelerator=cpu", "--num_sample_rows=0"]
    assert main(arguments) == 2
    written = capfd.readouterr().err
    assert "step 2" in written
    assert "not finite" in written
    assert "bad.jsonl:3" in written
    assert "Traceback" not in written
    shutil.rmtree(tmp_path / "logs")

    assert main([*arguments, "--model.on_nonfinite=skip"]) == 0
    assert any("bad.jsonl:3" in message for message in caplog.messages)
    (run_dir,) = tmp_path.glob(RUN_PATTERN)
    with open(run_dir / "metrics.csv", newline="") as file:
        (loss,) = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    assert loss > 0
