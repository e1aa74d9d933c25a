"""Callback that ends a run on Ctrl-C or SIGTERM: between two optimizer steps, with a checkpoint to resume from."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from snake_lora_pl.training.callbacks.adapter_checkpoint import find_adapter_checkpoint
from snake_lora_pl.training.callbacks.progress_bar import RunProgressBar
from snake_lora_pl.training.launcher_watch import LauncherWatch
from snake_lora_pl.training.lightning_internals import (
    cluster_environment,
    disable_sigterm_broadcast,
    kill_launched_ranks,
)
from snake_lora_pl.training.resume.checkpoint_state import is_between_steps

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from snake_lora_pl.training.module import LoRALightningModule

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Set by torchrun, which forwards signals that the terminal has already sent to every process.
_TORCHRUN_ENV = "TORCHELASTIC_RUN_ID"


class Interrupted(BaseException):
    """A command was stopped by a signal.

    It is not an ``Exception``, like ``KeyboardInterrupt``, so that libraries do not handle it as an error.

    Args:
        signum: Signal number.
        step: Optimizer steps done, or None outside training.
        checkpoint_path: Checkpoint to resume from, or None if none was written.
    """

    def __init__(self, signum: int, step: int | None = None, checkpoint_path: Path | None = None) -> None:
        after = "" if step is None else f" after step {step}"
        super().__init__(f"stopped by {signal.Signals(signum).name}{after}")
        self.signum = signum
        self.checkpoint_path = checkpoint_path


def stop_immediately(signum: int, frame: FrameType | None) -> None:
    """Handle a signal outside training, where there is nothing to save.

    Raises:
        Interrupted: Always.
    """
    _restore_default_ctrl_c(signum)
    raise Interrupted(signum)


def _restore_default_ctrl_c(signum: int) -> None:
    """Let the system handle the next Ctrl-C, so that it ends the process in any state."""
    if signum == signal.SIGINT and _TORCHRUN_ENV not in os.environ:
        signal.signal(signum, signal.SIG_DFL)


class Interruption(Callback):
    """Ends a run on SIGTERM or Ctrl-C: finishes the step, writes a checkpoint, and raises ``Interrupted``.

    All ranks stop after the same step, whichever rank received the signal: the ranks exchange it with the loss of a
    step. A validation is cut short if there is a checkpoint of the step before it and only one rank. A second Ctrl-C
    ends the process immediately. The signal that announces the requeueing of a SLURM job has the same effect as
    SIGTERM, and requeues the job.

    Lightning installs signal handlers at the start of each stage and removes them at its end. Its SIGTERM handler would
    end an epoch within an accumulated step, and starts a collective inside the handler if there are several ranks. The
    handlers of this class therefore replace Lightning's at the start of each stage.

    Raises:
        Interrupted: After the checkpoint is written.
    """

    def __init__(self) -> None:
        self._signum = 0
        self._pid = 0
        self._can_stop_immediately = False
        self._requeue: tuple[int, Callable[..., Any]] | None = None
        self._launcher_watch = LauncherWatch()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            self._launcher_watch.start()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._launcher_watch.stop()

    @override
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._install_handlers(trainer, can_stop_immediately=True)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        environment = cluster_environment(trainer)
        disable_sigterm_broadcast(trainer)
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
            lightning_handler = signal.getsignal(environment.requeue_signal)
            if callable(lightning_handler):
                self._requeue = (environment.requeue_signal, lightning_handler)
        self._install_handlers(trainer)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._install_handlers(trainer, can_stop_immediately=True)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._install_handlers(trainer, can_stop_immediately=True)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._install_handlers(trainer, can_stop_immediately=True)

    def _install_handlers(self, trainer: pl.Trainer, *, can_stop_immediately: bool = False) -> None:
        self._pid = os.getpid()
        self._can_stop_immediately = can_stop_immediately
        if can_stop_immediately and self._signum:  # received between two stages
            raise _interrupted(trainer, self._signum)
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows handlers in the main thread only

        def handle(signum: int, frame: FrameType | None) -> None:
            self._on_signal(trainer, signum)

        for signum in (*_STOP_SIGNALS, *([self._requeue[0]] if self._requeue else [])):
            signal.signal(signum, handle)

    def _on_signal(self, trainer: pl.Trainer, signum: int) -> None:
        if os.getpid() != self._pid:
            return  # a worker of a data loader: it ends with this process, which may still need its batches
        _restore_default_ctrl_c(signum)
        is_first = not self._signum
        self._signum = self._signum or signum
        if self._can_stop_immediately:
            raise _interrupted(trainer, signum)
        if is_first and trainer.is_global_zero:
            hint = " Press Ctrl-C again to stop immediately." if signum == signal.SIGINT else ""
            text = f"{signal.Signals(signum).name}: finishing the step.{hint}"
            progress_bar = trainer.progress_bar_callback
            if not isinstance(progress_bar, RunProgressBar) or not progress_bar.note(text):
                os.write(2, f"\n{text}\n".encode())  # not `print`, which the signal may have interrupted

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Tell the other ranks of a signal; the module exchanges it with the sums of the step."""
        cast("LoRALightningModule", pl_module).step_exchange.own_signum = self._signum

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write a checkpoint and stop, if any rank received a signal and no step is in progress."""
        if not is_between_steps(trainer):
            return
        if trainer.world_size > 1:
            signum = cast("LoRALightningModule", pl_module).step_exchange.signum
        else:
            signum = self._signum
        if not signum:
            return
        self._signum = signum
        checkpoint = find_adapter_checkpoint(trainer)
        if checkpoint is not None:
            with checkpoint.between_steps():
                checkpoint.write_last(trainer)
                if self._requeue is not None and self._signum == self._requeue[0]:
                    self._requeue[1](self._signum, None)
        raise _interrupted(trainer, self._signum)

    @override
    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop a validation within ``fit`` if a checkpoint was written before it."""
        if trainer.state.fn == "fit" and trainer.world_size == 1 and not trainer.sanity_checking:
            checkpoint = find_adapter_checkpoint(trainer)
            self._can_stop_immediately = checkpoint is not None and checkpoint.has_saved(trainer)
            if self._can_stop_immediately and self._signum:
                raise _interrupted(trainer, self._signum)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do not interrupt the writing of checkpoint and adapter."""
        if trainer.state.fn == "fit":
            self._can_stop_immediately = False

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop before the games that follow the training."""
        if self._any_rank_interrupted(trainer):
            raise _interrupted(trainer, self._signum)

    def _any_rank_interrupted(self, trainer: pl.Trainer) -> bool:
        """Return whether any rank received a signal. A collective: every rank must call it."""
        if trainer.world_size > 1:
            signum = torch.tensor(self._signum, device=trainer.strategy.root_device)
            self._signum = int(trainer.strategy.reduce(signum, reduce_op="max"))
        return bool(self._signum)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Kill the ranks that this process launched, which may wait in a collective."""
        kill_launched_ranks(trainer)


def _interrupted(trainer: pl.Trainer, signum: int) -> Interrupted:
    checkpoint = find_adapter_checkpoint(trainer)
    path = checkpoint.last_model_path if checkpoint is not None else ""
    is_training = trainer.state.fn == "fit" and not trainer.sanity_checking
    return Interrupted(signum, trainer.global_step if is_training else None, Path(path) if path else None)
