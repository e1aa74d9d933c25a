from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import SpikeDetection

from snake_lora_pl.errors import UserError
from snake_lora_pl.training import float16
from snake_lora_pl.training.loss_normalization import MicroBatch
from snake_lora_pl.training.nonfinite import MAX_SKIPPED_IN_A_ROW, NonfiniteGuard
from tests.training.conftest import make_loader, make_rows, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")

ROWS = make_rows(16)


def source(index: int) -> str:
    return f"rows.jsonl:{len(ROWS[index][0])}"


def multiply_losses(module: Any, micro_batches: set[int], value: float = math.nan) -> None:
    """Multiply the loss of some micro-batches, and with it their gradient, by a value."""
    training_step, add = module.training_step, module.step_loss.add
    num_steps, num_added = iter(range(10**6)), iter(range(10**6))

    def factor(index: int) -> float:
        return value if index in micro_batches else 1.0

    module.training_step = lambda *args: training_step(*args) * factor(next(num_steps))
    module.step_loss.add = lambda loss_sum, *rest: add(loss_sum * factor(next(num_added)), *rest)


class Record(pl.Callback):
    """Adapter and optimizer after each micro-batch, and the metrics."""

    def __init__(self) -> None:
        self.states: list[str] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
        torch.set_printoptions(precision=12, threshold=10**6)
        self.states.append(str((weights, trainer.optimizers[0].state_dict()["state"])))
        torch.set_printoptions(profile="default")
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(module: pl.LightningModule, root: Path, batch_size: int = 1, **settings: Any) -> Record:
    record = Record()
    make_trainer(root, callbacks=[record], **settings).fit(module, make_loader(ROWS, batch_size))
    return record


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_loss_stops_the_run_and_names_the_rows(make_module, tmp_path: Path, value: float) -> None:
    module = make_module()
    multiply_losses(module, {4}, value)
    with pytest.raises(UserError, match=rf"step 1: the loss .* rows {source(4)}\. "):
        fit(module, tmp_path, accumulate_grad_batches=3)


def test_nonfinite_gradient_names_all_rows_of_the_step(make_module, tmp_path: Path) -> None:
    module = make_module()
    module.configure_model()
    parameter = next(p for p in module.parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(UserError, match=rf"step 0: the gradient .* rows {source(0)}, {source(1)}\. "):
        fit(module, tmp_path, accumulate_grad_batches=2)


def test_skipped_step_changes_neither_adapter_nor_optimizer_and_is_counted(
    make_module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = make_module(on_nonfinite="skip")
    multiply_losses(module, {3})
    record = fit(module, tmp_path, batch_size=2, gradient_clip_val=1.0)
    changes = [before != after for before, after in zip(record.states, record.states[1:], strict=False)]
    assert changes == [True, True, False, True, True, True, True]
    assert [metrics["train/skipped_steps"] for metrics in record.metrics] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert [m for m in caplog.messages if m.startswith("step 3: the loss") and f"{source(6)}, {source(7)};" in m]


def test_many_skipped_steps_in_a_row_stop_the_run(make_module, tmp_path: Path) -> None:
    module = make_module(on_nonfinite="skip")
    multiply_losses(module, {0, 1, *range(3, 16)})
    with pytest.raises(UserError, match=rf"step 12: .* rows {source(12)}, .*{MAX_SKIPPED_IN_A_ROW}"):
        fit(module, tmp_path)


def test_unknown_on_nonfinite_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.on_nonfinite.*error, skip.*ignore"):
        NonfiniteGuard("ignore")  # type: ignore[arg-type]


def test_counts_survive_a_resume() -> None:
    guard, resumed = NonfiniteGuard("skip"), NonfiniteGuard("skip")
    guard.num_skipped, guard.num_skipped_in_a_row = 5, 2
    resumed.load_state_dict(guard.state_dict())
    assert (resumed.num_skipped, resumed.num_skipped_in_a_row) == (5, 2)


@pytest.mark.parametrize("on_nonfinite", ["error", "skip"])
def test_rows_of_another_rank_are_named(
    monkeypatch: pytest.MonkeyPatch, on_nonfinite: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def all_gather_object(gathered: list[Any], own: Any) -> None:
        gathered[:] = [own, [(math.nan, ["other:2"]), (1.0, ["other:3"])]]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    trainer: Any = SimpleNamespace(world_size=2, is_global_zero=True, global_step=5)
    guard = NonfiniteGuard(on_nonfinite)
    micro_batches = [MicroBatch(torch.tensor(1.0), 3, ["own:1"])]
    loss = math.nan  # of both ranks
    if on_nonfinite == "error":
        with pytest.raises(UserError, match=r"step 5: the loss .* rows other:2\. "):
            guard.accepts_step(trainer, micro_batches, loss, loss, is_scaled=False)
    else:
        assert not guard.accepts_step(trainer, micro_batches, loss, loss, is_scaled=False)
        assert [m for m in caplog.messages if m.startswith("step 5: the loss") and "rows other:2;" in m]


def test_float16_gradients_are_unscaled_before_their_norm_is_taken_and_clipped(make_module, tmp_path: Path) -> None:
    norms = []
    for dtype in ("float32", "float16"):
        module = make_module(dtype=dtype)
        record = fit(module, tmp_path, batch_size=4, accumulate_grad_batches=2, gradient_clip_val=0.5)
        assert (type(module.trainer.precision_plugin) is float16.ScaledFloat16) == (dtype == "float16")
        norms.append([record.metrics[index]["train/gradient_norm"] for index in (1, 3)])
    assert norms[1] == pytest.approx(norms[0], rel=5e-2)


def test_float16_loss_is_scaled_before_the_backward_pass(make_module, tmp_path: Path) -> None:
    module = make_module(dtype="float16")
    scaled: list[float] = []
    module.on_before_backward = lambda loss: scaled.append(float(loss.detach()))
    training_step = module.training_step
    losses: list[float] = []

    def recorded_step(batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        loss = training_step(batch, batch_idx)
        losses.append(float(loss.detach()))
        return loss

    module.training_step = recorded_step
    fit(module, tmp_path, max_steps=1)
    scale = module.trainer.precision_plugin.scaler.get_scale()
    assert scale == 64.0
    assert scaled == [pytest.approx(losses[0] * scale)]


def test_float16_scale_that_is_too_large_falls_and_its_steps_are_skipped(
    make_module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float16, "_INITIAL_SCALE", 2.0**20)
    module = make_module(dtype="float16")
    record = fit(module, tmp_path, batch_size=2, max_epochs=3)
    skipped = [metrics["train/skipped_steps"] for metrics in record.metrics]
    assert skipped[0] == 1
    assert skipped[-1] < MAX_SKIPPED_IN_A_ROW
    assert record.states[0] != record.states[-1]
    scale = module.trainer.precision_plugin.scaler.get_scale()
    assert scale == 2.0 ** (20 - skipped[-1])


def test_nonfinite_loss_in_float16_is_not_taken_for_an_overflow_of_the_scale(make_module, tmp_path: Path) -> None:
    module = make_module(dtype="float16")
    multiply_losses(module, {1})
    with pytest.raises(UserError, match=rf"step 1: the loss .* rows {source(1)}\. "):
        fit(module, tmp_path)


def test_spike_detection_of_lightning_still_cannot_resume() -> None:
    # Once this fails, the docstring of nonfinite.py no longer needs its warning.
    with pytest.raises(AttributeError, match="running"):
        SpikeDetection().load_state_dict(SpikeDetection().state_dict())
