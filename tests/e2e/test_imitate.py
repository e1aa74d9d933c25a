"""Imitation through the command line: rounds, exact resume, and several ranks."""

from __future__ import annotations

import csv
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.run_comparison import differences
from snake_lora_pl.__main__ import main
from snake_lora_pl.data.generated_rows import write_dataset
from snake_lora_pl.game import STYLES, read_move
from snake_lora_pl.game.seeds import FIRST_PLAY_SEED, GAMES_PER_SEED
from snake_lora_pl.imitation.callback import Imitation
from snake_lora_pl.paths import RunPaths
from tests.ranks import Prepare, record_collectives, run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

RUN_PATTERN = "logs/extensions/models/grid-size-5/llm_finetune_v0.03_*/snake_reasoning"

# Rounds after steps 4 and 8; validations after steps 5 and 10; checkpoints after every third step.
FLAGS = [
    "--data.batch_size=4",
    "--data.val_fraction=0.2",
    "--model.dtype=float32",
    "--model.lora.dropout=0.3",
    "--model.max_new_tokens=2",
    "--trainer.limit_val_batches=1",
    "--trainer.val_check_interval=5",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.max_steps=11",
    "--checkpoint.save_every_n_steps=3",
    "--checkpoint.save_top_k=9",
    "--num_sample_rows=0",
    "--play.teacher=safe_greedy",
    "--play.reading=score",
    "--imitate.every_n_steps=4",
    "--imitate.num_games=3",
    "--imitate.max_states=24",
    "--imitate.rows_share=0.5",
]


@pytest.fixture(scope="module")
def rows_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_dataset(path, 8, 5, "safe_greedy", "compact", 0)
    return path


Fit = Callable[..., RunPaths]


@pytest.fixture(scope="module")
def fit(tiny_llama_dir: Path, rows_path: Path) -> Fit:
    """Run ``fit`` with a root directory and return its only run."""

    def run(root: Path, *flags: str, code: int = 0) -> RunPaths | None:
        base = ["fit", "--config=balanced.yaml", "--config=imitate.yaml", f"--root={root}", *FLAGS]
        base += [f"--model.base_model={tiny_llama_dir}", f"--data.train_path={rows_path}"]
        assert main([*base, *flags]) == code
        return next((RunPaths(run_dir) for run_dir in root.glob(RUN_PATTERN)), None)

    return run


@pytest.fixture(scope="module")
def straight(fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    return fit(tmp_path_factory.mktemp("straight"))


def read_metrics(run: RunPaths) -> list[dict[str, str]]:
    with open(run.metrics_path, newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def read_rounds(run: RunPaths) -> list[str]:
    return [path.read_text() for path in sorted(run.rounds_dir.iterdir())]


def test_each_round_writes_rows_and_metrics(straight: RunPaths) -> None:
    rounds = read_rounds(straight)
    assert len(rounds) == 2
    logged = [row for row in read_metrics(straight) if "imitate/rows_added" in row]
    assert [row["step"] for row in logged] == ["3", "7"]
    for content, metrics in zip(rounds, logged, strict=True):
        rows = [json.loads(line) for line in content.splitlines()]
        assert len(rows) == float(metrics["imitate/rows_added"]) > 0
        assert {"imitate/apples_mean", "imitate/fatal_move_rate", "imitate/disagreement_rate"} < metrics.keys()
        assert all(GAMES_PER_SEED <= row["seed"] < FIRST_PLAY_SEED for row in rows)


def test_rows_of_rounds_change_training(fit: Fit, straight: RunPaths, tmp_path: Path) -> None:
    without = fit(tmp_path, "--imitate.every_n_steps=0")
    losses, others = ([r["train/loss"] for r in read_metrics(run) if "train/loss" in r] for run in (straight, without))
    assert losses[:4] == others[:4]
    assert losses[4:] != others[4:]


@pytest.mark.parametrize("flags", [[], ["--data.num_workers=1"]], ids=["no-workers", "workers"])
def test_run_resumes_exactly_from_each_checkpoint(
    fit: Fit, straight: RunPaths, tmp_path: Path, flags: list[str]
) -> None:
    names = sorted(path.name for path in straight.checkpoints_dir.iterdir())
    assert len(names) >= 3
    for name in names:
        root = tmp_path / name
        shutil.copytree(straight.run_dir.parents[5], root)
        (run_dir,) = root.glob(RUN_PATTERN)
        resumed = fit(root, *flags, f"--ckpt_path={run_dir / 'checkpoints' / name}")
        assert differences(straight.run_dir, resumed.run_dir) == []
        assert read_rounds(resumed) == read_rounds(straight)


def test_run_with_accumulated_batches_resumes_exactly(fit: Fit, tmp_path: Path) -> None:
    # Epochs of 9 batches, so that rounds follow full and partial steps of several epochs.
    flags = ["--trainer.accumulate_grad_batches=2", "--trainer.limit_train_batches=9", "--trainer.val_check_interval=9"]
    straight = fit(tmp_path / "straight", *flags)
    for path in straight.checkpoints_dir.iterdir():
        root = tmp_path / path.name
        shutil.copytree(tmp_path / "straight", root)
        (run_dir,) = root.glob(RUN_PATTERN)
        resumed = fit(root, *flags, f"--ckpt_path={run_dir / 'checkpoints' / path.name}")
        # Lightning's counts within an epoch, which nothing reads, restart if a run resumes at the end of an epoch.
        found = differences(straight.run_dir, resumed.run_dir)
        assert [difference for difference in found if " > current > " not in difference] == []
        assert read_rounds(resumed) == read_rounds(straight)
    assert len(read_rounds(straight)) == 2


class Killed(BaseException):
    """Simulates that the process is killed."""


@pytest.mark.parametrize("hook", ["_visit", "_add"])
def test_run_killed_in_a_round_plays_it_again(
    fit: Fit, straight: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: str
) -> None:
    run_hook = getattr(Imitation, hook)

    def kill(self: Imitation, *args: object) -> object:
        if len(self._rounds) >= 1 and self.run.round_path(0).exists():
            raise Killed
        return run_hook(self, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Imitation, hook, kill)
        fit(tmp_path)
    run = fit(tmp_path, "--ckpt_path=last")
    assert differences(straight.run_dir, run.run_dir) == []
    assert read_rounds(run) == read_rounds(straight)


def test_missing_round_is_a_one_line_error(
    fit: Fit, straight: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(straight.run_dir.parents[5], tmp_path, dirs_exist_ok=True)
    (run_dir,) = tmp_path.glob(RUN_PATTERN)
    RunPaths(run_dir).round_path(0).unlink()
    fit(tmp_path, "--ckpt_path=last", "--trainer.max_steps=13", code=2)
    error = capsys.readouterr().err
    assert "rounds/000.jsonl" in error
    assert "Traceback" not in error


def test_settings_that_do_not_fit_the_rows_are_one_line_errors(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"{number} and 1", "completion": f"{number + 1}", "game": number} for number in range(9)]
    unknown_style = tmp_path / "rows.jsonl"
    unknown_style.write_text("".join(json.dumps(row) + "\n" for row in rows))
    generated = ["--data.train_path=null", "--data.generated_games=2", "--imitate.seed=0"]
    for flags, key in [([f"--data.train_path={unknown_style}"], "play.style"), (generated, "imitate.seed")]:
        fit(tmp_path / "root", *flags, code=2)
        error = capsys.readouterr().err
        assert key in error
        assert "Traceback" not in error


@pytest.mark.parametrize(
    ("style", "reading"), [("features", "score"), ("bfs-512", "generate"), ("bfs-4096", "generate")]
)
def test_rounds_have_the_style_of_the_training_rows(fit: Fit, tmp_path: Path, style: str, reading: str) -> None:
    rows_path = tmp_path / "rows.jsonl"
    write_dataset(rows_path, 4, 5, "bfs", style, 0)
    flags = [f"--data.train_path={rows_path}", f"--play.reading={reading}", "--data.max_length=1024"]
    flags += ["--imitate.teacher=hamiltonian_shortcuts", "--imitate.warm_starts=1", "--trainer.max_steps=5"]
    run = fit(tmp_path, *flags)
    (content,) = read_rounds(run)
    rows = [json.loads(line) for line in content.splitlines()]
    assert rows
    for row in rows:
        assert STYLES[style].read_state(row["prompt"]) is not None
        assert read_move(row["completion"]) is not None


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("num_games", [3, 1], ids=["unequal-shares", "a-rank-without-games"])
def test_two_ranks_equal_one_process_and_resume_exactly(
    tiny_llama_dir: Path, rows_path: Path, tmp_path: Path, num_games: int
) -> None:
    flags = [f"--model.base_model={tiny_llama_dir}", f"--data.train_path={rows_path}", "--model.lora.dropout=0"]
    flags += ["--play.final_games=0", f"--imitate.num_games={num_games}"]
    two = ["--config=ddp.yaml", "--trainer.devices=2", "--data.batch_size=2"]
    records = tmp_path / "records"
    records.mkdir()

    def run(root: Path, *more: str, num_ranks: int = 2, prepare: Prepare | None = None) -> RunPaths:
        command = ["fit", "--config=balanced.yaml", "--config=imitate.yaml", f"--root={root}", *FLAGS, *flags, *more]
        run_ranks(root, command, num_ranks, prepare)
        (run_dir,) = root.glob(RUN_PATTERN)
        return RunPaths(run_dir)

    single = run(tmp_path / "single", num_ranks=1)
    pair = run(tmp_path / "pair", *two, prepare=functools.partial(record_collectives, directory=records))
    assert read_rounds(pair) == read_rounds(single)
    for row, other in zip(read_metrics(pair), read_metrics(single), strict=True):
        for metric in row.keys() & other.keys():
            if metric.startswith(("train/loss", "imitate/", "val/loss")):
                assert float(row[metric]) == pytest.approx(float(other[metric]), rel=1e-4)
    first, second = ((records / str(rank)).read_text() for rank in range(2))
    assert first == second

    shutil.copytree(tmp_path / "pair", tmp_path / "resumed")
    (run_dir,) = (tmp_path / "resumed").glob(RUN_PATTERN)
    checkpoint = min((run_dir / "checkpoints").glob("epoch*.ckpt"), key=lambda path: int(path.stem.split("=")[-1]))
    resumed = run(tmp_path / "resumed", *two, f"--ckpt_path={checkpoint}")
    assert differences(pair.run_dir, resumed.run_dir) == []
    assert read_rounds(resumed) == read_rounds(pair)
