"""Training in one call: the same run as that of the command, results as values, user errors as one line."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from snake_lora_pl import LoRAConfig, TrainingResult, train_on_heuristic_data
from snake_lora_pl.__main__ import main
from snake_lora_pl.adapters import store
from snake_lora_pl.errors import UserError

# Each test trains whole runs.
pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(scope="module")
def small(tiny_llama_dir: Path) -> dict[str, Any]:
    """Settings of a small run."""
    return {
        "model": {"base_model": str(tiny_llama_dir), "dtype": "float32", "max_new_tokens": 4},
        "data.batch_size": 4,
        "data.max_length": 1200,
        "trainer": {"max_steps": 3, "limit_val_batches": 2, "accelerator": "cpu", "enable_progress_bar": False},
    }


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def result(in_tmp: Path, small: dict[str, Any], bfs512_sample_path: Path) -> TrainingResult:
    play = {"final_games": 2, "max_steps": 2}
    return train_on_heuristic_data(bfs512_sample_path, LoRAConfig(rank=4, alpha=8), {**small, "play": play})


def test_result_holds_files_and_metrics_of_the_run(
    in_tmp: Path, result: TrainingResult, capfd: pytest.CaptureFixture[str]
) -> None:
    metadata = store.verify(result.adapter_dir)
    assert metadata.peft_config["r"] == 4
    assert metadata.peft_config["lora_alpha"] == 8
    assert result.metrics == metadata.metrics
    assert result.metrics["val/loss"] > 0
    assert result.num_steps == 3
    assert 1 <= result.adapter_step <= 3
    assert torch.load(result.checkpoint_path, weights_only=True)["global_step"] == 3
    assert "val/loss" in result.metrics_path.read_text()
    assert yaml.safe_load(result.config_path.read_text())["trainer"]["max_steps"] == 3
    assert result.games_dir is not None
    table = json.loads((result.games_dir / "table.json").read_text())
    assert result.play.keys() == table["players"].keys() == {"adapter", "base", "bfs", "random_legal"}
    assert result.play["bfs"]["apples_mean"] == table["players"]["bfs"]["apples_mean"]
    for path in (result.adapter_dir, result.checkpoint_path, result.config_path, result.metrics_path, result.games_dir):
        assert path.is_relative_to(result.run_dir)
    assert result.run_dir.is_relative_to(in_tmp / "logs")
    assert capfd.readouterr().out == ""
    assert "SNAKE_LORA_PL_RUN_DIR" not in os.environ


def test_call_and_command_write_the_same_weights(in_tmp: Path, small: dict[str, Any], bfs512_sample_path: Path) -> None:
    result = train_on_heuristic_data(bfs512_sample_path, "lightweight", {**small, "root": "by_call"})
    flags = [f"--model.{key}={value}" for key, value in small["model"].items()]
    flags += [f"--trainer.{key}={value}" for key, value in small["trainer"].items()]
    flags += ["--data.batch_size=4", "--data.max_length=1200", f"--data.train_path={bfs512_sample_path}"]
    assert main(["fit", "--config", "balanced.yaml", "--config", "lightweight.yaml", *flags, "--root=by_command"]) == 0
    (by_command,) = Path("by_command").rglob(store.WEIGHTS_FILE)
    assert by_command.read_bytes() == (result.adapter_dir / store.WEIGHTS_FILE).read_bytes()


def test_config_files_compose_and_data_sets_are_joined(
    in_tmp: Path, small: dict[str, Any], bfs512_sample_path: Path
) -> None:
    Path("mine.yaml").write_text("model: {lora: {rank: 3}, learning_rate: 0.5, warmup_steps: 7}")
    other = Path("other.jsonl")
    other.write_text(bfs512_sample_path.read_text())
    settings = {**small, "config": ["balanced.yaml", Path("mine.yaml")], "model.learning_rate": 0.25}
    result = train_on_heuristic_data([bfs512_sample_path, other], training_config=settings)
    resolved = yaml.safe_load(result.config_path.read_text())
    assert resolved["model"]["lora"] == {**resolved["model"]["lora"], "rank": 3, "alpha": 32}
    assert resolved["model"]["learning_rate"] == 0.25
    assert resolved["model"]["warmup_steps"] == 7
    assert resolved["data"]["train_path"] == [str(bfs512_sample_path), "other.jsonl"]
    assert result.games_dir is None
    assert result.play == {}


def test_run_resumes_from_its_checkpoint(
    result: TrainingResult, small: dict[str, Any], bfs512_sample_path: Path
) -> None:
    more = {**small, "trainer": {**small["trainer"], "max_steps": 5}, "ckpt_path": result.checkpoint_path}
    resumed = train_on_heuristic_data(bfs512_sample_path, LoRAConfig(rank=4, alpha=8), more)
    assert resumed.run_dir == result.run_dir
    assert resumed.num_steps == 5


def test_libraries_log_nothing_and_the_callers_logging_and_warnings_are_restored(
    in_tmp: Path, small: dict[str, Any], bfs512_sample_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import warnings

    from transformers.utils import logging as transformers_logging

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    lightning = logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(lightning, "handlers", [handler])
    transformers_logging.enable_progress_bar()

    def settings() -> list[Any]:
        levels = [logging.getLogger(name).level for name in ("snake_lora_pl", "lightning.pytorch", "bitsandbytes")]
        handlers, filters = list(logging.getLogger().handlers), list(warnings.filters)
        return [levels, handlers, filters, transformers_logging.is_progress_bar_enabled()]

    lightning.setLevel(logging.INFO)
    before = settings()
    train_on_heuristic_data(bfs512_sample_path, None, small)
    assert settings() == before
    assert messages == []
    lightning.info("restored")
    assert messages == ["restored"]


class PressCtrlC(Callback):
    """Sends SIGINT before the second step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_ends_after_the_step_names_the_checkpoint_and_restores_the_callers_handler(
    in_tmp: Path, small: dict[str, Any], bfs512_sample_path: Path
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    stopped = {**small, "trainer": {**small["trainer"], "callbacks": [{"class_path": f"{__name__}.PressCtrlC"}]}}
    with pytest.raises(KeyboardInterrupt, match="SIGINT after step 1") as caught:
        train_on_heuristic_data(bfs512_sample_path, None, stopped)
    assert signal.getsignal(signal.SIGINT) is handler
    (checkpoint_path,) = re.findall(r'training_config={"ckpt_path": "(.*)"}', str(caught.value))
    assert train_on_heuristic_data(bfs512_sample_path, None, {**small, "ckpt_path": checkpoint_path}).num_steps == 3


@pytest.mark.parametrize(
    ("dataset", "adapter", "settings", "part"),
    [
        ("nowhere.jsonl", None, {}, "nowhere.jsonl"),
        (None, "ligthweight", {}, "'lightweight'"),
        (None, None, {"config": "balnced.yaml"}, "'balanced.yaml'"),
        (None, None, {"trainer": {"max_step": 3}}, "'trainer.max_steps'"),
        (None, None, {"model.learning_rate": -1}, "model.learning_rate"),
        (None, None, {"data": {"train_path": "a.jsonl"}}, "data.train_path is set by the argument dataset_path"),
        (None, "balanced", {"model": {"lora": {"rank": 3}}}, "model.lora is set by the argument adapter_config"),
        (None, "balanced", {"model.lora.rank": 3}, "model.lora.rank is set by the argument adapter_config"),
        (None, None, {"trainer.callbacks": [object()]}, "trainer.callbacks"),
        (None, None, {"trainer.fast_dev_run": True}, "trainer.fast_dev_run=True"),
        (None, None, {"trainer.enable_checkpointing": False}, "trainer.enable_checkpointing=False"),
        (None, {"rank": 4}, {}, "{'rank': 4} of type dict"),
        (None, None, {"config": 5}, "not 5 of type int"),
    ],
)
def test_user_error_is_one_line_and_writes_nothing(
    in_tmp: Path, bfs512_sample_path: Path, small: dict[str, Any], dataset: str | None, adapter: Any,
    settings: dict[str, Any], part: str,
) -> None:  # fmt: skip
    with pytest.raises(UserError) as caught:
        train_on_heuristic_data(dataset or bfs512_sample_path, adapter, {**small, **settings})
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(in_tmp.iterdir())
    assert "SNAKE_LORA_PL_RUN_DIR" not in os.environ


@pytest.mark.parametrize("dataset", [None, 5, {}, [None]])
def test_missing_dataset_path_is_an_error_instead_of_generated_rows(
    in_tmp: Path, small: dict[str, Any], dataset: Any
) -> None:
    with pytest.raises(UserError, match="dataset_path"):
        train_on_heuristic_data(dataset, None, small)
    assert not list(in_tmp.iterdir())


def test_settings_must_be_a_dict(in_tmp: Path, bfs512_sample_path: Path) -> None:
    with pytest.raises(UserError, match="training_config.*'balanced.yaml'"):
        train_on_heuristic_data(bfs512_sample_path, None, "balanced.yaml")  # type: ignore[arg-type]


def test_run_without_steps_is_a_user_error(in_tmp: Path, small: dict[str, Any], bfs512_sample_path: Path) -> None:
    with pytest.raises(UserError, match=r"trainer\.max_steps"):
        train_on_heuristic_data(bfs512_sample_path, None, {**small, "trainer.max_steps": 0})
