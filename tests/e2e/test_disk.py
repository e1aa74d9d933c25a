"""A disk that is full, a directory that became read-only or was removed: one line, and what was good stays good."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import snake_lora_pl.cli.games
from benchmarks.run_comparison import differences
from snake_lora_pl.__main__ import main
from snake_lora_pl.adapters import store
from snake_lora_pl.data.generated_rows import write_dataset
from snake_lora_pl.paths import RunPaths
from snake_lora_pl.training.callbacks.run_config import ResolvedConfig
from snake_lora_pl.training.metrics_csv import _MetricsFile
from snake_lora_pl.training.module import LoRALightningModule

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

RUN_PATTERN = "logs/extensions/models/grid-size-5/llm_finetune_v0.03_*/snake_reasoning"
NUM_BATCHES = 8


@pytest.fixture(scope="module")
def rows_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_dataset(path, 2, 5, "bfs", "compact", 0)
    return path


@pytest.fixture
def fit(tiny_llama_dir: Path, rows_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Path]]:
    """Fit in a directory; checkpoints after steps 3, 4, 6 and 8, adapters after 4 and 8."""

    def run(root: Path, *flags: str, at: tuple[int, Callable[[], Any]] | None = None) -> tuple[int, Path]:
        root.mkdir(exist_ok=True)
        arguments = ["fit", "--config=balanced.yaml", f"--root={root}", f"--data.train_path={rows_path}"]
        arguments += [f"--model.base_model={tiny_llama_dir}", "--model.dtype=float32", "--data.batch_size=2"]
        arguments += ["--data.val_fraction=0.5", "--trainer.limit_val_batches=1", "--trainer.accelerator=cpu"]
        arguments += ["--trainer.val_check_interval=4", f"--trainer.limit_train_batches={NUM_BATCHES}"]
        arguments += ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--model.max_new_tokens=2"]
        arguments += ["--checkpoint.save_every_n_steps=3", "--checkpoint.monitor=null", *flags]
        with monkeypatch.context() as patch:
            if at is not None:
                patch.setattr(LoRALightningModule, "training_step", before(at, LoRALightningModule.training_step))
            code = main(arguments)
        (run_dir,) = root.glob(RUN_PATTERN)
        return code, run_dir

    return run


def before(at: tuple[int, Callable[[], Any]], step: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: LoRALightningModule, batch: dict[str, Any], batch_idx: int) -> Any:
        if batch_idx == at[0]:
            at[1]()
        return step(self, batch, batch_idx)

    return run


@pytest.fixture(scope="module")
def straight_runs() -> dict[str, Path]:
    return {}


@pytest.fixture
def straight(fit: Callable[..., tuple[int, Path]], straight_runs: dict[str, Path], tmp_path: Path) -> Path:
    """The run that nothing stops."""
    if "straight" not in straight_runs:
        code, straight_runs["straight"] = fit(tmp_path / "straight")
        assert code == 0
    return straight_runs["straight"]


@contextlib.contextmanager
def no_file_above(num_bytes: int) -> Iterator[None]:
    """Let the system refuse larger files, to whomever writes them: what a full disk does, without filling one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def refuse(patch: pytest.MonkeyPatch, owner: Any, name: str, nth: int) -> None:
    """Let the system refuse what the nth call of a function writes, and all after it."""
    function, num_calls = getattr(owner, name), 0

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        with no_file_above(40) if num_calls >= nth else contextlib.nullcontext():
            return function(*args, **kwargs)

    patch.setattr(owner, name, run)


def check_what_was_good(run_dir: Path) -> None:
    for path in RunPaths(run_dir).checkpoints_dir.glob("*.ckpt"):
        torch.load(path, weights_only=True)
    if RunPaths(run_dir).artifacts_dir.exists():
        store.verify(RunPaths(run_dir).artifacts_dir)


@pytest.mark.parametrize(
    ("owner", "name", "nth", "what"),
    [
        (torch, "save", 2, "the checkpoint"),
        (torch, "save", 4, "the checkpoint"),
        (store, "save", 2, "the adapter"),
        (_MetricsFile, "save", 9, "the metrics"),
    ],
    ids=["checkpoint", "last-checkpoint", "adapter", "metrics"],
)
def test_what_cannot_be_written_is_said_and_the_run_goes_on_once_there_is_room(
    fit: Callable[..., tuple[int, Path]],
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    owner: Any,
    name: str,
    nth: int,
    what: str,
) -> None:
    with monkeypatch.context() as patch:
        refuse(patch, owner, name, nth)
        code, run_dir = fit(tmp_path / "full")
    written = capfd.readouterr().err
    assert code == 2, written
    assert "Traceback" not in written
    assert f"{what} could not be written (File too large)" in written
    check_what_was_good(run_dir)
    assert not list(run_dir.rglob("*.tmp"))
    assert fit(tmp_path / "full", "--ckpt_path=last") == (0, run_dir)
    assert differences(straight, run_dir) == []


def test_a_config_that_cannot_be_written_leaves_no_run_behind(
    fit: Callable[..., tuple[int, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    refuse(monkeypatch, ResolvedConfig, "save_config", 1)
    with pytest.raises(ValueError, match="not enough values to unpack"):
        fit(tmp_path / "full")
    assert "config.yaml: the config could not be written (File too large)" in capfd.readouterr().err
    assert not (tmp_path / "full" / "logs").exists()


def test_a_disk_that_is_full_for_somebody_else_is_one_line_too(
    fit: Callable[..., tuple[int, Path]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def log_elsewhere() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/elsewhere/events")

    code, run_dir = fit(tmp_path / "full", at=(5, log_elsewhere))
    assert code == 2
    assert "error: /elsewhere/events: No space left on device" in capfd.readouterr().err
    check_what_was_good(run_dir)


def test_the_table_of_games_that_cannot_be_written_is_printed(
    fit: Callable[..., tuple[int, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    refuse(monkeypatch, snake_lora_pl.cli.games, "write_games", 1)
    code, run_dir = fit(tmp_path / "full", "--play.final_games=1", "--play.max_steps=2")
    printed = capfd.readouterr()
    assert code == 2
    assert "the games could not be written (File too large)" in printed.err
    assert "apples, mean" in printed.out
    check_what_was_good(run_dir)


def test_a_directory_removed_under_the_run_is_one_line_and_not_made_again(
    fit: Callable[..., tuple[int, Path]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "removed"
    with pytest.raises(ValueError, match="not enough values to unpack"):
        fit(root, at=(5, lambda: shutil.rmtree(root / "logs")))
    written = capfd.readouterr().err
    assert "Traceback" not in written
    assert "directory was removed" in written
    assert not (root / "logs").exists()


@contextlib.contextmanager
def mounted(directory: Path, *options: str) -> Iterator[None]:
    """Something mounted on a directory; needs rights that few test machines give."""
    done = subprocess.run(["mount", *options, str(directory)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"this process may not mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@contextlib.contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Nothing below a directory can be written; permissions do not keep root from it, a mount does."""
    if os.geteuid() == 0:
        with mounted(directory, "--bind", str(directory)):
            options = ["mount", "-o", "remount,bind,ro", str(directory)]
            subprocess.run(options, check=True, capture_output=True)
            yield
        return
    directories = [directory, *(path for path in directory.rglob("*") if path.is_dir())]
    for path in directories:
        path.chmod(0o555)
    try:
        yield
    finally:
        for path in directories:
            path.chmod(0o755)


def test_a_disk_that_fills_up_under_the_run(
    fit: Callable[..., tuple[int, Path]], straight: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()

    def fill() -> None:
        with contextlib.suppress(OSError), open(disk / "somebody_elses", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    with mounted(disk, "-t", "tmpfs", "-o", "size=8m", "tmpfs"):
        code, run_dir = fit(disk, at=(5, fill))
        written = capfd.readouterr().err
        assert code == 2, written
        assert "Traceback" not in written
        assert "could not be written (No space left on device)" in written
        check_what_was_good(run_dir)
        (disk / "somebody_elses").unlink()
        assert fit(disk, "--ckpt_path=last") == (0, run_dir)
        assert differences(straight, run_dir) == []


def test_a_directory_that_becomes_read_only_under_the_run(
    fit: Callable[..., tuple[int, Path]], straight: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    with contextlib.ExitStack() as stack:
        code, run_dir = fit(root, at=(5, lambda: stack.enter_context(read_only(root / "logs"))))
        written = capfd.readouterr().err
        assert code == 2, written
        assert "Traceback" not in written
        assert "Make the directory writable" in written
        check_what_was_good(run_dir)
        code, _ = fit(root, "--ckpt_path=last")
        written = capfd.readouterr().err
        assert code == 2, written
        assert "cannot be written to" in written
        code, _ = fit(root)
        assert code == 2
        assert "Choose a writable directory" in capfd.readouterr().err
    assert fit(root, "--ckpt_path=last") == (0, run_dir)
    assert differences(straight, run_dir) == []
