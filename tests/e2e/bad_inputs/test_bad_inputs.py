"""Every hostile input ends with a clear message and its exit code; no code is executed, no other file is written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.bad_inputs.cases import CASES, Case
from tests.e2e.bad_inputs.runner import MAX_CPU_S, MAX_MEMORY_BYTES, Runner, environment, warm_runner
from tests.e2e.bad_inputs.sandbox import Sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the runner reads /proc")


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with warm_runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def good_run(
    runner: Runner, tiny_llama_dir: Path, bfs512_sample_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Directory of a one-step run; the cases damage copies of its adapter and checkpoint."""
    directory = tmp_path_factory.mktemp("good")
    outcome = runner.run(
        ["fit", "--config", "balanced.yaml", f"--model.base_model={tiny_llama_dir}", "--trainer.max_steps=1",
         f"--data.train_path={bfs512_sample_path}", "--data.max_length=1200", "--trainer.accelerator=cpu",
         "--trainer.limit_val_batches=1", "--data.batch_size=2", "--play.final_games=0"], directory
    )  # fmt: skip
    assert outcome.exit_code == 0, outcome.stderr
    assert not outcome.violations
    (run_dir,) = directory.glob("logs/extensions/models/*/*/snake_reasoning")
    return run_dir


@pytest.fixture
def sandbox(
    good_run: Path, tiny_llama_dir: Path, bfs512_sample_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Sandbox:
    # The default directory name contains the case's name, which a message that prints the path would then mention.
    root = tmp_path_factory.mktemp("case") / "sandbox"
    root.mkdir()
    return Sandbox(
        root=root,
        base=tiny_llama_dir,
        rows=bfs512_sample_path,
        good_adapter=good_run / "lora_adapters" / "model_artifacts",
        good_checkpoint=good_run / "checkpoints" / "last.ckpt",
    )


def snapshot(*directories: Path, exclude: Path) -> dict[str, tuple[int, int]]:
    """Return size and modification time of every path below ``directories``, except ``exclude``."""
    found = {}
    for directory in directories:
        for path, inner, names in os.walk(directory):
            inner[:] = [name for name in inner if Path(path, name) != exclude]
            for name in [*names, *inner]:
                status = os.lstat(os.path.join(path, name))
                found[os.path.join(path, name)] = status.st_size, status.st_mtime_ns
    return found


def assert_clear_message(case: Case, exit_code: int, stdout: str, stderr: str) -> None:
    assert exit_code == case.exit_code, stderr
    assert "Traceback" not in stdout + stderr
    message = stdout
    if exit_code:
        lines = stderr.splitlines()
        (begin,) = (number for number, line in enumerate(lines) if line.startswith("error: "))
        message = "\n".join(lines[begin:])
        assert len(message) < 12_000
        assert message.replace("\n", "").isprintable()
    assert case.missing_from(message) == [], message


def test_corpus_has_at_least_120_distinct_cases() -> None:
    assert len(CASES) >= 120
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Case, sandbox: Sandbox, runner: Runner, good_run: Path) -> None:
    arguments = case.build(sandbox)
    protected = (good_run, sandbox.base, sandbox.rows.parent, sandbox.root.parent)
    before = snapshot(*protected, exclude=sandbox.root)
    outcome = runner.run(arguments, sandbox.root)
    assert outcome.cpu_s < MAX_CPU_S
    assert_clear_message(case, outcome.exit_code, outcome.stdout, outcome.stderr)
    assert outcome.peak_memory_bytes < MAX_MEMORY_BYTES
    assert not outcome.violations
    assert not sandbox.canary.exists()
    assert snapshot(*protected, exclude=sandbox.root) == before


SUBPROCESS_CASES = ["row: nested 100,000 deep", "file: an endless device", "config: not UTF-8"]


@pytest.mark.parametrize("name", SUBPROCESS_CASES)
def test_bad_input_in_a_fresh_process(name: str, sandbox: Sandbox) -> None:
    (case,) = (case for case in CASES if case.name == name)
    arguments = case.build(sandbox)
    done = subprocess.run(
        [sys.executable, "-m", "snake_lora_pl", *arguments], capture_output=True, text=True, timeout=200,
        cwd=sandbox.root, env={**os.environ, **environment(sandbox.root)}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert_clear_message(case, done.returncode, done.stdout, done.stderr)
