from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from snake_lora_pl.adapters import store
from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.errors import UserError
from snake_lora_pl.training import step_exchange
from snake_lora_pl.training.callbacks.adapter_checkpoint import AdapterCheckpoint
from tests.training.conftest import make_loader, make_rows, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")

ROWS = make_rows(12)
VAL_ROWS = make_rows(4, seed=5)


def fit(
    module: pl.LightningModule, root: Path, checkpoint: AdapterCheckpoint, ckpt_path: str | None = None, **settings: Any
) -> pl.Trainer:
    trainer = make_trainer(root, enable_checkpointing=True, callbacks=[checkpoint], num_sanity_val_steps=0, **settings)
    trainer.fit(module, make_loader(ROWS, 4), make_loader(VAL_ROWS, 4), ckpt_path=ckpt_path)
    return trainer


def make_checkpoint(root: Path, **settings: Any) -> AdapterCheckpoint:
    return AdapterCheckpoint(str(root / "run" / "checkpoints"), **settings)


def weights(module: pl.LightningModule) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


def test_checkpoints_hold_adapter_and_trainer_state_without_base_weights(make_module, tmp_path: Path) -> None:
    module = make_module()
    fit(module, tmp_path, make_checkpoint(tmp_path), max_epochs=2)
    files = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [f.name for f in files] == ["epoch=0-step=3.ckpt", "epoch=1-step=6.ckpt", "last.ckpt"]
    for file in files:
        content = torch.load(file, weights_only=True)
        assert content["state_dict"].keys() == weights(module).keys()
        assert content["optimizer_states"]


def test_last_is_written_every_n_steps_and_best_k_are_kept(make_module, tmp_path: Path) -> None:
    seen: list[int] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            path = tmp_path / "run" / "checkpoints" / "last.ckpt"
            seen.append(torch.load(path, weights_only=True)["global_step"] if path.exists() else 0)

    checkpoint = make_checkpoint(tmp_path, save_every_n_steps=2, save_top_k=1)
    trainer = make_trainer(
        tmp_path, enable_checkpointing=True, callbacks=[Watch(), checkpoint], num_sanity_val_steps=0, max_epochs=3
    )
    trainer.fit(make_module(), make_loader(ROWS, 4), make_loader(VAL_ROWS, 4))
    # Lightning calls checkpoint callbacks last, so each step sees the file of the previous one.
    assert seen == [0, 0, 2, 3, 4, 4, 6, 6, 8]
    assert len(list((tmp_path / "run" / "checkpoints").glob("epoch=*.ckpt"))) == 1


def test_last_is_written_after_a_number_of_seconds(
    make_module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = itertools.count(100.0, 20.0)  # a step takes 20 seconds
    monkeypatch.setattr(step_exchange, "time", SimpleNamespace(monotonic=lambda: next(now)))
    seen: list[int] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            seen.append(checkpoint.last_saved_step)

    checkpoint = make_checkpoint(tmp_path, save_every_n_steps=0, save_every_s=60.0)
    callbacks = [Watch(), checkpoint]
    trainer = make_trainer(tmp_path, enable_checkpointing=True, callbacks=callbacks, max_steps=9, max_epochs=-1)
    trainer.fit(make_module(), make_loader(make_rows(36), 4))
    # The first step starts the clock, and each write is before the batch that follows.
    assert seen == [0, 0, 0, 0, 4, 4, 4, 7, 7]


def test_adapter_directory_holds_the_best_adapter_by_the_monitored_metric(make_module, tmp_path: Path) -> None:
    # The model diverges at this learning rate, so the best adapter is not the last.
    module = make_module(learning_rate=1.0)
    checkpoint = make_checkpoint(tmp_path)
    trainer = fit(module, tmp_path, checkpoint, max_epochs=4)
    adapter_dir = tmp_path / "run" / "lora_adapters" / "model_artifacts"
    metadata = store.verify(adapter_dir)
    assert metadata.metrics["val/loss"] == pytest.approx(float(checkpoint.best_model_score))
    assert f"step={metadata.step}." in checkpoint.best_model_path
    assert metadata.step < trainer.global_step
    best = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
    loaded = store.load(adapter_dir)
    for name, parameter in loaded.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, best[f"model.{name}"])


def test_adapter_directory_loads_in_peft_with_bit_equal_logits(
    make_module, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    module = make_module()
    checkpoint = make_checkpoint(tmp_path, monitor=None)
    fit(module, tmp_path, checkpoint)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, checkpoint.adapter_dir)
    ids = torch.tensor([ROWS[0][0]])
    module.eval()
    assert torch.equal(plain(ids).logits, module.peft_model(ids).logits)


def test_without_validation_the_newest_adapter_is_kept(make_module, tmp_path: Path) -> None:
    module = make_module()
    checkpoint = make_checkpoint(tmp_path)
    trainer = make_trainer(tmp_path, enable_checkpointing=True, callbacks=[checkpoint], max_epochs=2)
    trainer.fit(module, make_loader(ROWS, 4))
    assert checkpoint.adapter_dir is not None
    assert store.verify(checkpoint.adapter_dir).step == 6
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


def test_unknown_metric_is_an_error_that_lists_the_logged_ones(make_module, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint\.monitor=val/los:.*val/loss.*val/perplexity"):
        fit(make_module(), tmp_path, make_checkpoint(tmp_path, monitor="val/los"))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_run_ends_with_the_weights_of_an_uninterrupted_run(
    make_module, tmp_path: Path, accumulate: int
) -> None:
    settings = {"max_epochs": 4, "accumulate_grad_batches": accumulate}
    straight = make_module()
    fit(straight, tmp_path / "straight", make_checkpoint(tmp_path / "straight"), **settings)

    stopped = make_module()
    first = make_checkpoint(tmp_path / "stopped")

    class StopAfterTwoEpochs(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            if trainer.current_epoch == 1:
                trainer.should_stop = True

    trainer = make_trainer(
        tmp_path, enable_checkpointing=True, callbacks=[first, StopAfterTwoEpochs()], num_sanity_val_steps=0, **settings
    )
    trainer.fit(stopped, make_loader(ROWS, 4), make_loader(VAL_ROWS, 4))

    resumed = make_module()
    checkpoint = make_checkpoint(tmp_path / "stopped")
    trainer = fit(
        resumed, tmp_path, checkpoint, ckpt_path=str(tmp_path / "stopped" / "run" / "checkpoints" / "last.ckpt"),
        **settings,
    )  # fmt: skip
    for name, weight in weights(straight).items():
        assert torch.equal(weight, weights(resumed)[name]), name


def test_checkpoint_of_another_adapter_is_rejected(make_module, tmp_path: Path) -> None:
    fit(make_module(), tmp_path, make_checkpoint(tmp_path))
    last = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    other_rank = make_module(lora=LoRAConfig(rank=2, dropout=0.0))
    with pytest.raises(UserError, match="lora_"):
        fit(other_rank, tmp_path, make_checkpoint(tmp_path / "b"), ckpt_path=last, max_epochs=2)
    other_layers = make_module(lora=LoRAConfig(rank=4, dropout=0.0, target_modules=["q_proj"]))
    with pytest.raises(UserError, match="lora_"):
        fit(other_layers, tmp_path, make_checkpoint(tmp_path / "c"), ckpt_path=last, max_epochs=2)


def test_checkpoint_of_another_base_model_or_scale_is_rejected(
    make_module, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    fit(make_module(), tmp_path, make_checkpoint(tmp_path))
    last = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    other = Path(shutil.copytree(tiny_llama_dir, tmp_path / "other"))
    moved = Path(shutil.copytree(tiny_llama_dir, tmp_path / "moved"))
    model = LlamaForCausalLM.from_pretrained(other)
    torch.nn.init.constant_(model.model.norm.weight, 2.0)
    model.save_pretrained(other)
    lora: dict[str, Any] = {"rank": 4, "alpha": 8, "dropout": 0.0}
    for settings, key in (
        ({"base_model": str(other)}, r"model\.base_model"),
        ({"adapter_type": "qlora"}, r"model\.adapter_type .*\blora\b.*\bqlora\b"),
        ({"lora": LoRAConfig(**{**lora, "alpha": 7})}, r"model\.lora\.alpha .*\b8\b.*\b7\b"),
        ({"lora": LoRAConfig(**lora, use_rslora=True)}, r"model\.lora\.use_rslora .*False.*True"),
        ({"lora": LoRAConfig(**lora, alpha_pattern={"q_proj": 3})}, r"model\.lora\.alpha_pattern .*q_proj\b.*3"),
    ):
        with pytest.raises(UserError, match=key):
            fit(make_module(**settings), tmp_path, make_checkpoint(tmp_path / "b"), ckpt_path=last, max_epochs=2)
    elsewhere = make_module(base_model=str(moved), lora=LoRAConfig(**{**lora, "dropout": 0.1}))
    fit(elsewhere, tmp_path, make_checkpoint(tmp_path / "b"), ckpt_path=last, max_epochs=2)


class Payload:
    def __reduce__(self) -> tuple:
        return (Path("/nonexistent-snake").touch, ())


@pytest.mark.parametrize("damage", ["truncated", "text", "pickle", "missing"])
def test_damaged_checkpoint_is_rejected_and_runs_no_code(make_module, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "bad.ckpt"
    if damage == "pickle":
        torch.save({"state_dict": Payload()}, path)
    elif damage == "truncated":
        torch.save({"state_dict": {"a": torch.zeros(1000)}}, path)
        path.write_bytes(path.read_bytes()[:500])
    elif damage == "text":
        path.write_text("hello")
    with pytest.raises(UserError, match=r"--ckpt_path .*bad\.ckpt"):
        fit(make_module(), tmp_path, make_checkpoint(tmp_path), ckpt_path=str(path))


def test_failed_write_keeps_the_last_good_adapter(make_module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_module()
    checkpoint = make_checkpoint(tmp_path)
    fit(module, tmp_path, checkpoint)
    assert checkpoint.adapter_dir is not None
    good = store.verify(checkpoint.adapter_dir)

    def disk_full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "model_card", disk_full)
    with pytest.raises(UserError, match=r"model_artifacts.*No space left on device"):
        fit(make_module(), tmp_path, make_checkpoint(tmp_path, monitor=None))
    monkeypatch.undo()
    assert store.verify(checkpoint.adapter_dir) == good


def test_leftovers_of_a_killed_process_are_removed(make_module, tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    artifacts = tmp_path / "run" / "lora_adapters"
    (artifacts / ".model_artifacts.abc.tmp").mkdir(parents=True)
    checkpoints.mkdir(parents=True)
    (checkpoints / ".last.ckpt.abc.tmp").write_text("half")
    fit(make_module(), tmp_path, make_checkpoint(tmp_path))
    assert not list(artifacts.glob(".*"))
    assert not list(checkpoints.glob(".*"))


def test_invalid_settings_are_rejected() -> None:
    with pytest.raises(UserError, match=r"checkpoint\.mode=least"):
        AdapterCheckpoint(mode="least")
    with pytest.raises(UserError, match=r"checkpoint\.save_top_k=0"):
        AdapterCheckpoint(save_top_k=0)
    with pytest.raises(UserError, match=r"checkpoint\.save_every_n_steps=-1"):
        AdapterCheckpoint(save_every_n_steps=-1)
    for seconds in (-1.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match=rf"checkpoint\.save_every_s={seconds}"):
            AdapterCheckpoint(save_every_s=seconds)
