from __future__ import annotations

import itertools
import math
from datetime import timedelta

import pytest
import torch
from lightning.pytorch.callbacks import Timer
from torch.optim.lr_scheduler import LambdaLR

from snake_lora_pl.training.optimizer import (
    apply_changed_hyperparameters,
    elapsed_fraction,
    learning_rate_factor,
)


def factor(step: int, num_steps: float, elapsed: float = 0.0, *, warmup: int = 0, final: float = 0.0) -> float:
    return learning_rate_factor(
        step, num_steps=num_steps, elapsed_fraction=elapsed, warmup_steps=warmup, final_fraction=final
    )


def test_learning_rate_warms_up_then_falls_along_a_cosine() -> None:
    factors = [factor(step, 110, warmup=10, final=0.1) for step in range(111)]
    assert factors[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert factors[10] == 1.0
    assert factors[60] == pytest.approx(0.55)
    assert factors[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))


def test_warmup_takes_at_most_a_tenth_of_the_run() -> None:
    assert factor(2, 30, warmup=20) < factor(3, 30, warmup=20) == 1.0
    assert factor(19, math.inf, warmup=20) < factor(20, math.inf, warmup=20) == 1.0


def test_cosine_follows_the_time_limit_if_that_ends_first() -> None:
    assert factor(0, math.inf, 0.5) == pytest.approx(0.5)
    assert factor(75, 100, 0.5) == pytest.approx(0.5 * (1 + math.cos(0.75 * math.pi)))
    assert factor(10, 1000, 1.0) == pytest.approx(0.0)


@pytest.mark.parametrize(("elapsed_s", "expected"), [(0, 0.0), (15, 0.25), (60, 1.0), (90, 1.0)])
def test_elapsed_fraction_is_that_of_the_time_limit(
    elapsed_s: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer = Timer(timedelta(seconds=60))
    monkeypatch.setattr(timer, "time_elapsed", lambda stage=None: elapsed_s)
    assert elapsed_fraction(timer) == expected


def test_without_a_time_limit_no_fraction_has_elapsed() -> None:
    assert elapsed_fraction(None) == elapsed_fraction(Timer()) == 0.0


def test_changed_hyperparameters_apply_and_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    def adamw(learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
        return torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=learning_rate, weight_decay=weight_decay)

    restored = adamw(0.1, 0.0)
    schedule = LambdaLR(restored, lambda step: 0.5)
    apply_changed_hyperparameters(schedule, adamw(0.2, 0.3))
    (group,) = restored.param_groups
    assert (group["lr"], group["weight_decay"], schedule.base_lrs) == (0.1, 0.3, [0.2])
    assert sorted(message.split()[0] for message in caplog.messages) == ["model.learning_rate", "model.weight_decay"]
    caplog.clear()
    apply_changed_hyperparameters(schedule, adamw(0.2, 0.3))
    assert not caplog.messages
