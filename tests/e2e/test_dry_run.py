"""``fit --dry_run``: all that can be known before a run, and nothing left behind."""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from snake_lora_pl.__main__ import main
from snake_lora_pl.cli import dry_run
from tests.small_run import small_run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def flags(tiny_llama_dir: Path, bfs512_sample_path: Path) -> list[str]:
    return small_run(tiny_llama_dir, bfs512_sample_path, "--data.max_length=1200")


@pytest.fixture
def rehearse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, str]]:
    """Run a dry run in an empty directory with an empty cache; return its sections by title."""
    work, cache, temporary = (tmp_path / name for name in ("work", "cache", "temporary"))
    for directory in (work, cache, temporary):
        directory.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("SNAKE_LORA_PL_CACHE", str(cache))
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", None)

    def run(*arguments: str, code: int = 0) -> dict[str, str]:
        assert main(["fit", "--config", "balanced.yaml", *arguments, "--dry_run"]) == code
        for directory in (work, cache, temporary):
            assert not list(directory.iterdir()), f"something was written to {directory.name}"
        output = capfd.readouterr()
        titles = "config|data|memory|one step|files|Nothing was written.*"
        parts = re.split(rf"^({titles})\n", output.out, flags=re.MULTILINE)
        sections = dict(zip(parts[1::2], parts[2::2], strict=True))
        return {**sections, "errors": output.err}

    return run


def test_it_tells_all_that_can_be_known_and_writes_nothing(
    rehearse: Callable[..., dict[str, str]],
    flags: list[str],
    bfs512_sample_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    told = rehearse(*flags, "--model.lora.rank=4", "--trainer.accumulate_grad_batches=3")

    resolved = yaml.safe_load(told["config"])
    assert resolved["model"]["lora"]["rank"] == 4
    assert resolved["trainer"]["max_epochs"] == 100
    assert resolved["trainer"]["accumulate_grad_batches"] == 3

    rows = [json.loads(line) for line in bfs512_sample_path.read_text().splitlines()]
    assert f"rows                     {len(rows)} ({len(rows)} on 10x10)" in told["data"]
    assert "illegal moves            0" in told["data"]
    _, *previews = re.split(r"^(?=.*, [\d,]+ tokens; trained on)", told["data"], flags=re.MULTILINE)
    assert len(previews) == 2
    for preview in previews:
        head, _, text = preview.partition("\n")
        prompt, trained_on = text.strip().removesuffix("]]").split("[[Moving")
        source, num_tokens = re.match(r"(.*), ([\d,]+) tokens", head).groups()  # type: ignore[union-attr]
        row = rows[int(source.removeprefix(f"{bfs512_sample_path}:")) - 1]
        assert prompt == f"### Instruction:\n{row['prompt']}\n\n### Response:\n"
        assert trained_on.endswith(row["completion"].splitlines()[-1] + "<|im_end|>")
        assert int(num_tokens.replace(",", "")) <= 1200

    assert float(re.search(r"([\d.]+) GiB at the peak, estimated for cpu", told["memory"])[1]) > 0.1  # type: ignore[index]
    assert "for the 4 longest rows as a batch" in told["memory"]

    assert re.search(r"loss \d+\.\d+ on [\d,]+ target tokens, gradient norm \d", told["one step"])
    num_batches = int(re.search(r"an epoch has (\d+) steps of 3 such batches", told["one step"])[1])  # type: ignore[index]
    num_train_rows = int(re.search(r"data: (\d+) rows", caplog.text)[1])  # type: ignore[index]
    assert num_batches == math.ceil(math.ceil(num_train_rows / 4) / 3)

    place = "logs/extensions/models/grid-size-10/llm_finetune_v0.03_"
    assert f"run              {place}" in told["files"]
    assert "snake_reasoning/lora_adapters/model_artifacts" in told["files"]


def test_generated_rows_are_looked_at_too(rehearse: Callable[..., dict[str, str]], flags: list[str]) -> None:
    without = [flag for flag in flags if "train_path" not in flag]
    told = rehearse(*without, "--data.generated_games=100", "--data.generated_style=compact", "--data.grid_size=5")
    assert "50 games" not in told["config"]
    assert yaml.safe_load(told["config"])["data"]["generated_games"] == 100
    assert re.search(r"the first [\d,]+ rows, 50.0% of all", told["data"])
    assert "[[" in told["data"]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_of_a_large_file_the_beginning_is_looked_at_and_the_epoch_is_that_of_all(
    rehearse: Callable[..., dict[str, str]], flags: list[str], bfs512_sample_path: Path, tmp_path: Path, suffix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(dry_run, "MAX_ROWS", 100)
    content = bfs512_sample_path.read_bytes() * 3
    large = tmp_path / f"large{suffix}"
    large.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    told = rehearse(*flags, f"--data.train_path={large}")
    assert f"the first 100 rows, {100 / (3 * 354):.1%} of all" in told["data"]
    num_steps = int(re.search(r"an epoch has (\d+) steps", told["one step"])[1])  # type: ignore[index]
    assert num_steps == pytest.approx(3 * 354 * 0.9 / 4, rel=0.4)


@pytest.mark.parametrize("kind", ["qlora", "adalora"])
def test_every_kind_takes_its_step(rehearse: Callable[..., dict[str, str]], flags: list[str], kind: str) -> None:
    told = rehearse(*flags, f"--model.adapter_type={kind}")
    assert "parameters trained" in told["one step"]
    assert "error" not in told["errors"]


@pytest.mark.parametrize(
    ("flag", "part"),
    [
        ("--model.lora.target_modules=[qproj]", "'qproj' matches no layer"),
        ("--data.max_length=40", "data.max_length"),
        ("--data.train_path=nowhere.jsonl", "nowhere.jsonl"),
        ("--model.base_model=nothing-like-it", "smollm2-135m"),
    ],
)
def test_what_would_end_the_run_ends_the_dry_run(
    rehearse: Callable[..., dict[str, str]], flags: list[str], flag: str, part: str
) -> None:
    told = rehearse(*flags, flag, code=2)
    assert part in told["errors"]
    assert "Traceback" not in told["errors"]


def test_other_verbs_have_none(flags: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--config", "balanced.yaml", *flags, "--dry_run"]) == 2
    assert "--dry_run is for fit" in capfd.readouterr().err


def test_loggers_callbacks_and_validation_of_the_run_are_left_out(
    rehearse: Callable[..., dict[str, str]], flags: list[str]
) -> None:
    told = rehearse(
        *flags, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=written", "--play.val_games=2",
        "--trainer.fast_dev_run=false", "--trainer.profiler=simple",
    )  # fmt: skip
    assert "one step" in told
