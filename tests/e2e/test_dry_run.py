"""``fit --dry_run``: what is known before a run, without writing anything."""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import snake_lora_pl.cli.dry_run
from snake_lora_pl.__main__ import main
from tests.small_run import small_run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def flags(tiny_llama_dir: Path, bfs512_sample_path: Path) -> list[str]:
    return small_run(tiny_llama_dir, bfs512_sample_path, "--data.max_length=1200")


@pytest.fixture
def dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, str]]:
    """Make a dry run in an empty directory with an empty cache; return its output by section."""
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
            assert not list(directory.iterdir()), f"{directory.name} is not empty"
        output = capfd.readouterr()
        titles = "config|data|memory|one step|files|Nothing was written.*"
        parts = re.split(rf"^({titles})\n", output.out, flags=re.MULTILINE)
        return {**dict(zip(parts[1::2], parts[2::2], strict=True)), "errors": output.err}

    return run


def test_dry_run_prints_config_data_memory_step_and_files(
    dry_run: Callable[..., dict[str, str]],
    flags: list[str],
    bfs512_sample_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sections = dry_run(*flags, "--model.lora.rank=4", "--trainer.accumulate_grad_batches=3")

    resolved = yaml.safe_load(sections["config"])
    assert resolved["model"]["lora"]["rank"] == 4
    assert resolved["trainer"]["max_epochs"] == 100
    assert resolved["trainer"]["accumulate_grad_batches"] == 3

    rows = [json.loads(line) for line in bfs512_sample_path.read_text().splitlines()]
    assert f"rows                     {len(rows)} ({len(rows)} on 10x10)" in sections["data"]
    assert "illegal moves            0" in sections["data"]
    _, *previews = re.split(r"^(?=.*, [\d,]+ tokens; )", sections["data"], flags=re.MULTILINE)
    assert len(previews) == 2
    for preview in previews:
        title, _, text = preview.partition("\n")
        prompt, trained_on = text.strip().removesuffix("]]").split("[[Moving")
        source, num_tokens = re.match(r"(.*), ([\d,]+) tokens", title).groups()  # type: ignore[union-attr]
        row = rows[int(source.removeprefix(f"{bfs512_sample_path}:")) - 1]
        assert prompt == f"### Instruction:\n{row['prompt']}\n\n### Response:\n"
        assert trained_on.endswith(row["completion"].splitlines()[-1] + "<|im_end|>")
        assert int(num_tokens.replace(",", "")) <= 1200

    assert float(re.search(r"([\d.]+) GiB at the peak, estimated for cpu", sections["memory"])[1]) > 0.1  # type: ignore[index]
    assert "for the 4 longest rows as a batch" in sections["memory"]

    assert re.search(r"loss \d+\.\d+ on [\d,]+ target tokens, gradient norm \d", sections["one step"])
    num_batches = int(re.search(r"an epoch has (\d+) steps of 3 such batches", sections["one step"])[1])  # type: ignore[index]
    num_train_rows = int(re.search(r"data: (\d+) rows", caplog.text)[1])  # type: ignore[index]
    assert num_batches == math.ceil(math.ceil(num_train_rows / 4) / 3)

    place = "logs/extensions/models/grid-size-10/llm_finetune_v0.03_"
    assert f"run              {place}" in sections["files"]
    assert "snake_reasoning/lora_adapters/model_artifacts" in sections["files"]


def test_generated_rows_are_described(dry_run: Callable[..., dict[str, str]], flags: list[str]) -> None:
    without = [flag for flag in flags if "train_path" not in flag]
    sections = dry_run(*without, "--data.generated_games=100", "--data.generated_style=compact", "--data.grid_size=5")
    assert "50 games" not in sections["config"]
    assert yaml.safe_load(sections["config"])["data"]["generated_games"] == 100
    assert re.search(r"the first [\d,]+ rows, 50.0% of all", sections["data"])
    assert "[[" in sections["data"]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_large_file_is_sampled_and_its_epoch_is_extrapolated(
    dry_run: Callable[..., dict[str, str]], flags: list[str], bfs512_sample_path: Path, tmp_path: Path, suffix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(snake_lora_pl.cli.dry_run, "MAX_ROWS", 100)
    content = bfs512_sample_path.read_bytes() * 3
    large = tmp_path / f"large{suffix}"
    large.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    sections = dry_run(*flags, f"--data.train_path={large}")
    assert f"the first 100 rows, {100 / (3 * 354):.1%} of all" in sections["data"]
    num_steps = int(re.search(r"an epoch has (\d+) steps", sections["one step"])[1])  # type: ignore[index]
    assert num_steps == pytest.approx(3 * 354 * 0.9 / 4, rel=0.4)


@pytest.mark.parametrize("adapter_type", ["qlora", "adalora", "miss", "shira"])
def test_every_adapter_type_makes_a_step(
    dry_run: Callable[..., dict[str, str]], flags: list[str], adapter_type: str
) -> None:
    sections = dry_run(*flags, f"--model.adapter_type={adapter_type}", "--model.lora.rank=4")
    assert "parameters trained" in sections["one step"]
    assert "error" not in sections["errors"]


@pytest.mark.parametrize(
    ("flag", "part"),
    [
        ("--model.lora.target_modules=[qproj]", "'qproj'"),
        ("--data.max_length=40", "data.max_length"),
        ("--data.train_path=nowhere.jsonl", "nowhere.jsonl"),
        ("--model.base_model=nothing-like-it", "smollm2-135m"),
    ],
)
def test_error_of_the_run_is_an_error_of_the_dry_run(
    dry_run: Callable[..., dict[str, str]], flags: list[str], flag: str, part: str
) -> None:
    sections = dry_run(*flags, flag, code=2)
    assert part in sections["errors"]
    assert "Traceback" not in sections["errors"]


def test_dry_run_is_refused_by_other_commands(flags: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--config", "balanced.yaml", *flags, "--dry_run"]) == 2
    assert "--dry_run" in capfd.readouterr().err


def test_dry_run_uses_no_loggers_callbacks_or_validation(
    dry_run: Callable[..., dict[str, str]], flags: list[str]
) -> None:
    sections = dry_run(
        *flags, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=written", "--play.val_games=2",
        "--trainer.fast_dev_run=false", "--trainer.profiler=simple",
    )  # fmt: skip
    assert "one step" in sections
