"""Every hostile input ends in one clear line and its exit code; nothing runs, nothing is written elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.bad_inputs.cases import CASES, Case
from tests.e2e.bad_inputs.runner import MAX_MEMORY_BYTES, MAX_SECONDS, Runner, environment, warm_runner
from tests.e2e.bad_inputs.sandbox import Sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory and threads are read from /proc")


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with warm_runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def good_run(
    runner: Runner, tiny_llama_dir: Path, bfs512_sample_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of one step, whose adapter and checkpoint the cases damage copies of."""
    directory = tmp_path_factory.mktemp("good")
    outcome = runner.run(
        ["fit", "--config", "balanced.yaml", f"--model.base_model={tiny_llama_dir}", "--trainer.max_steps=1",
         f"--data.train_path={bfs512_sample_path}", "--data.max_length=1200", "--trainer.accelerator=cpu",
         "--trainer.limit_val_batches=1", "--data.batch_size=2", "--play.final_games=0"], directory
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert not outcome.forbidden
    (run_dir,) = directory.glob("logs/extensions/models/*/*/snake_reasoning")
    return run_dir


@pytest.fixture
def sandbox(
    good_run: Path, tiny_llama_dir: Path, bfs512_sample_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Sandbox:
    # A path that holds the case's name would be taken for its message.
    root = tmp_path_factory.mktemp("case") / "sandbox"
    root.mkdir()
    return Sandbox(
        root=root,
        base=tiny_llama_dir,
        rows=bfs512_sample_path,
        good_adapter=good_run / "lora_adapters" / "model_artifacts",
        good_checkpoint=good_run / "checkpoints" / "last.ckpt",
    )


def tree(*directories: Path, without: Path) -> dict[str, tuple[int, int]]:
    """Every path under some directories save one, with size and time of change."""
    found = {}
    for directory in directories:
        for path, inner, names in os.walk(directory):
            inner[:] = [name for name in inner if Path(path, name) != without]
            for name in [*names, *inner]:
                status = os.lstat(os.path.join(path, name))
                found[os.path.join(path, name)] = status.st_size, status.st_mtime_ns
    return found


def said_last(case: Case, code: int, out: str, err: str) -> str:
    """What the user is left with, after it was found to be of the form that every message has."""
    assert code == case.code, err
    assert "Traceback" not in out + err
    if not case.code:
        return out
    lines = err.splitlines()
    (begin,) = (number for number, line in enumerate(lines) if line.startswith("error: "))
    said = "\n".join(lines[begin:])
    assert len(said) < 12_000
    assert said.replace("\n", "").isprintable()
    return said


def test_the_corpus_is_as_large_as_promised() -> None:
    assert len(CASES) >= 120
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Case, sandbox: Sandbox, runner: Runner, good_run: Path) -> None:
    arguments = case.build(sandbox)
    elsewhere = (good_run, sandbox.base, sandbox.rows.parent, sandbox.root.parent)
    before = tree(*elsewhere, without=sandbox.root)
    outcome = runner.run(arguments, sandbox.root)
    assert outcome.seconds < MAX_SECONDS
    assert case.message in said_last(case, outcome.code, outcome.out, outcome.err)
    assert outcome.memory_bytes < MAX_MEMORY_BYTES
    assert not outcome.forbidden
    assert not sandbox.canary.exists()
    assert tree(*elsewhere, without=sandbox.root) == before


ROUGH = ("row: nested 100,000 deep", "file: an endless device", "config: not UTF-8", "flag: --data.batch_size=0")


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ROUGH], ids=lambda case: case.name)
def test_bad_input_of_the_real_command(case: Case, sandbox: Sandbox) -> None:
    arguments = case.build(sandbox)
    done = subprocess.run(
        [sys.executable, "-m", "snake_lora_pl", *arguments], capture_output=True, text=True, timeout=60,
        cwd=sandbox.root, env={**os.environ, **environment(sandbox.root)}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert case.message in said_last(case, done.returncode, done.stdout, done.stderr)
