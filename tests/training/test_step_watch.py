from __future__ import annotations

import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from snake_lora_pl.errors import UserError
from snake_lora_pl.training import float16
from snake_lora_pl.training.step_watch import MAX_SKIPPED_IN_A_ROW, StepWatch
from tests.training.conftest import make_loader, make_rows, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")

ROWS = make_rows(16)


def named(index: int) -> str:
    return f"rows.jsonl:{len(ROWS[index][0])}"


def spoil(module: Any, steps: set[int], value: float = math.nan) -> None:
    """Multiply the loss of some micro-batches, and with it their gradient, by a value."""
    plain, count = module.training_step, iter(range(10**6))
    module.training_step = lambda batch, batch_idx: plain(batch, batch_idx) * (value if next(count) in steps else 1.0)
    watch_add = module.watch.add
    current: list[float] = []

    def add(loss: torch.Tensor, *rest: Any) -> None:
        current.append(value if len(current) in steps else 1.0)
        watch_add(loss * current[-1], *rest)

    module.watch.add = add


class Record(pl.Callback):
    """What each step left: adapter and optimizer."""

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
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(make_module, tmp_path: Path, value: float) -> None:
    module = make_module()
    spoil(module, {4}, value)
    with pytest.raises(UserError, match=f"step 1: the loss is not finite in a batch of the rows {named(4)}\\. "):
        fit(module, tmp_path, accumulate_grad_batches=3)


def test_a_gradient_that_is_not_finite_names_all_rows_of_the_step(make_module, tmp_path: Path) -> None:
    module = make_module()
    module.configure_model()
    parameter = next(p for p in module.parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(
        UserError, match=f"the gradient is not finite in a batch of the rows {named(0)}, {named(1)}\\. "
    ):
        fit(module, tmp_path, accumulate_grad_batches=2)


def test_a_skipped_step_leaves_adapter_and_optimiser_untouched_and_is_counted(
    make_module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = make_module(on_nonfinite="skip")
    spoil(module, {3})
    record = fit(module, tmp_path, batch_size=2, gradient_clip_val=1.0)
    changes = [before != after for before, after in zip(record.states, record.states[1:], strict=False)]
    assert changes == [True, True, False, True, True, True, True]
    assert [metrics["train/skipped_steps"] for metrics in record.metrics] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert f"step 3: skipped, the loss is not finite; rows {named(6)}, {named(7)}" in caplog.messages


def test_many_skipped_steps_in_a_row_stop_the_run(make_module, tmp_path: Path) -> None:
    module = make_module(on_nonfinite="skip")
    spoil(module, {0, 1, *range(3, 16)})
    with pytest.raises(UserError, match=f"step 12: {MAX_SKIPPED_IN_A_ROW} steps in a row .* rows {named(12)}\\. "):
        fit(module, tmp_path)


def test_what_becomes_of_such_steps_is_error_or_skip() -> None:
    with pytest.raises(UserError, match="on_nonfinite must be one of error, skip, not 'ignore'"):
        StepWatch("ignore")  # type: ignore[arg-type]


# ---------------------------------------------------------------------- spikes


def judged(losses: list[float]) -> StepWatch:
    watch = StepWatch()
    trainer: Any = SimpleNamespace(world_size=1, is_global_zero=True, global_step=0)
    for step, loss in enumerate(losses):
        trainer.global_step = step
        watch.clear()
        for share, name in ((0.5, "good"), (1.5, "bad")):
            watch.add(torch.tensor(10 * share * loss), torch.tensor(10), [f"{name}:{step}"])
        assert watch.judge(trainer, torch.tensor(loss), torch.tensor(1.0), is_scaled=False)
    return watch


def falling(num_steps: int) -> list[float]:
    noise = random.Random(0)
    return [3 * math.exp(-step / 100) * noise.uniform(0.8, 1.2) for step in range(num_steps)]


def test_a_leap_of_the_loss_is_logged_with_the_rows_of_its_worst_batch(caplog: pytest.LogCaptureFixture) -> None:
    watch = judged([*falling(60), 9.0])
    assert watch.num_spikes == 1
    (message,) = caplog.messages
    assert message.startswith("step 60: the loss leapt to 9 from a running mean of ")
    assert message.endswith("worst are the rows bad:60 (13.5)")


def test_noise_and_the_first_steps_are_no_leap() -> None:
    assert judged(falling(1000)).num_spikes == 0
    assert judged([1.0, 9.0, 1.0, 9.0]).num_spikes == 0
    assert judged([*[1e-3] * 100, 1.05e-3]).num_spikes == 0


def test_a_loss_that_stays_high_soon_is_no_leap_any_more() -> None:
    watch = judged([*falling(60), *[9.0] * 200])
    assert 1 < watch.num_spikes < 60


def test_averages_are_those_of_the_obvious_way_and_survive_a_restart() -> None:
    losses = falling(40)
    watch, resumed = judged(losses), StepWatch()
    resumed.load_state_dict(watch.state_dict())
    assert resumed.state_dict() == watch.state_dict()
    mean = sum(losses) / len(losses)
    assert watch.state_dict()["mean"] == pytest.approx(mean)
    assert watch.state_dict()["variance"] == pytest.approx(sum((loss - mean) ** 2 for loss in losses) / len(losses))


# ---------------------------------------------------------------------- several processes


@pytest.mark.parametrize("on_nonfinite", ["error", "skip"])
def test_rows_of_another_process_are_named(
    monkeypatch: pytest.MonkeyPatch, on_nonfinite: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def all_gather_object(gathered: list[Any], own: Any) -> None:
        gathered[:] = [own, [(math.nan, 3, ["theirs:2"]), (1.0, 3, ["theirs:3"])]]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    trainer: Any = SimpleNamespace(world_size=2, is_global_zero=True, global_step=5)
    watch = StepWatch(on_nonfinite)
    watch.add(torch.tensor(1.0), torch.tensor(3), ["ours:1"])
    loss = torch.tensor(math.nan)  # reduced over both
    if on_nonfinite == "error":
        with pytest.raises(UserError, match="rows theirs:2\\. "):
            watch.judge(trainer, loss, loss, is_scaled=False)
    else:
        assert not watch.judge(trainer, loss, loss, is_scaled=False)
        assert "step 5: skipped, the loss is not finite; rows theirs:2" in caplog.messages


# ---------------------------------------------------------------------- float16


def test_float16_gradients_are_unscaled_before_their_norm_is_taken_and_clipped(make_module, tmp_path: Path) -> None:
    norms = []
    for dtype in ("float32", "float16"):
        module = make_module(dtype=dtype)
        record = fit(module, tmp_path, batch_size=4, accumulate_grad_batches=2, gradient_clip_val=0.5)
        assert (type(module.trainer.precision_plugin) is float16.ScaledFloat16) == (dtype == "float16")
        norms.append([record.metrics[index]["train/gradient_norm"] for index in (1, 3)])
    assert norms[1] == pytest.approx(norms[0], rel=5e-2)


def test_the_scale_of_float16_keeps_small_gradients_that_would_vanish(make_module, tmp_path: Path) -> None:
    module = make_module(dtype="float16")
    seen: list[float] = []
    module.on_before_backward = lambda loss: seen.append(float(loss))
    plain = module.training_step
    losses: list[float] = []

    def training_step(batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        loss = plain(batch, batch_idx)
        losses.append(float(loss.detach()))
        return loss

    module.training_step = training_step
    fit(module, tmp_path, max_steps=1)
    scale = module.trainer.precision_plugin.scaler.get_scale()
    assert scale == 64.0
    assert seen == [pytest.approx(losses[0] * scale)]


def test_a_scale_that_is_too_large_falls_and_its_steps_are_left_out(
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


def test_a_loss_that_is_not_finite_in_float16_is_no_matter_of_scale(make_module, tmp_path: Path) -> None:
    module = make_module(dtype="float16")
    spoil(module, {1})
    with pytest.raises(UserError, match=f"step 1: the loss is not finite in a batch of the rows {named(1)}"):
        fit(module, tmp_path)
