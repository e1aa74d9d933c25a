"""Full disks, and run directories that become read-only or are removed: a one-line error and valid earlier files."""

from __future__ import annotations

import contextlib
import errno
import os
import re
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
    """Run ``fit`` with checkpoints after steps 3, 4, 6 and 8, and adapters after steps 4 and 8."""

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
    """Return an uninterrupted run."""
    if "straight" not in straight_runs:
        code, straight_runs["straight"] = fit(tmp_path / "straight")
        assert code == 0
    return straight_runs["straight"]


@contextlib.contextmanager
def limit_file_size(num_bytes: int) -> Iterator[None]:
    """Limit the size of files, which has the same effect as a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def fail_writes(patch: pytest.MonkeyPatch, owner: Any, name: str, nth: int) -> None:
    """Let the writes of a function fail from its nth call on."""
    function, num_calls = getattr(owner, name), 0

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        with limit_file_size(40) if num_calls >= nth else contextlib.nullcontext():
            return function(*args, **kwargs)

    patch.setattr(owner, name, run)


def check_files_are_valid(run_dir: Path) -> None:
    for path in RunPaths(run_dir).checkpoints_dir.glob("*.ckpt"):
        torch.load(path, weights_only=True)
    if RunPaths(run_dir).artifacts_dir.exists():
        store.verify(RunPaths(run_dir).artifacts_dir)


@pytest.mark.parametrize(
    ("owner", "name", "nth", "file_name"),
    [
        (torch, "save", 2, ".ckpt"),
        (torch, "save", 4, ".ckpt"),
        (store, "save", 2, "model_artifacts"),
        (_MetricsFile, "save", 9, "metrics.csv"),
    ],
    ids=["checkpoint", "last-checkpoint", "adapter", "metrics"],
)
def test_failed_write_is_a_one_line_error_and_the_run_resumes(
    fit: Callable[..., tuple[int, Path]],
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    owner: Any,
    name: str,
    nth: int,
    file_name: str,
) -> None:
    with monkeypatch.context() as patch:
        fail_writes(patch, owner, name, nth)
        code, run_dir = fit(tmp_path / "full")
    written = capfd.readouterr().err
    assert code == 2, written
    assert "Traceback" not in written
    assert re.search(rf"error: .*{re.escape(file_name)}.*File too large", written)
    check_files_are_valid(run_dir)
    assert not list(run_dir.rglob("*.tmp"))
    assert fit(tmp_path / "full", "--ckpt_path=last") == (0, run_dir)
    assert differences(straight, run_dir) == []


def test_failed_write_of_the_config_leaves_no_run_directory(
    fit: Callable[..., tuple[int, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    fail_writes(monkeypatch, ResolvedConfig, "save_config", 1)
    with pytest.raises(ValueError, match="not enough values to unpack"):
        fit(tmp_path / "full")
    assert re.search(r"error: .*config\.yaml: .*File too large", capfd.readouterr().err)
    assert not (tmp_path / "full" / "logs").exists()


def test_full_disk_of_another_logger_is_a_one_line_error(
    fit: Callable[..., tuple[int, Path]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def log_to_full_disk() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/elsewhere/events")

    code, run_dir = fit(tmp_path / "full", at=(5, log_to_full_disk))
    assert code == 2
    assert "error: /elsewhere/events: No space left on device" in capfd.readouterr().err
    check_files_are_valid(run_dir)


def test_table_is_printed_if_the_games_cannot_be_written(
    fit: Callable[..., tuple[int, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    fail_writes(monkeypatch, snake_lora_pl.cli.games, "write_games", 1)
    code, run_dir = fit(tmp_path / "full", "--play.final_games=1", "--play.max_steps=2")
    printed = capfd.readouterr()
    assert code == 2
    assert re.search(r"error: .*/games.*File too large", printed.err)
    assert "apples, mean" in printed.out
    check_files_are_valid(run_dir)


def test_directory_removed_during_the_run_is_a_one_line_error(
    fit: Callable[..., tuple[int, Path]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "removed"
    with pytest.raises(ValueError, match="not enough values to unpack"):
        fit(root, at=(5, lambda: shutil.rmtree(root / "logs")))
    written = capfd.readouterr().err
    assert "Traceback" not in written
    assert re.search(rf"error: {root}.* removed", written)
    assert not (root / "logs").exists()


@contextlib.contextmanager
def mounted(directory: Path, *options: str) -> Iterator[None]:
    """Mount a file system on a directory; skip the test without the right to mount."""
    done = subprocess.run(["mount", *options, str(directory)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"not allowed to mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@contextlib.contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Make a directory tree read-only. Root ignores permissions, so it needs a mount."""
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


def test_disk_that_fills_up_during_the_run(
    fit: Callable[..., tuple[int, Path]], straight: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()

    def fill() -> None:
        with contextlib.suppress(OSError), open(disk / "other_file", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    with mounted(disk, "-t", "tmpfs", "-o", "size=8m", "tmpfs"):
        code, run_dir = fit(disk, at=(5, fill))
        written = capfd.readouterr().err
        assert code == 2, written
        assert "Traceback" not in written
        assert re.search(rf"error: {disk}.*No space left on device", written)
        check_files_are_valid(run_dir)
        (disk / "other_file").unlink()
        assert fit(disk, "--ckpt_path=last") == (0, run_dir)
        assert differences(straight, run_dir) == []


def test_directory_that_becomes_read_only_during_the_run(
    fit: Callable[..., tuple[int, Path]], straight: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    with contextlib.ExitStack() as stack:
        code, run_dir = fit(root, at=(5, lambda: stack.enter_context(read_only(root / "logs"))))
        written = capfd.readouterr().err
        assert code == 2, written
        assert "Traceback" not in written
        assert re.search(rf"error: {root}.*(Read-only file system|Permission denied)", written)
        check_files_are_valid(run_dir)
        code, _ = fit(root, "--ckpt_path=last")
        written = capfd.readouterr().err
        assert code == 2, written
        assert re.search(rf"error: .*{run_dir.name}", written)
        code, _ = fit(root)
        assert code == 2
        assert "error: " in capfd.readouterr().err
    assert fit(root, "--ckpt_path=last") == (0, run_dir)
    assert differences(straight, run_dir) == []
