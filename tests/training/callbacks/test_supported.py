"""Callbacks of Lightning that would silently change what a run trains, exports or resumes are refused."""

from __future__ import annotations

import pytest
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging

from snake_lora_pl.errors import UserError
from snake_lora_pl.training.callbacks.supported import check_supported


class OwnAveraging(EMAWeightAveraging):
    """A subclass, as users write it."""


@pytest.mark.parametrize(
    "callback",
    [
        lightning_callbacks.WeightAveraging(),
        EMAWeightAveraging(),
        OwnAveraging(),
        lightning_callbacks.StochasticWeightAveraging(swa_lrs=0.001),
        lightning_callbacks.GradientAccumulationScheduler({1: 2}),
        lightning_callbacks.BatchSizeFinder(),
        lightning_callbacks.LearningRateFinder(),
        lightning_callbacks.ModelPruning("l1_unstructured"),
        lightning_callbacks.BackboneFinetuning(),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_unsupported_callback_is_refused_by_its_name(callback: Callback) -> None:
    with pytest.raises(UserError, match=rf"trainer\.callbacks: {type(callback).__name__} "):
        check_supported([Callback(), callback])


def test_other_callbacks_are_accepted() -> None:
    check_supported(
        [
            Callback(),
            lightning_callbacks.ModelCheckpoint(),
            lightning_callbacks.LearningRateMonitor(),
            lightning_callbacks.DeviceStatsMonitor(),
            lightning_callbacks.Timer("00:00:01:00"),
        ]
    )
