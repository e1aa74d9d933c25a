"""Keys and tokens of the user appear in nothing that a run writes or prints."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger

from snake_lora_pl.__main__ import main
from snake_lora_pl.data.generated_rows import write_dataset
from snake_lora_pl.errors import UserError
from snake_lora_pl.secrets import MASK
from snake_lora_pl.training.module import LoRALightningModule

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ENVIRONMENT = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_theTokenOfTheEnvironment",
    "HUGGING_FACE_HUB_TOKEN": "hf_theOlderTokenOfTheEnvironment",
}
FLAG = "theKeyOfTheCommandLine"
SECRETS = [*ENVIRONMENT.values(), FLAG]
LOGGER_CLASS = f"{__name__}.KeyedLogger"


class KeyedLogger(CSVLogger):
    """A logger whose constructor takes a key, as those of Comet and Neptune do."""

    def __init__(self, save_dir: str, api_key: str | None = None) -> None:
        super().__init__(save_dir)
        self.api_key = api_key


@pytest.fixture
def fit(
    tiny_llama_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Callable[..., tuple[int, str]]:
    """Fit with secrets; return the exit code and everything printed or logged at any level."""
    caplog.set_level(logging.DEBUG)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    write_dataset(tmp_path / "rows.jsonl", 2, 5, "bfs", "compact", 0)
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")

    def run(*flags: str) -> tuple[int, str]:
        arguments = ["fit", "--config=balanced.yaml", f"--data.train_path={tmp_path / 'rows.jsonl'}"]
        arguments += [f"--model.base_model={tiny_llama_dir}", "--trainer.accelerator=cpu", "--trainer.max_steps=2"]
        arguments += ["--trainer.limit_val_batches=1", "--model.max_new_tokens=2", *flags]
        monkeypatch.setattr(sys, "argv", ["snake_lora_pl", *arguments])
        code = main(arguments)
        printed = capfd.readouterr()
        return code, printed.out + printed.err + caplog.text

    return run


def leaked_secrets(directory: Path, output: str) -> list[str]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert files
    contents = {"output": output.encode(), **{str(path): path.read_bytes() for path in files}}
    return [f"{place}: {secret}" for place, text in contents.items() for secret in SECRETS if secret.encode() in text]


def test_run_writes_and_prints_no_key(fit: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    logger = [f"--trainer.logger={LOGGER_CLASS}", "--trainer.logger.save_dir=service"]
    code, output = fit(*logger, f"--trainer.logger.api_key={FLAG}", "--play.final_games=1", "--play.max_steps=2")
    assert code == 0, output
    (config,) = (tmp_path / "run").rglob("config.yaml")
    assert "KeyedLogger" in config.read_text()
    assert leaked_secrets(tmp_path / "run", output) == []
    # The saved config can be used again; the service then takes its key from the environment.
    assert main(["fit", "--config", str(config), "--trainer.max_steps=1"]) == 0


def test_error_messages_and_tracebacks_contain_no_key(
    fit: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, output = fit("--trainer.logger=CSVLogger", f"--trainer.logger.api_key={FLAG}")  # which has no such option
    assert code == 2
    assert FLAG not in output, output
    mistyped = [f"--model.hub_tokn={FLAG}", f"--trainer.logger.api_kye={FLAG}", f"--trainer.logger.pasword={FLAG}"]
    for flag in [f"--model.hub_token={FLAG}", *mistyped]:
        code, output = fit(flag)
        assert code == 2
        assert FLAG not in output, output
    code, output = fit(f"--model.base_model=https://somebody:{FLAG}@models/snake")
    assert code == 2
    assert f"https://{MASK}@models/snake" in output
    assert FLAG not in output

    def fail(*_: Any) -> None:
        raise UserError(f"the service refused {os.environ['WANDB_API_KEY']}")

    monkeypatch.setattr(LoRALightningModule, "training_step", fail)
    code, output = fit()
    assert code == 2
    assert f"the service refused {MASK}" in output
    assert ENVIRONMENT["WANDB_API_KEY"] not in output


@pytest.mark.slow
def test_run_with_wandb_writes_and_prints_no_key(fit: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    before = dict(os.environ)
    keyed_logger = {"class_path": LOGGER_CLASS, "init_args": {"save_dir": "service", "api_key": FLAG}}
    run_logger = {"class_path": "snake_lora_pl.reporting.wandb.RunWandbLogger"}
    code, output = fit(f"--trainer.logger={json.dumps([run_logger, keyed_logger])}")  # W&B records the command line
    wandb.teardown()
    for name in os.environ.keys() - before.keys():
        os.environ.pop(name)
    assert code == 0, output
    assert list((tmp_path / "run").rglob("*.wandb"))
    assert leaked_secrets(tmp_path / "run", output) == []
