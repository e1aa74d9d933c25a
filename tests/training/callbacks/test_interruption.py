from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from snake_lora_pl.training.callbacks.adapter_checkpoint import AdapterCheckpoint
from snake_lora_pl.training.callbacks.interruption import Interrupted, Interruption, stop_immediately
from tests.training.conftest import make_loader, make_rows, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore")


class RaiseSignal(pl.Callback):
    """Sends a signal to this process after a number of micro-batches."""

    def __init__(self, signum: signal.Signals, after_batches: int) -> None:
        self._signum = signum
        self._after_batches = after_batches

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 == self._after_batches:
            signal.raise_signal(self._signum)


def test_signal_outside_training_raises_immediately() -> None:
    with pytest.raises(Interrupted) as caught:
        stop_immediately(signal.SIGTERM, None)
    assert (caught.value.signum, caught.value.checkpoint_path) == (signal.SIGTERM, None)
    assert "SIGTERM" in str(caught.value)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_within_an_accumulated_step_stops_after_the_step_with_a_checkpoint(
    make_module, tmp_path: Path, signum: signal.Signals
) -> None:
    checkpoint = AdapterCheckpoint(str(tmp_path / "run" / "checkpoints"), monitor=None)
    trainer = make_trainer(
        tmp_path,
        enable_checkpointing=True,
        accumulate_grad_batches=2,
        callbacks=[Interruption(), RaiseSignal(signum, after_batches=3), checkpoint],
    )
    with pytest.raises(Interrupted) as caught:
        trainer.fit(make_module(), make_loader(make_rows(12), 2))
    assert caught.value.signum == signum
    assert "after step 2" in str(caught.value)
    assert caught.value.checkpoint_path == tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(caught.value.checkpoint_path, weights_only=True)["global_step"] == 2
