from __future__ import annotations

from typing import Any

import pytest

from snake_lora_pl.errors import UserError
from snake_lora_pl.training.resume.checkpoint_state import adjust_loop_counters, explain_damaged_checkpoint


def make_fit_loop(completed_batches: int) -> dict[str, Any]:
    """Return loop counters as Lightning saves them when the next batch has already been loaded."""
    batch_counts = {"ready": completed_batches + 1, "started": completed_batches, "processed": completed_batches}
    epoch_counts = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    val_counts = {"ready": 2, "started": 2, "processed": 2, "completed": 2}
    return {
        "epoch_loop.batch_progress": {
            "total": batch_counts | {"completed": completed_batches},
            "current": batch_counts | {"completed": completed_batches},
            "is_last_batch": False,
        },
        "epoch_progress": {"total": dict(epoch_counts), "current": dict(epoch_counts)},
        "epoch_loop.val_loop.batch_progress": {"total": dict(val_counts), "current": dict(val_counts)},
    }


def test_batches_within_an_epoch_count_as_completed() -> None:
    fit_loop = make_fit_loop(3)
    adjust_loop_counters(fit_loop, 7, validation_is_due=False)
    assert set(fit_loop["epoch_loop.batch_progress"]["current"].values()) == {3}
    assert fit_loop["epoch_progress"]["current"]["completed"] == 0


def test_epoch_is_completed_after_its_last_batch() -> None:
    fit_loop = make_fit_loop(7)
    adjust_loop_counters(fit_loop, 7, validation_is_due=False)
    assert set(fit_loop["epoch_progress"]["current"].values()) == {1}
    assert set(fit_loop["epoch_loop.batch_progress"]["current"].values()) == {0}
    assert set(fit_loop["epoch_loop.batch_progress"]["total"].values()) == {7}


def test_epoch_is_not_completed_before_its_last_validation() -> None:
    fit_loop = make_fit_loop(7)
    adjust_loop_counters(fit_loop, 7, validation_is_due=True)
    assert fit_loop["epoch_progress"]["current"]["completed"] == 0
    assert fit_loop["epoch_loop.batch_progress"]["is_last_batch"]
    assert fit_loop["epoch_loop.val_loop.batch_progress"]["total"]["started"] == 1


def test_error_of_a_damaged_checkpoint_names_its_path_and_cause() -> None:
    with (
        pytest.raises(UserError, match=r"--ckpt_path a\.ckpt: .*KeyError.*betas"),
        explain_damaged_checkpoint("a.ckpt"),
    ):
        raise KeyError("betas")
    with pytest.raises(MemoryError), explain_damaged_checkpoint("a.ckpt"):
        raise MemoryError
