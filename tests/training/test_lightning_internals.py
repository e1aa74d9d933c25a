"""Each private name exists, does what it is used for, and is still needed: Lightning offers no public way."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver, _launch_process_observer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

import snake_lora_pl
from snake_lora_pl.training import lightning_internals as internals
from tests.training.conftest import make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*num_workers:UserWarning"),
    # Of Lightning about torch and jsonargparse.
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*deprecat"),
]


class Observe(pl.Callback):
    """Calls a function at the end of each micro-batch and during each validation."""

    def __init__(self, on_batch: Any = None, on_validation: Any = None) -> None:
        self.on_batch, self.on_validation = on_batch, on_validation
        self.batches: list[Any] = []
        self.validations: list[Any] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.on_batch is not None:
            self.batches.append(self.on_batch(trainer))

    def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.on_validation is not None and not trainer.sanity_checking:
            self.validations.append(self.on_validation(trainer))


def fit(root: Path, observe: Observe, **settings: Any) -> pl.Trainer:
    trainer = make_trainer(root, callbacks=[observe], **settings)
    trainer.fit(BoringModel())
    return trainer


def test_is_accumulating_follows_accumulation_and_the_end_of_the_epoch(tmp_path: Path) -> None:
    observe = Observe(on_batch=internals.is_accumulating)
    trainer = fit(tmp_path, observe, limit_train_batches=5, limit_val_batches=0, accumulate_grad_batches=2)
    assert observe.batches == [True, False, True, False, False]
    assert not hasattr(trainer.fit_loop, "should_accumulate")


def test_logged_steps_lag_behind_global_step_during_validation(tmp_path: Path) -> None:
    observe = Observe(on_validation=lambda t: (t.fit_loop.epoch_loop._batches_that_stepped, t.global_step))
    fit(tmp_path, observe, limit_train_batches=4, limit_val_batches=1, val_check_interval=2)
    assert observe.validations == [(1, 2), (3, 4)]


def test_logged_steps_set_the_step_of_the_next_metrics(tmp_path: Path) -> None:
    logged: list[int] = []

    class Logger(pl.loggers.CSVLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            logged.append(-1 if step is None else step)

    class Model(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            output = super().training_step(batch, batch_idx)
            self.log("loss", output["loss"])
            return output

    observe = Observe(on_batch=lambda trainer: internals.set_logged_steps(trainer, 10))
    trainer = make_trainer(
        tmp_path,
        callbacks=[observe],
        logger=Logger(str(tmp_path)),
        log_every_n_steps=1,
        limit_train_batches=1,
        limit_val_batches=0,
    )
    trainer.fit(Model())
    assert logged[0] == 10


@pytest.mark.parametrize(("interval", "expected"), [("00:00:10:00", True), (1.0, False), (1, False)])
def test_validates_by_time_is_true_for_time_intervals_only(tmp_path: Path, interval: Any, expected: bool) -> None:
    trainer = make_trainer(tmp_path, val_check_interval=interval, check_val_every_n_epoch=None if expected else 1)
    assert internals.validates_by_time(trainer) == expected
    # The public name holds what the user gave only after the data is attached, and never the parsed time.
    assert getattr(trainer, "val_check_interval", None) != 600


def test_time_limit_is_checked_only_where_the_ranks_agree_that_it_is_reached(tmp_path: Path) -> None:
    timer = Timer(timedelta(seconds=0))
    timer.time_elapsed = lambda stage=None: 1.0  # type: ignore[method-assign]
    trainer = make_trainer(tmp_path, callbacks=[timer])
    is_reached = False
    internals.decide_time_limit(timer, lambda: is_reached)
    timer.on_train_batch_end(trainer)
    assert not trainer.should_stop
    is_reached = True
    timer.on_train_batch_end(trainer)
    assert trainer.should_stop


def test_sigterm_is_broadcast_before_every_batch_unless_disabled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path)
    broadcasts: list[int] = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *args, **kwargs: broadcasts.append(1))
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()
    assert len(broadcasts) == 1
    internals.disable_sigterm_broadcast(trainer)
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()
    assert len(broadcasts) == 1


def test_wrap_restoring_surrounds_everything_that_a_checkpoint_restores(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(BoringModel())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    calls: list[str] = []

    def wrapper(restore: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> None:
            restore(*args, **kwargs)
            calls.append(restore.__name__)

        return run

    class Restored(BoringModel):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            calls.append("on_load_checkpoint")

    trainer = make_trainer(tmp_path, max_steps=2, limit_val_batches=0)
    internals.wrap_restoring(trainer, wrapper)
    trainer.fit(Restored(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert calls == ["on_load_checkpoint", "_restore_modules_and_callbacks", "restore_training_state"]


def test_cluster_environment_is_known_for_a_single_device(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, devices=1)
    assert isinstance(internals.cluster_environment(trainer), LightningEnvironment)
    assert not hasattr(trainer.strategy, "cluster_environment")


@pytest.mark.parametrize(("strategy", "expected"), [("ddp_spawn", True), ("ddp_fork", True), ("ddp", False)])
def test_forks_or_spawns_tells_launchers_apart(tmp_path: Path, strategy: str, expected: bool) -> None:
    trainer = make_trainer(tmp_path, strategy=strategy, devices=2)
    trainer.strategy._configure_launcher()
    assert internals.forks_or_spawns(trainer) == expected


def test_kill_launched_ranks_ends_them_and_their_observer() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), num_processes=2, num_nodes=1)
    launcher.procs = [child]
    _launch_process_observer(launcher.procs)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(launcher=launcher))
    internals.kill_launched_ranks(trainer)
    assert child.wait(timeout=60) == -signal.SIGKILL
    observers = [thread for thread in threading.enumerate() if isinstance(thread, _ChildProcessObserver)]
    assert observers
    # A finished check returns True; one that sees the killed child kills this process instead.
    assert all(observer._run() for observer in observers)


def test_every_rank_is_a_data_parallel_rank() -> None:
    strategy = ModelParallelStrategy(tensor_parallel_size=1)
    assert strategy._data_parallel_size == "auto"  # one per node, whatever the number of processes
    strategy.parallel_devices = [torch.device("cpu")] * 3
    strategy.num_nodes = 2
    internals.shard_data_over_all_ranks(strategy)
    assert strategy._data_parallel_size == 6


def test_fused_optimizers_are_unscaled_before_their_step() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    with pytest.raises(RuntimeError, match="clip"):
        precision.clip_gradients(optimizer, clip_val=1.0)
    internals.unscale_before_step([optimizer])
    precision.clip_gradients(optimizer, clip_val=1.0)
    assert float(parameter.grad.norm()) == pytest.approx(1.0)


def test_model_checkpoint_writes_under_public_names(tmp_path: Path) -> None:
    written: list[str] = []

    class Checkpoint(internals.ModelCheckpointInternals):
        def write_checkpoint(self, trainer: pl.Trainer, path: str) -> None:
            super().write_checkpoint(trainer, path)
            written.append(Path(path).name)

        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.callback_metrics["loss"] = torch.tensor(float(trainer.global_step))
            candidates = self.metric_candidates(trainer)
            assert {"loss", "epoch", "step"} <= candidates.keys()
            self.save_if_best(trainer, candidates)
            self.save_last_checkpoint(trainer)

        def on_train_epoch_end(self, *args: Any) -> None:
            assert (self.last_saved_step, Path(self.last_saved_path).name) == (2, "last.ckpt")
            self.last_saved_step = 7
            assert self.last_saved_step == 7

    checkpoint = Checkpoint(tmp_path, "{step}", "loss", save_top_k=1, save_last=True, enable_version_counter=False)
    fit(tmp_path, checkpoint, enable_checkpointing=True, max_steps=2, limit_val_batches=0)  # type: ignore[arg-type]
    assert written == ["step=1.ckpt", "last.ckpt", "last.ckpt"]
    public = {name for name in vars(ModelCheckpoint) if not name.startswith("_")}
    assert not {name for name in public if "last_saved" in name or name.startswith("save_")}


def private_uses(path: Path) -> Iterator[str]:
    """Yield private imports from Lightning, and private attributes of other objects that Lightning's classes have."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lightning"):
            yield from (alias.name for alias in node.names if alias.name.startswith("_"))
        if isinstance(node, ast.Attribute) and node.attr in LIGHTNING_ATTRIBUTES:
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.attr


def inherited_uses(module_name: str) -> Iterator[str]:
    """Yield private attributes of Lightning's classes that their subclasses in a module use or override."""
    for item in vars(importlib.import_module(module_name)).values():
        if inspect.isclass(item) and item.__module__ == module_name:
            bases = [base for base in item.__mro__ if base.__module__.startswith("lightning.")]
            inherited = {name for base in bases for name in PRIVATE_ATTRIBUTE.findall(inspect.getsource(base))}
            inherited |= {name for base in bases for name in vars(base) if re.match("_[a-z]", name)}
            used = {name for name in vars(item) if re.match("_[a-z]", name)} - {"_abc_impl"}
            yield from inherited & (used | set(PRIVATE_ATTRIBUTE.findall(inspect.getsource(item))))


PRIVATE_ATTRIBUTE = re.compile(r"\bself\.(_[a-z]\w*)")
LIGHTNING_ATTRIBUTES = {
    name
    for package in ("pytorch", "fabric")
    for path in (Path(lightning.__path__[0]) / package).rglob("*.py")
    for name in PRIVATE_ATTRIBUTE.findall(path.read_text())
}


def test_no_other_module_uses_private_names_of_lightning() -> None:
    root = Path(snake_lora_pl.__path__[0])
    found = {}
    for path in root.rglob("*.py"):
        uses = {*private_uses(path)}
        if "lightning" in path.read_text() and path.name != "__main__.py":
            uses |= {*inherited_uses(".".join(path.relative_to(root.parent).with_suffix("").parts))}
        if uses:
            found[path.relative_to(root).as_posix()] = uses
    assert found.pop("training/lightning_internals.py") >= {"_should_accumulate", "_save_checkpoint"}
    assert found == {}


class Model(BoringModel):
    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.width = width


@pytest.mark.parametrize(("cli_class", "width"), [(LightningCLI, 5), (internals.LightningCLIInternals, 3)])
def test_hyperparameters_in_a_checkpoint_do_not_override_the_command_line(
    tmp_path: Path, cli_class: type[LightningCLI], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["program"])
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(Model(width=5))
    trainer.save_checkpoint(tmp_path / "one.ckpt")

    class Parsed(Exception):  # noqa: N818 - it ends the command before it runs
        pass

    class CLI(cli_class):  # type: ignore[misc, valid-type]
        def before_instantiate_classes(self) -> None:
            assert self.config["fit"]["model"]["width"] == width
            raise Parsed

    with pytest.raises(Parsed):
        CLI(
            Model,
            args=["fit", "--model.width=3", f"--ckpt_path={tmp_path / 'one.ckpt'}"],
            seed_everything_default=False,
        )


def test_cli_builds_a_trainer_and_names_the_parser_of_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["program"])

    class CLI(internals.LightningCLIInternals):
        def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
            keys = {"default_root_dir": str(tmp_path), "logger": False, "callbacks": None}
            return self.build_trainer(keys, [Observe()])

    cli = CLI(Model, args=["validate"], save_config_callback=None, seed_everything_default=False)
    assert any(isinstance(callback, Observe) for callback in cli.trainer.callbacks)
    assert "model" in cli.command_parser("fit").get_defaults()
