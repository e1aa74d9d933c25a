"""A chat template that renders the current date: training, play, resume and export use the date of the training."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from snake_lora_pl.__main__ import main
from snake_lora_pl.adapters import store
from snake_lora_pl.data.encoding import Encoder
from snake_lora_pl.data.generated_rows import write_dataset
from snake_lora_pl.paths import RunPaths
from tests.small_run import small_run

pytestmark = pytest.mark.filterwarnings("ignore")

TRAINED_ON = "2025-03-01"


@pytest.fixture
def dated_base_dir(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "dated"
    shutil.copytree(tiny_llama_dir, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }} " + tokenizer.chat_template
    tokenizer.save_pretrained(directory)
    return directory


def test_date_of_the_training_is_recorded_and_used_on_other_days(
    dated_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "rows.jsonl", 4, 5, "bfs", "compact", 0)
    few = ["--trainer.max_steps=2", "--trainer.val_check_interval=1", "--trainer.limit_train_batches=4"]
    few += ["--num_sample_rows=0", "--play.final_games=0", "--data.template=chat"]
    flags = small_run(dated_base_dir, tmp_path / "rows.jsonl", *few)
    assert main(["fit", *flags, f"--data.template_date={TRAINED_ON}"]) == 0
    (run_dir,) = tmp_path.glob("logs/extensions/models/grid-size-5/*/snake_reasoning")
    run = RunPaths(run_dir)
    assert yaml.safe_load(run.config_path.read_text())["data"]["template_date"] == TRAINED_ON
    assert store.read_metadata(run.artifacts_dir).data["template_date"] == TRAINED_ON
    saved = AutoTokenizer.from_pretrained(run.artifacts_dir)
    assert saved.apply_chat_template([{"role": "user", "content": "p"}], tokenize=False).startswith(TRAINED_ON)

    rendered: set[str | None] = set()
    encode_prompts = Encoder.encode_prompts

    def record(self: Encoder, prompts: list[str]) -> list[list[int]]:
        rendered.add(self.template_date)
        return encode_prompts(self, prompts)

    monkeypatch.setattr(Encoder, "encode_prompts", record)
    adapter = f"--adapter={run.artifacts_dir}"
    assert main(["test", *flags, adapter, "--games=1", "--play.max_steps=2"]) == 0
    assert main(["predict", *flags, adapter, f"--data.predict_path={tmp_path / 'rows.jsonl'}"]) == 0
    assert rendered == {TRAINED_ON}

    caplog.clear()
    assert main(["fit", *flags, "--ckpt_path=last", "--trainer.max_steps=3"]) == 0
    assert store.read_metadata(run.artifacts_dir).data["template_date"] == TRAINED_ON
    assert not any("template_date" in message for message in caplog.messages)
