"""A run that is asked to end, by Ctrl-C or a scheduler, ends between two steps and leaves what it needs to go on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from snake_lora_pl.training.callbacks.adapter_checkpoint import AdapterCheckpoint
from snake_lora_pl.training.callbacks.progress_bar import RunProgress
from snake_lora_pl.training.resume.checkpoint_state import is_between_steps

if TYPE_CHECKING:
    import lightning.pytorch as pl

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# torchrun sets it, and passes on a signal that the terminal has sent to every process already.
_TORCHRUN_ENV = "TORCHELASTIC_RUN_ID"


class Interrupted(BaseException):
    """A signal asked a command to end, and it has.

    Like ``KeyboardInterrupt`` it is no ``Exception``, so that no library takes it for a failure of its own.

    Args:
        signum: The signal.
        step: Optimizer steps done, or None outside of training.
        checkpoint_path: Where the run goes on from, or None where nothing was saved.
    """

    def __init__(self, signum: int, step: int | None = None, checkpoint_path: Path | None = None) -> None:
        after = "" if step is None else f" after step {step}"
        super().__init__(f"stopped by {signal.Signals(signum).name}{after}")
        self.signum = signum
        self.checkpoint_path = checkpoint_path


def leave_at_once(signum: int, frame: FrameType | None) -> None:
    """A signal handler for work that can be begun again.

    Raises:
        Interrupted: Always.
    """
    _let_ctrl_c_kill(signum)
    raise Interrupted(signum)


def _let_ctrl_c_kill(signum: int) -> None:
    """From the second Ctrl-C on, let the system end the process, whatever it is busy with."""
    if signum == signal.SIGINT and _TORCHRUN_ENV not in os.environ:
        signal.signal(signum, signal.SIG_DFL)


class Interruption(Callback):
    """Ends a run on SIGTERM or Ctrl-C: it finishes the step, lets ``AdapterCheckpoint`` save, and raises.

    All processes of a run stop after the same step, whichever of them was asked. A validation is not waited for where
    the state before it was saved and the process is the run's only one. A second Ctrl-C ends the process at once. The
    signal by which SLURM announces that it will requeue a job does the same as SIGTERM, and requeues.

    Raises:
        Interrupted: Once the checkpoint is written; it says how to go on.
    """

    def __init__(self) -> None:
        self._signum = 0
        self._pid = 0
        self._can_leave_at_once = False
        self._requeue: tuple[int, Callable[..., Any]] | None = None
        self._trainer: pl.Trainer | None = None

    # Lightning installs handlers of its own at the beginning of each stage and takes back all of them at its end. Its
    # one for SIGTERM ends an epoch in the middle of an accumulated step and, among several processes, starts a
    # collective from inside the handler.

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing is done yet."""
        self._listen(trainer, can_leave_at_once=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on there is a step to finish."""
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
            lightnings = signal.getsignal(environment.requeue_signal)
            if callable(lightnings):
                self._requeue = (environment.requeue_signal, lightnings)
        self._listen(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluation by itself can be left at once."""
        if trainer.state.fn != "fit":
            self._listen(trainer, can_leave_at_once=True)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Games can be left at once."""
        self._listen(trainer, can_leave_at_once=True)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Completions can be left at once."""
        self._listen(trainer, can_leave_at_once=True)

    def _listen(self, trainer: pl.Trainer, *, can_leave_at_once: bool = False) -> None:
        self._trainer, self._pid = trainer, os.getpid()
        self._can_leave_at_once = can_leave_at_once
        if can_leave_at_once and self._signum:  # asked in between two stages
            raise self._interrupted(self._signum)
        if threading.current_thread() is not threading.main_thread():
            return  # signals are the main thread's, and so are their handlers
        for signum in (*_STOP_SIGNALS, *([self._requeue[0]] if self._requeue else [])):
            signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a worker of a data loader: it ends with this process, which may still need it
        _let_ctrl_c_kill(signum)
        is_first = not self._signum
        self._signum = self._signum or signum
        if self._can_leave_at_once:
            raise self._interrupted(signum)
        if is_first and self._trainer is not None and self._trainer.is_global_zero:
            again = " Ctrl-C again stops at once." if signum == signal.SIGINT else ""
            text = f"{signal.Signals(signum).name}: finishing the step.{again}"
            progress = self._trainer.progress_bar_callback
            if not isinstance(progress, RunProgress) or not progress.note(text):
                os.write(2, f"\n{text}\n".encode())  # not by `print`: the signal may have come in the middle of one

    # ------------------------------------------------------------------ where a run can stop

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Between two steps, stop if any process was asked to."""
        if not is_between_steps(trainer) or not self._agree(trainer):
            return
        checkpoint = _checkpoint_callback(trainer)
        if checkpoint is not None:
            with checkpoint.between_steps():
                checkpoint.write_last(trainer)
                if self._requeue is not None and self._signum == self._requeue[0]:
                    self._requeue[1](self._signum, None)
        raise self._interrupted(self._signum)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """What was saved before a validation is enough to go on from."""
        if trainer.state.fn == "fit" and trainer.world_size == 1 and not trainer.sanity_checking:
            checkpoint = _checkpoint_callback(trainer)
            self._can_leave_at_once = checkpoint is not None and checkpoint.has_saved(trainer)
            if self._can_leave_at_once and self._signum:
                raise self._interrupted(self._signum)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let what is now written be written whole."""
        if trainer.state.fn == "fit":
            self._can_leave_at_once = False

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training was over before a step came to stop at, and all is written; leave out what would come next."""
        if self._agree(trainer):
            raise self._interrupted(self._signum)

    def _agree(self, trainer: pl.Trainer) -> bool:
        """Whether any process was asked to stop; all must call it."""
        if trainer.world_size > 1:
            asked = torch.tensor(self._signum, device=trainer.strategy.root_device)
            self._signum = int(trainer.strategy.reduce(asked, reduce_op="max"))
        return bool(self._signum)

    def _interrupted(self, signum: int) -> Interrupted:
        assert self._trainer is not None
        checkpoint = _checkpoint_callback(self._trainer)
        path = checkpoint.last_model_path if checkpoint is not None else ""
        is_training = self._trainer.state.fn == "fit" and not self._trainer.sanity_checking
        step = self._trainer.global_step if is_training else None
        return Interrupted(signum, step, Path(path) if path else None)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """End the processes that this one has launched, whatever they wait for.

        Lightning watches them and kills this process when one of them ends with an error, which may be before it has
        said what happened.
        """
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher) and launcher.procs:
            for thread in threading.enumerate():
                if isinstance(thread, _ChildProcessObserver):
                    thread._child_processes = []
            launcher.kill(signal.SIGKILL)


def _checkpoint_callback(trainer: pl.Trainer) -> AdapterCheckpoint | None:
    callbacks = trainer.checkpoint_callbacks
    return next((callback for callback in callbacks if isinstance(callback, AdapterCheckpoint)), None)
