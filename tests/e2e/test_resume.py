"""Exact resume: a resumed run equals an uninterrupted run bit by bit, on a CPU."""

from __future__ import annotations

import csv
import functools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import snake_lora_pl.cli.run_directory
from benchmarks.run_comparison import differences
from snake_lora_pl.__main__ import main
from snake_lora_pl.data.datamodule import SnakeJSONLDataModule
from snake_lora_pl.data.generated_rows import write_dataset
from snake_lora_pl.durable import sole_use
from snake_lora_pl.errors import UserError
from snake_lora_pl.paths import RunPaths, sibling_lock_path
from snake_lora_pl.training.callbacks.adapter_checkpoint import AdapterCheckpoint
from snake_lora_pl.training.module import LoRALightningModule
from tests.ranks import run_ranks, started_ranks, wait_for_ranks

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

RUN_PATTERN = "logs/extensions/models/grid-size-5/llm_finetune_v0.03_*/snake_reasoning"

# Validations after batches 7, 14 and 21 of each epoch, and a checkpoint every third step.
BASE = [
    "--data.batch_size=4",
    "--data.val_fraction=0.2",
    "--model.dtype=float32",
    "--model.lora.dropout=0.3",
    "--model.warmup_steps=5",
    "--trainer.limit_val_batches=2",
    "--trainer.limit_train_batches=23",
    "--trainer.val_check_interval=7",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.max_epochs=2",
    "--model.max_new_tokens=2",
    "--checkpoint.save_every_n_steps=3",
]


Fit = Callable[..., Path]


class Killed(BaseException):
    """Simulates that the process is killed."""


def kill() -> None:
    raise Killed


@pytest.fixture(scope="module")
def rows_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """427 short rows of eight games."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_dataset(path, 8, 5, "bfs", "compact", 0)
    return path


@pytest.fixture
def fit(tiny_llama_dir: Path, rows_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """Run ``fit`` in a named directory and return the run directory.

    ``at=(n, action)`` calls an action at the n-th batch, counting training and validation batches.
    """
    num_batches = 0
    action_at: tuple[int, Callable[[], None]] | None = None

    def count_batches(step: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: LoRALightningModule, batch: dict[str, Any], batch_idx: int) -> Any:
            nonlocal num_batches
            num_batches += 1
            if action_at is not None and num_batches == action_at[0]:
                action_at[1]()
            return step(self, batch, batch_idx)

        return run

    for name in ("training_step", "validation_step"):
        monkeypatch.setattr(LoRALightningModule, name, count_batches(getattr(LoRALightningModule, name)))

    def run(name: str, *flags: str, at: tuple[int, Callable[[], None]] | None = None, code: int = 0) -> Path:
        nonlocal num_batches, action_at
        num_batches, action_at = 0, at
        root = tmp_path / name
        root.mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(root)
        arguments = ["fit", "--config", "balanced.yaml", *BASE, *flags]
        arguments += [f"--model.base_model={tiny_llama_dir}", f"--data.train_path={rows_path}"]
        if at is not None and at[1] is kill:
            with pytest.raises(Killed):
                main(arguments)
        else:
            assert main(arguments) == code
        (run_dir,) = root.glob(RUN_PATTERN)
        return run_dir

    return run


@pytest.fixture(scope="module")
def straight_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, ...], Path]]:
    return tmp_path_factory.mktemp("straight"), {}


@pytest.fixture
def fit_straight(fit: Fit, straight_runs: tuple[Path, dict[tuple[str, ...], Path]]) -> Fit:
    """Return an uninterrupted run, shared by all tests with the same flags."""
    root, runs = straight_runs

    def run(*flags: str) -> Path:
        if flags not in runs:
            runs[flags] = fit(str(root / str(len(runs))), *flags)
        return runs[flags]

    return run


# Each process is killed at one of these batches, counting from its start and including validation batches. Among them
# are the first batch after a checkpoint, validations, ends of epochs, and batches within an accumulated step.
@pytest.mark.parametrize(
    ("flags", "kill_batches"),
    [
        (["--play.val_games=2", "--play.max_steps=3"], [6, 6, 7, 13, 5, 20]),
        (["--trainer.accumulate_grad_batches=4", "--play.val_games=2", "--play.max_steps=3"], [14, 9, 13, 16]),
        (["--model.adapter_type=qlora"], [6, 10, 17]),
        (["--model.dtype=float16"], [9, 14]),
        (["--model.adapter_type=adalora", "--trainer.accumulate_grad_batches=2"], [8, 12, 24]),
    ],
    ids=["lora", "lora-accumulated", "qlora", "float16", "adalora-accumulated"],
)
def test_run_killed_repeatedly_equals_an_uninterrupted_run(
    fit: Fit, fit_straight: Fit, flags: list[str], kill_batches: list[int]
) -> None:
    straight = fit_straight(*flags)
    fit("killed", *flags, at=(kill_batches[0], kill))
    for batch in kill_batches[1:]:
        fit("killed", *flags, "--ckpt_path=last", at=(batch, kill))
    killed = fit("killed", *flags, "--ckpt_path=last")
    assert differences(straight, killed) == []


def test_run_resumes_exactly_from_each_checkpoint_in_a_moved_directory(
    fit: Fit, fit_straight: Fit, tmp_path: Path
) -> None:
    straight = fit_straight()
    names = sorted(path.name for path in (straight / "checkpoints").iterdir())
    assert len(names) == 3
    for name in names:
        moved = Path(shutil.copytree(straight.parents[5], tmp_path / f"moved-{name}"))
        (run_dir,) = moved.glob(RUN_PATTERN)
        fit(moved.name, "--data.num_workers=1", f"--ckpt_path={run_dir / 'checkpoints' / name}")
        assert differences(straight, run_dir) == []


def test_run_ended_by_early_stopping_does_not_train_further(
    fit: Fit,
    fit_straight: Fit,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    flags = ["--early_stopping.patience=1", "--early_stopping.min_delta=9"]
    straight = fit_straight(*flags)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(AdapterCheckpoint, "on_train_end", lambda *_: kill())
        fit("killed", *flags)
    killed = fit("killed", *flags, "--ckpt_path=last")
    assert any("--adapter" in message for message in caplog.messages)
    assert differences(straight, killed) == []


@pytest.mark.parametrize("length", ["--trainer.max_steps=3", "--trainer.max_time={'seconds': 0}"])
def test_run_with_nothing_to_train_logs_its_step(fit: Fit, length: str, caplog: pytest.LogCaptureFixture) -> None:
    run_dir = fit("run", "--trainer.max_steps=3")
    assert not any("Nothing to train" in message for message in caplog.messages)
    before = RunPaths(run_dir).metrics_path.read_text()
    fit("run", length, "--ckpt_path=last")
    assert any(re.search("Nothing to train.* step 3 .*trainer.max_steps", message) for message in caplog.messages)
    assert RunPaths(run_dir).metrics_path.read_text() == before


@pytest.mark.parametrize("validates", [True, False])
def test_run_extended_by_more_steps_equals_a_longer_run(fit: Fit, fit_straight: Fit, validates: bool) -> None:
    # A constant schedule: others depend on the number of planned steps.
    flags = ["--model.final_learning_rate_fraction=1", "--model.warmup_steps=0"]
    flags.append(f"--data.val_fraction={0.2 if validates else 0}")
    straight = fit_straight(*flags, "--trainer.max_steps=30")
    fit("stopped", *flags, "--trainer.max_steps=7")
    fit("stopped", *flags, "--trainer.max_steps=25", "--ckpt_path=last")
    stopped = fit("stopped", *flags, "--trainer.max_steps=30", "--ckpt_path=last")
    ends = [torch.load(RunPaths(run).last_checkpoint_path, weights_only=True) for run in (straight, stopped)]
    for name in ("state_dict", "optimizer_states", "loops"):
        assert str(ends[0][name]) == str(ends[1][name]), name
    assert losses(straight) == losses(stopped)
    assert len(losses(straight)) == 30


def test_changed_optimizer_hyperparameters_apply_after_resume(fit: Fit, caplog: pytest.LogCaptureFixture) -> None:
    flags = ["--model.final_learning_rate_fraction=1", "--model.warmup_steps=0", "--data.val_fraction=0"]
    fit("changed", *flags, "--trainer.max_steps=3", "--model.learning_rate=0.001")
    changed = [*flags, "--trainer.max_steps=5", "--model.learning_rate=0.002", "--model.betas=[0.8, 0.9]"]
    run_dir = fit("changed", *changed, "--ckpt_path=last")
    with open(RunPaths(run_dir).metrics_path, newline="") as file:
        rates = [float(row["train/learning_rate"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert rates == pytest.approx([0.001] * 3 + [0.002] * 2)
    (group,) = torch.load(RunPaths(run_dir).last_checkpoint_path)["optimizer_states"][0]["param_groups"]
    assert (group["lr"], group["initial_lr"], tuple(group["betas"])) == (0.002, 0.002, (0.8, 0.9))
    warnings = [message for message in caplog.messages if message.startswith("model.") and "checkpoint" in message]
    assert len(warnings) == 2
    assert any(re.search(r"model\.learning_rate .*0\.001.*0\.002", message) for message in warnings)


def losses(run_dir: Path) -> list[str]:
    with open(RunPaths(run_dir).metrics_path, newline="") as file:
        return [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]


def resume_command(printed: str, signal_name: str) -> list[str]:
    """Return the arguments of the command in the message about a signal."""
    (line,) = [line for line in printed.splitlines() if line.startswith("stopped by")]
    message, command = line.split("python -m snake_lora_pl ")
    assert re.match(rf"stopped by {signal_name} after step \d+\b", message)
    return shlex.split(command)


# Within an accumulated step; in a validation, whose first batch is the 9th; in the last validation.
@pytest.mark.parametrize(("signum", "batch"), [(signal.SIGINT, 6), (signal.SIGTERM, 9), (signal.SIGTERM, 32)])
def test_signal_stops_after_the_step_and_the_printed_command_resumes(
    fit: Fit,
    fit_straight: Fit,
    capfd: pytest.CaptureFixture[str],
    signum: signal.Signals,
    batch: int,
) -> None:
    flags = ["--trainer.accumulate_grad_batches=4", "--trainer.max_steps=7"]
    straight = fit_straight(*flags)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    capfd.readouterr()
    stopped = fit("stopped", *flags, at=(batch, lambda: signal.raise_signal(signum)), code=128 + signum)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers
    assert main(resume_command(capfd.readouterr().err, signum.name)) == 0
    assert differences(straight, stopped) == []


def test_second_ctrl_c_has_the_default_handler(fit: Fit) -> None:
    seen = []

    def interrupt() -> None:
        seen.append(signal.getsignal(signal.SIGINT))
        signal.raise_signal(signal.SIGINT)
        seen.append(signal.getsignal(signal.SIGINT))

    fit("stopped", at=(3, interrupt), code=130)
    assert seen[0] not in (signal.SIG_DFL, signal.default_int_handler)
    assert seen[1] is signal.SIG_DFL


def test_signal_in_the_sanity_check_ends_the_run(fit: Fit, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = fit("stopped", "--trainer.num_sanity_val_steps=2", at=(1, lambda: signal.raise_signal(signal.SIGTERM)),
                  code=143)  # fmt: skip
    written = capfd.readouterr().err
    assert "Traceback" not in written
    assert "SIGTERM" in written
    assert not RunPaths(run_dir).last_checkpoint_path.exists()


def test_signal_after_training_skips_the_games(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    on_train_end = AdapterCheckpoint.on_train_end

    def end_and_stop(*arguments: Any) -> None:
        on_train_end(*arguments)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(AdapterCheckpoint, "on_train_end", end_and_stop)
    run_dir = fit("stopped", "--trainer.max_steps=2", "--play.final_games=1", "--play.max_steps=2", code=143)
    assert resume_command(capfd.readouterr().err, "SIGTERM")
    assert not RunPaths(run_dir).games.games_dir.exists()
    assert RunPaths(run_dir).artifacts_dir.is_dir()


def test_signal_before_training_leaves_no_files(
    tiny_llama_dir: Path, rows_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SnakeJSONLDataModule, "prepare_data", lambda self: signal.raise_signal(signal.SIGTERM))
    arguments = [*BASE, f"--model.base_model={tiny_llama_dir}", f"--data.train_path={rows_path}"]
    assert main(["fit", "--config", "balanced.yaml", *arguments]) == 143
    assert not (tmp_path / "logs").exists()


def test_slurm_job_is_requeued_between_two_steps(
    fit: Fit, fit_straight: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.txt\n')
    scontrol.chmod(0o755)
    straight = fit_straight()
    monkeypatch.setenv("PATH", str(scontrol.parent), prepend=":")
    job = {"JOB_ID": "4711", "JOB_NAME": "train", "NTASKS": "1", "NTASKS_PER_NODE": "1", "PROCID": "0", "LOCALID": "0"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    signum = signal.SIGUSR1
    fit("requeued", "--ckpt_path=auto", at=(13, lambda: signal.raise_signal(signum)), code=128 + signum)
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 4711\n"
    requeued = fit("requeued", "--ckpt_path=auto")
    assert differences(straight, requeued) == []
    # Lightning writes the checkpoint for the requeued job to the run directory.
    assert [path.parent for path in (tmp_path / "requeued").rglob("hpc_ckpt*")] == [requeued]


def start(root: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a command in a new process."""
    root.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "snake_lora_pl", *arguments]
    # One thread per process: more would compete for the cores of a small machine.
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def run_of_two(
    tiny_llama_dir: Path, rows_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], Path]:
    """A command that trains on two ranks, and the directory of its uninterrupted run."""
    arguments = ["fit", "--config=balanced.yaml", "--config=ddp.yaml", *BASE, "--trainer.devices=2"]
    arguments += [f"--model.base_model={tiny_llama_dir}", f"--data.train_path={rows_path}"]
    arguments += ["--trainer.accumulate_grad_batches=2", "--trainer.limit_train_batches=1.0"]
    root = tmp_path_factory.mktemp("run-of-two")
    run_ranks(root, arguments)
    (run_dir,) = root.glob(RUN_PATTERN)
    return arguments, run_dir


def wait_for_checkpoint(root: Path, is_running: Callable[[], bool]) -> None:
    while not any(root.glob(f"{RUN_PATTERN}/checkpoints/last.ckpt")):
        time.sleep(0.02)
        assert is_running()


# What two ranks do that are killed together is in test_resume_pairs.py.
@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("target", [0, 1])
def test_two_ranks_stop_after_the_same_step_and_resume(
    run_of_two: tuple[list[str], Path], tmp_path: Path, target: int
) -> None:
    arguments, straight = run_of_two
    with started_ranks(tmp_path, arguments) as ranks:
        wait_for_checkpoint(tmp_path, ranks[0].is_alive)
        ranks[target].terminate()
        written = wait_for_ranks(ranks, tmp_path, 128 + signal.SIGTERM)
    assert "Traceback" not in written
    run_ranks(tmp_path, resume_command(written, "SIGTERM"))
    (stopped,) = tmp_path.glob(RUN_PATTERN)
    assert differences(straight, stopped) == []


@pytest.mark.slow
def test_rank_0_ends_with_a_message_if_another_rank_is_killed(
    run_of_two: tuple[list[str], Path], tmp_path: Path
) -> None:
    process = start(tmp_path, *run_of_two[0], "--trainer.max_epochs=100")
    wait_for_checkpoint(tmp_path, lambda: process.poll() is None)
    (child,) = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, check=True).stdout.split()
    os.kill(int(child), signal.SIGKILL)
    _, written = process.communicate(timeout=200)
    # Lightning watches the child and may kill this process before it prints the message.
    assert process.returncode in (2, -signal.SIGKILL, -signal.SIGTERM, 143), written
    assert "Traceback" not in written
    assert process.returncode != 2 or "another rank exited" in written


@pytest.mark.parametrize("option", ["dirpath", "adapter_dir"])
def test_two_runs_never_write_to_the_same_given_directory(
    fit: Fit, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(snake_lora_pl.cli.run_directory, "sole_use", functools.partial(sole_use, timeout_s=0.1))
    shared = tmp_path / "shared" / "named"
    flags = [f"--checkpoint.{option}={shared}", "--trainer.max_steps=2", "--data.val_fraction=0"]

    def try_to_write_there() -> None:
        with (
            pytest.raises(UserError, match="shared: another run"),
            sole_use(sibling_lock_path(shared), timeout_s=0),
        ):
            pass

    fit("run", *flags, at=(2, try_to_write_there))
    with sole_use(sibling_lock_path(shared)), pytest.raises(ValueError, match="not enough values to unpack"):
        fit("another", *flags, code=2)
    assert "named: another run" in capfd.readouterr().err


def test_two_runs_never_write_to_the_same_run_directory(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(snake_lora_pl.cli.run_directory, "sole_use", functools.partial(sole_use, timeout_s=0.1))
    run_dir = fit("run", "--trainer.max_steps=3")

    def written() -> dict[Path, int]:
        # Trying to lock changes the modification time of the lock file.
        paths = set(run_dir.rglob("*")) - {RunPaths(run_dir).lock_path}
        return {path: path.stat().st_mtime_ns for path in paths}

    before = written()
    with sole_use(RunPaths(run_dir).lock_path):
        fit("run", "--ckpt_path=last", code=2)
    assert "another run" in capfd.readouterr().err
    assert written() == before
    fit("run", "--trainer.max_steps=4", "--ckpt_path=last")
