from __future__ import annotations

import itertools

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from tests.data.conftest import games_of_steps
from tests.data.lightning_runs import Recorder, SaveIn, fit

# 37 training rows in batches of 8: 5 batches per epoch, the last with 5 rows.
SETTINGS = {"batch_size": 8, "val_fraction": 0.1}


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end", "on_train_epoch_end"])
@pytest.mark.parametrize(
    ("limit", "num_workers"),
    [({"max_epochs": 3}, 0), ({"max_steps": 9, "max_epochs": -1}, 0), ({"max_epochs": 3}, 2)],
    ids=["epochs", "steps", "epochs-workers"],
)
def test_resume_restores_the_data_position(make, rows_path, tmp_path, hook, limit, num_workers):
    settings = {**limit, "accumulate_grad_batches": 2, "val_check_interval": 2}
    save = SaveIn(tmp_path, hook)
    uninterrupted = fit(make(rows_path, **SETTINGS), callbacks=[save], **settings).seen
    assert len(uninterrupted) == 15
    assert len({str(sorted(itertools.chain(*uninterrupted[i : i + 5]))) for i in (0, 5, 10)}) == 1
    assert len({str(uninterrupted[i : i + 5]) for i in (0, 5, 10)}) == 3
    stops = dict(list(save.paths.items())[:: 5 if num_workers else 1])
    assert stops
    for num_seen, ckpt_path in stops.items():
        resumed = fit(make(rows_path, **SETTINGS, num_workers=num_workers), ckpt_path, **settings)
        assert resumed.seen == uninterrupted[num_seen:], num_seen


# In the first and the second epoch of 5 steps: at the begin, before the end, at the end.
@pytest.mark.parametrize("num_steps", [1, 4, 5, 6, 9, 10])
def test_resume_after_max_steps_continues_with_the_next_batch(make, rows_path, tmp_path, num_steps):
    uninterrupted = fit(make(rows_path, **SETTINGS), max_steps=15, max_epochs=-1).seen
    save = SaveIn(tmp_path, "on_train_end")
    first = fit(make(rows_path, **SETTINGS), max_steps=num_steps, max_epochs=-1, callbacks=[save]).seen
    second = fit(make(rows_path, **SETTINGS), save.paths[num_steps], max_steps=15, max_epochs=-1).seen
    assert first + second == uninterrupted


def test_resume_after_an_exception_repeats_the_failed_step(make, rows_path, tmp_path):
    class Fails(Callback):
        def on_train_batch_start(self, trainer: lightning.Trainer, module: Recorder, *_: object) -> None:
            if len(module.seen) == 3:
                trainer.save_checkpoint(tmp_path / "failed.ckpt")
                raise ZeroDivisionError

    uninterrupted = fit(make(rows_path, **SETTINGS), max_epochs=2).seen
    with pytest.raises(ZeroDivisionError):
        fit(make(rows_path, **SETTINGS), max_epochs=2, callbacks=[Fails()])
    assert fit(make(rows_path, **SETTINGS), tmp_path / "failed.ckpt", max_epochs=2).seen == uninterrupted[3:]


def test_resume_restores_the_position_with_limited_batches(make, rows_path, tmp_path):
    settings = {"max_epochs": 3, "limit_train_batches": 2}
    save = SaveIn(tmp_path, "on_train_batch_end")
    uninterrupted = fit(make(rows_path, **SETTINGS), callbacks=[save], **settings).seen
    unlimited = fit(make(rows_path, **SETTINGS), max_epochs=3).seen
    assert uninterrupted == [*unlimited[0:2], *unlimited[5:7], *unlimited[10:12]]
    assert fit(make(rows_path, **SETTINGS), save.paths[3], **settings).seen == uninterrupted[3:]


def test_resume_with_another_order_logs_a_warning(make, rows_path, write_rows, tmp_path, caplog):
    save = SaveIn(tmp_path, "on_train_batch_end")
    fit(make(rows_path, **SETTINGS), max_epochs=1, callbacks=[save])
    fit(make(rows_path, **SETTINGS), save.paths[2], max_epochs=1)
    assert "global_batch_size" not in caplog.text
    fit(make(rows_path, **SETTINGS | {"batch_size": 4}), save.paths[2], max_epochs=1)
    assert "global_batch_size was 8, is 4" in caplog.text


def test_state_in_a_checkpoint_is_plain_data(make, rows_path, tmp_path):
    save = SaveIn(tmp_path, "on_train_batch_end")
    fit(make(rows_path, **SETTINGS), max_epochs=1, callbacks=[save])
    state = torch.load(save.paths[2], weights_only=True)["SnakeJSONLDataModule"]
    assert set(state) == {"split_hash", "seed", "template_date", "global_batch_size", "batch_size", "group_by_length"}


@pytest.mark.parametrize("settings", [{"balance": "length"}, {"weights": True}, {"group_by_length": False}])
def test_resume_restores_the_position_in_weighted_and_ungrouped_orders(make, write_rows, tmp_path, settings):
    rows = games_of_steps(6, 5, 7, 6, 5, 6, 6)
    if settings.pop("weights", False):
        rows = [row | {"weight": 1 + i % 3} for i, row in enumerate(rows)]
        settings = {}
    path = write_rows(rows)
    save = SaveIn(tmp_path, "on_train_batch_end")
    uninterrupted = fit(make(path, **SETTINGS, **settings), callbacks=[save], max_epochs=3).seen
    assert len({str(uninterrupted[i : i + 5]) for i in (0, 5, 10)}) == 3
    for num_seen, ckpt_path in save.paths.items():
        assert fit(make(path, **SETTINGS, **settings), ckpt_path, max_epochs=3).seen == uninterrupted[num_seen:]


def test_resume_with_another_balance_logs_a_warning(make, rows_path, tmp_path, caplog):
    save = SaveIn(tmp_path, "on_train_batch_end")
    fit(make(rows_path, **SETTINGS), max_epochs=1, callbacks=[save])
    fit(make(rows_path, **SETTINGS, balance="length"), save.paths[2], max_epochs=1)
    assert "balance was None, is 'length'" in caplog.text
