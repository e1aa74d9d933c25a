"""Private names of Lightning, and of torch where Lightning makes them necessary.

No other module uses such a name; a test checks that. Each function or class here links the upstream source, gives the
reason why no public name suffices, and has a test that fails when the name is gone or no longer needed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from signal import SIGKILL
from typing import TYPE_CHECKING, Any

from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment


def is_accumulating(trainer: pl.Trainer) -> bool:
    """Return whether the current micro-batch ends without an optimizer step.

    The decision depends on the accumulation, the end of the epoch and the strategy; Lightning does not publish it.
    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/loops/fit_loop.py
    """
    return trainer.fit_loop._should_accumulate()


def set_logged_steps(trainer: pl.Trainer, num_steps: int) -> None:
    """Set the step that Lightning attaches to the metrics that it logs next.

    Lightning increments it after the validation that follows a step, so a checkpoint written in that validation holds
    a number that is one too small, and a resumed run would log every later step one too low.
    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/loops/training_epoch_loop.py
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = num_steps


def validates_by_time(trainer: pl.Trainer) -> bool:
    """Return whether ``trainer.val_check_interval`` is a time interval.

    The trainer parses the argument and keeps only the parsed value, under a private name.
    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/trainer/setup.py
    """
    return getattr(trainer, "_val_check_time_interval", None) is not None


def decide_time_limit(timer: Timer, is_reached: Callable[[], bool]) -> None:
    """Let a timer check its time limit only where ``is_reached``, which all ranks agree on, returns True.

    Lightning's timer broadcasts rank 0's decision after every micro-batch.
    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/callbacks/timer.py
    """
    check = timer._check_time_remaining

    def check_if_reached(trainer: pl.Trainer) -> None:
        if is_reached():
            check(trainer)

    timer._check_time_remaining = check_if_reached  # type: ignore[method-assign]


def disable_sigterm_broadcast(trainer: pl.Trainer) -> None:
    """Keep a trainer from asking rank 0 before every micro-batch whether Lightning's handler received SIGTERM.

    It is a broadcast for which the host waits. Where that handler is replaced, it never has.
    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/loops/training_epoch_loop.py
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def wrap_restoring(trainer: pl.Trainer, wrapper: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
    """Replace the two functions that restore a checkpoint into a run by ``wrapper`` of each.

    Lightning calls no hook around the restoring of optimizers, schedules and loops, so an error of a library there
    cannot be caught and explained elsewhere.
    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/trainer/connectors/checkpoint_connector.py
    """
    connector = trainer._checkpoint_connector
    for name in ("_restore_modules_and_callbacks", "restore_training_state"):
        setattr(connector, name, wrapper(getattr(connector, name)))


def cluster_environment(trainer: pl.Trainer) -> ClusterEnvironment:
    """Return the cluster environment that the trainer detected or was given, such as SLURM.

    Strategies for several processes publish it, the one for a single device does not.
    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/trainer/connectors/accelerator_connector.py
    """
    return trainer._accelerator_connector.cluster_environment


def forks_or_spawns(trainer: pl.Trainer) -> bool:
    """Return whether the trainer starts its other ranks by fork or spawn.

    The class of the launcher is the only thing that tells this of every strategy, and it is private.
    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/strategies/launchers/multiprocessing.py
    """
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def kill_launched_ranks(trainer: pl.Trainer) -> None:
    """Kill the ranks that this process launched by its own command line, and stop watching them.

    A thread of Lightning's kills this process as soon as a launched rank fails, possibly before this process has
    reported the error. Only emptying the list that the thread watches stops it.
    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/fabric/strategies/launchers/subprocess_script.py
    """
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher) and launcher.procs:
        for thread in threading.enumerate():
            if isinstance(thread, _ChildProcessObserver):
                thread._child_processes = []
        launcher.kill(SIGKILL)


def shard_data_over_all_ranks(strategy: ModelParallelStrategy) -> None:
    """Make every rank of a strategy a data-parallel rank; call it before ``setup_environment``.

    The constructor's ``data_parallel_size="auto"`` means one per node, and the number of ranks is not known yet when
    the constructor runs.
    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/strategies/model_parallel.py
    """
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes


def unscale_before_step(optimizers: Iterable[Optimizer]) -> None:
    """Make Lightning unscale float16 gradients before the step of fused optimizers too.

    PyTorch's fused optimizers can unscale while they step. Lightning then leaves the unscaling to them, which is too
    late for a gradient norm, and refuses to clip.
    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/fabric/plugins/precision/amp.py
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/amp/grad_scaler.py
    """
    for optimizer in optimizers:
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


class ModelCheckpointInternals(ModelCheckpoint):
    """``ModelCheckpoint`` whose steps a subclass may call and extend under public names.

    Lightning's hooks tie ``last.ckpt`` to the monitored metric. A subclass that writes it at other moments has to
    replace the hooks and needs the functions they call.
    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/callbacks/model_checkpoint.py
    """

    @property
    def last_saved_step(self) -> int:
        """Optimizer steps done when the newest checkpoint was written; 0 if there is none."""
        return self._last_global_step_saved

    @last_saved_step.setter
    def last_saved_step(self, num_steps: int) -> None:
        self._last_global_step_saved = num_steps

    @property
    def last_saved_path(self) -> str:
        """Path of the newest checkpoint; empty if there is none."""
        return self._last_checkpoint_saved

    def metric_candidates(self, trainer: pl.Trainer) -> dict[str, Tensor]:
        """Return the logged metrics, with ``epoch`` and ``step``, that decide over a checkpoint."""
        return self._monitor_candidates(trainer)

    def save_if_best(self, trainer: pl.Trainer, candidates: dict[str, Tensor]) -> None:
        """Write a checkpoint if it is among the ``save_top_k`` best, and delete the one that it replaces."""
        self._save_topk_checkpoint(trainer, candidates)

    def save_last_checkpoint(self, trainer: pl.Trainer) -> None:
        """Write ``last.ckpt``; all ranks must call it."""
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def write_checkpoint(self, trainer: pl.Trainer, path: str) -> None:
        """Write one checkpoint file. Override it to act before or after every write."""
        super()._save_checkpoint(trainer, path)

    @override
    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        self.write_checkpoint(trainer, filepath)


class LightningCLIInternals(LightningCLI):
    """``LightningCLI`` without hyperparameters from checkpoints, and with its parsers under public names.

    Given a ``ckpt_path``, Lightning silently lets the hyperparameters in the checkpoint override the command line and
    the configs. It also publishes the parser of all commands only, and builds the trainer in one piece.
    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/cli.py
    """

    def command_parser(self, command: str | None) -> LightningArgumentParser:
        """Return the parser of one command, such as ``fit``."""
        return self._parser(command)

    def build_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> pl.Trainer:
        """Build the trainer from its keys, with ``callbacks`` and the callback that saves the config."""
        return self._instantiate_trainer(config, callbacks)

    @override
    def _parse_ckpt_path(self) -> None:
        """Keep the hyperparameters that the user gave."""
