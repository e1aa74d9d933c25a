"""Keys and tokens that a user gave stand in nothing that a run writes or prints."""

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
from snake_lora_pl.data.generate import write_dataset
from snake_lora_pl.errors import UserError
from snake_lora_pl.secrets import MASK, mask_arguments, mask_secrets, redact_config
from snake_lora_pl.training.module import LoRALightningModule

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ENVIRONMENT = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_theTokenOfTheEnvironment",
    "HUGGING_FACE_HUB_TOKEN": "hf_theOlderTokenOfTheEnvironment",
}
FLAG = "theKeyOfTheCommandLine"
SECRETS = [*ENVIRONMENT.values(), FLAG]


class KeyedLogger(CSVLogger):
    """A logger of a service that is given its key, as Comet's and Neptune's are."""

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
    """Fit with secrets, and return the exit code and all that was printed or logged, at whatever level."""
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


def where_secrets_stand(directory: Path, written: str) -> list[str]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert files
    texts = {"what was printed": written.encode(), **{str(path): path.read_bytes() for path in files}}
    return [f"{place}: {secret}" for place, text in texts.items() for secret in SECRETS if secret.encode() in text]


def test_a_run_writes_and_prints_no_key(fit: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    logger = ["--trainer.logger=tests.test_secrets.KeyedLogger", "--trainer.logger.save_dir=service"]
    code, written = fit(*logger, f"--trainer.logger.api_key={FLAG}", "--play.final_games=1", "--play.max_steps=2")
    assert code == 0, written
    (config,) = (tmp_path / "run").rglob("config.yaml")
    assert "KeyedLogger" in config.read_text()
    assert where_secrets_stand(tmp_path / "run", written) == []
    # What was written fits again; the service's key comes from its environment then.
    assert main(["fit", "--config", str(config), "--trainer.max_steps=1"]) == 0


def test_a_mistake_or_a_crash_tells_no_key(
    fit: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, written = fit("--trainer.logger=CSVLogger", f"--trainer.logger.api_key={FLAG}")  # which takes none
    assert code == 2
    assert FLAG not in written, written
    mistyped = [f"--model.hub_tokn={FLAG}", f"--trainer.logger.api_kye={FLAG}", f"--trainer.logger.pasword={FLAG}"]
    for flag in [f"--model.hub_token={FLAG}", *mistyped]:
        code, written = fit(flag)
        assert code == 2
        assert FLAG not in written, written
    code, written = fit(f"--model.base_model=https://somebody:{FLAG}@models/snake")
    assert code == 2
    assert f"https://{MASK}@models/snake" in written
    assert FLAG not in written

    def fail(*_: Any) -> None:
        raise UserError(f"the service refused {os.environ['WANDB_API_KEY']}")

    monkeypatch.setattr(LoRALightningModule, "training_step", fail)
    code, written = fit()
    assert code == 2
    assert f"the service refused {MASK}" in written
    assert ENVIRONMENT["WANDB_API_KEY"] not in written


@pytest.mark.slow
def test_a_run_with_wandb_writes_and_prints_no_key(fit: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    before = dict(os.environ)
    keyed = {"class_path": "tests.test_secrets.KeyedLogger", "init_args": {"save_dir": "service", "api_key": FLAG}}
    ours = {"class_path": "snake_lora_pl.reporting.wandb.RunWandbLogger"}
    code, written = fit(f"--trainer.logger={json.dumps([ours, keyed])}")  # W&B notes the command
    wandb.teardown()
    for name in os.environ.keys() - before.keys():
        os.environ.pop(name)
    assert code == 0, written
    assert list((tmp_path / "run").rglob("*.wandb"))
    assert where_secrets_stand(tmp_path / "run", written) == []


def test_what_names_a_secret_loses_it_and_nothing_else_does() -> None:
    config = {
        "logger": [{"init_args": {"api_key": "a", "project": "p"}}],
        "hub_token": "t",
        "model": {"max_new_tokens": 64, "loss_chunk_tokens": 512, "tokenizer": "x"},
    }
    assert redact_config(config) == {"logger": [{"init_args": {"project": "p"}}], "model": config["model"]}
    assert mask_secrets("no secret12 here", ["push", "--token", "secret12"]) == f"no {MASK} here"
    assert mask_secrets("no secret12 here", ["fit", "--a.password=secret12"]) == f"no {MASK} here"
    assert mask_secrets("it is 512", ["fit", "--model.loss_chunk_tokens=512"]) == "it is 512"


@pytest.mark.parametrize(
    "name", ["AWS_SECRET_ACCESS_KEY", "NEPTUNE_API_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MY_PASSWD"]
)
def test_secrets_of_many_services_are_known_by_their_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "theKeyOfSomeService")
    assert mask_secrets("refused theKeyOfSomeService", []) == f"refused {MASK}"
    assert redact_config({"run": "theKeyOfSomeService", name.lower(): "x"}) == {"run": MASK}


def test_what_gives_itself_away_is_masked_wherever_it_stands() -> None:
    token = "hf_" + "aB3" * 10
    config = {"revision": token, "uri": ["https://me:dear@host/x", "s3://bucket/a@b", "me@host"]}
    assert redact_config(config) == {
        "revision": MASK,
        "uri": [f"https://{MASK}@host/x", "s3://bucket/a@b", "me@host"],
    }
    text = "Got {'api_key': 'dear-to-me', 'project': 'snake-lora'}, num_tokens: 12345678, password=dear-to-me"
    shown = f"Got {{'api_key': '{MASK}', 'project': 'snake-lora'}}, num_tokens: 12345678, password={MASK}"
    assert mask_secrets(text, []) == shown
    assert mask_arguments(["fit", "--hub_tokn", "dear-to-me", "--data.max_length=512"]) == [
        "fit", "--hub_tokn", MASK, "--data.max_length=512"
    ]  # fmt: skip
