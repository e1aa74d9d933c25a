"""The training commands, in this process, with the tiny model."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from snake_lora_pl.__main__ import main
from snake_lora_pl.adapters import store
from snake_lora_pl.paths import RunPaths, shipped_configs
from snake_lora_pl.program import LIGHT_COMMANDS, LIGHTNING_COMMANDS
from tests.conftest import SAMPLE_DIR
from tests.small_run import small_run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

RUN_PATTERN = "logs/extensions/models/grid-size-10/llm_finetune_v0.03_*/snake_reasoning"


@pytest.fixture(scope="module")
def flags(tiny_llama_dir: Path, bfs512_sample_path: Path) -> list[str]:
    """Options of a small run."""
    return small_run(tiny_llama_dir, bfs512_sample_path, "--data.max_length=1200")


@pytest.fixture(scope="module")
def finished_run(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The working directory of a finished fit of three steps, and its output."""
    import contextlib
    import io

    directory = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setenv("SNAKE_LORA_PL_CACHE", str(directory / "cache"))
        patch.chdir(directory)
        code = main(
            ["fit", "--config", "balanced.yaml", "--config", "quickstart.yaml", *flags, "--trainer.max_steps=3"]
        )
    assert code == 0
    return directory, out.getvalue()


@pytest.fixture
def run_dir(finished_run: tuple[Path, str]) -> Path:
    (run_dir,) = finished_run[0].glob(RUN_PATTERN)
    return run_dir


@pytest.fixture
def adapter_dir(run_dir: Path) -> Path:
    return RunPaths(run_dir).artifacts_dir


@pytest.fixture
def expect_user_error(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Run a command that must end with a user error; return its one line."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        code = main(list(arguments))
        output = capfd.readouterr()
        _, *errors = re.split(r"^(?=error: )", output.err, flags=re.MULTILINE)
        assert code == 2, output
        assert "Traceback" not in output.err
        assert len(errors) == 1, output.err
        assert not list(tmp_path.glob("logs/**/checkpoints")), "a failed start wrote a checkpoint"
        return errors[0].strip()

    return run


def test_fit_writes_the_files_of_a_run(run_dir: Path) -> None:
    names = {str(p.relative_to(run_dir)) for p in run_dir.rglob("*") if p.is_file()}
    artifacts = "lora_adapters/model_artifacts"
    assert {
        "config.yaml",
        "metrics.csv",
        "checkpoints/last.ckpt",
        f"{artifacts}/adapter_model.safetensors",
        f"{artifacts}/adapter_config.json",
        f"{artifacts}/adapter_metadata.json",
        f"{artifacts}/tokenizer.json",
        f"{artifacts}/README.md",
    } <= names


def test_fit_ends_with_the_run_directory_and_the_next_command(
    finished_run: tuple[Path, str], run_dir: Path, adapter_dir: Path, tiny_llama_dir: Path
) -> None:
    directory, printed = finished_run
    last = printed.strip().splitlines()[-1]
    adapter = adapter_dir.relative_to(directory)
    assert str(run_dir.relative_to(directory)) in last
    assert last.endswith(
        "python -m snake_lora_pl test --config balanced.yaml --config quickstart.yaml "
        f"--model.base_model {tiny_llama_dir} --adapter {adapter}"
    )


def test_metadata_describes_the_training(adapter_dir: Path, tiny_llama_dir: Path) -> None:
    metadata = json.loads((adapter_dir / store.METADATA_FILE).read_text())
    assert metadata["adapter_type"] == "lora"
    assert metadata["base_model"] == str(tiny_llama_dir)
    assert metadata["grid_size"] == 10
    assert metadata["step"] == 3
    assert metadata["peft_config"]["r"] == 16
    assert metadata["data"]["prompt_format"] == "bfs-512"
    assert metadata["data"]["template"] == "instruction"
    assert metadata["data"]["num_games"] == 4
    assert set(metadata["data"]) >= {"data_hash", "split_hash"}
    assert metadata["metrics"]["val/loss"] > 0


def test_metrics_file_holds_every_teacher_forced_metric(run_dir: Path) -> None:
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    logged = {name for row in rows for name, value in row.items() if value}
    assert {
        "train/loss", "val/loss", "val/perplexity", "val/token_accuracy", "val/exact_match", "val/move_accuracy",
        "val/decision_accuracy", "val/legal_move_rate", "perf/tokens_per_second", "perf/target_tokens_per_second",
        "perf/peak_memory_gib",
    } <= logged  # fmt: skip
    assert [row["step"] for row in rows if row["train/loss"]] == ["0", "1", "2"]


def test_saved_config_is_resolved_and_can_be_run_again(run_dir: Path, flags: list[str], tmp_path: Path) -> None:
    saved = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert saved["model"]["lora"]["rank"] == 16
    assert (
        saved["model"]["learning_rate"]
        == yaml.safe_load(shipped_configs()["quickstart.yaml"].read_text())["model"]["learning_rate"]
    )
    again = ["fit", "--config", str(run_dir / "config.yaml"), f"--root={tmp_path}"]
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    assert main([*again, "--trainer.max_steps=1"]) == 0
    (new_run_dir,) = tmp_path.glob(RUN_PATTERN)
    assert RunPaths(new_run_dir).last_checkpoint_path.is_file()
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


@pytest.mark.parametrize("command", LIGHTNING_COMMANDS)
def test_saved_config_is_valid_for_every_command(
    command: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_path = run_dir / "config.yaml"
    # A checkpoint belongs to one run; it is not a setting.
    assert "ckpt_path" not in yaml.safe_load(config_path.read_text())
    with pytest.raises(SystemExit, match="0"):
        main([command, "--config", str(config_path), "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["lora"]["rank"] == 16


def test_flags_override_configs_and_later_configs_override_earlier_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("model: {lora: {rank: 3}, learning_rate: 0.5}")
    arguments = ["fit", "--config", "balanced.yaml", "--config", str(tmp_path / "mine.yaml"), "--print_config"]
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--model.learning_rate", "0.25"])
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert resolved["model"]["lora"] == {**resolved["model"]["lora"], "rank": 3, "alpha": 32}
    assert resolved["model"]["learning_rate"] == 0.25
    assert resolved["trainer"]["max_epochs"] == 100


def test_dashboard_configs_compose(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config=balanced.yaml", "--config=wandb.yaml", "--config=tensorboard.yaml", "--print_config"])
    loggers = yaml.safe_load(capsys.readouterr().out)["trainer"]["logger"]
    names = [run_logger["class_path"].rpartition(".")[2] for run_logger in loggers]
    assert names == ["RunWandbLogger", "RunTensorBoardLogger"]


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_config_opens_with_the_command_that_runs_it(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first_line = shipped_configs()[name].read_text().splitlines()[0]
    command = first_line.removeprefix("# python -m snake_lora_pl ").split()
    assert first_line != " ".join(command)
    assert name in command
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["adapter_type"]


def test_last_resumes_the_newest_run_in_its_own_directory(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fit = ["fit", "--config", "balanced.yaml", *flags]
    assert main([*fit, "--trainer.max_steps=2"]) == 0
    assert main([*fit, "--trainer.max_steps=4", "--ckpt_path=last"]) == 0
    (run_dir,) = tmp_path.glob(RUN_PATTERN)
    with open(run_dir / "metrics.csv", newline="") as file:
        steps = [row["step"] for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == ["0", "1", "2", "3"]
    assert store.read_metadata(RunPaths(run_dir).artifacts_dir).step >= 2


def test_auto_batch_size_is_resolved_once_per_run(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("snake_lora_pl.training.callbacks.auto_batch_size.available_bytes", lambda device: 2**30)
    command = ["fit", "--config=balanced.yaml", "--config=quickstart.yaml", *flags, "--data.batch_size=auto"]
    assert main([*command, "--trainer.max_steps=1", "--trainer.limit_val_batches=0"]) == 0
    (config_path,) = tmp_path.glob(f"{RUN_PATTERN}/config.yaml")
    found = yaml.safe_load(config_path.read_text())["data"]["batch_size"]
    assert 8 < found < 300

    monkeypatch.setattr("snake_lora_pl.training.callbacks.auto_batch_size.available_bytes", lambda device: 2**34)
    assert main([*command, "--trainer.max_steps=2", "--trainer.limit_val_batches=0", "--ckpt_path=last"]) == 0
    assert yaml.safe_load(config_path.read_text())["data"]["batch_size"] == found


def test_out_of_memory_suggests_smaller_settings(
    expect_user_error: Callable[..., str], flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Simulated, because the memory that earlier tests left to this process is unknown.
    def refuse(*arguments: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr("snake_lora_pl.training.module.LoRALightningModule.on_train_batch_start", refuse)
    monkeypatch.setattr("snake_lora_pl.training.memory.out_of_memory.available_bytes", lambda device: 2**30)
    line = expect_user_error("fit", "--config=balanced.yaml", *flags, "--data.batch_size=128", "--trainer.max_steps=1")
    assert re.search(r"[\d.]+ GiB.*--data\.batch_size=64 --trainer\.accumulate_grad_batches=2", line)


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_missing_dashboard_package_names_its_extra(
    expect_user_error: Callable[..., str], flags: list[str], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    line = expect_user_error("fit", "--config=balanced.yaml", f"--config={package}.yaml", *flags)
    assert f"pip install 'snake_lora_pl[{package}]'" in line


def test_runs_that_start_in_the_same_second_get_two_directories(tmp_path: Path) -> None:
    runs = {RunPaths.claim(tmp_path, 10, "a").run_dir for _ in range(2)}
    assert len(runs) == 2


def test_validation_uses_the_split_of_the_run(
    adapter_dir: Path, flags: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    arguments = ["validate", "--config", "balanced.yaml", "--config", "quickstart.yaml", *flags]
    assert main([*arguments, "--adapter", str(adapter_dir)]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("val/"))
    metadata = store.read_metadata(adapter_dir)
    assert float(printed["val/loss"]) == pytest.approx(metadata.metrics["val/loss"], rel=1e-4)
    assert not (tmp_path / "logs").exists()


def test_validation_on_another_split_logs_a_warning(
    adapter_dir: Path, flags: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["validate", "--config", "balanced.yaml", *flags, "--adapter", str(adapter_dir)]
    for seed, warns in (("0", False), ("1", True)):
        caplog.clear()
        assert main([*arguments, f"--data.seed={seed}"]) == 0
        assert any("may have been trained on" in message for message in caplog.messages) == warns


def test_failed_start_leaves_no_run_directory(expect_user_error: Callable[..., str], tmp_path: Path) -> None:
    expect_user_error(
        "fit", "--config", "balanced.yaml", "--model.base_model=nothing-like-it", "--data.generated_games=1"
    )
    assert not (tmp_path / "logs").exists()


def test_predict_writes_a_completion_for_each_prompt(
    adapter_dir: Path, flags: list[str], bfs512_sample_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [json.loads(line) for line in bfs512_sample_path.read_text().splitlines()[:5]]
    prompts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    arguments = ["predict", "--config", "balanced.yaml", *flags, "--adapter", str(adapter_dir)]
    assert main([*arguments, f"--data.predict_path={prompts}"]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    path = Path(re.fullmatch(r"5 completions written to (.*)", last).group(1))  # type: ignore[union-attr]
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["prompt"] for row in written] == [row["prompt"] for row in rows]
    assert [row["source"] for row in written] == [f"{prompts}:{i}" for i in range(1, 6)]
    assert all(isinstance(row["completion"], str) for row in written)


def test_rows_are_generated_and_logged_when_train_path_is_not_set(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SNAKE_LORA_PL_CACHE", str(tmp_path / "cache"))
    without = [flag for flag in flags if "train_path" not in flag]
    arguments = ["fit", "--config", "balanced.yaml", *without, "--trainer.max_steps=1", "--data.generated_games=3"]
    with caplog.at_level("INFO", logger="snake_lora_pl"):
        assert main([*arguments, "--data.on_overflow=drop"]) == 0
    (path,) = (tmp_path / "cache").rglob("*.jsonl")
    assert any(str(path) in message for message in caplog.messages)
    assert "bfs-512" in str(path)


@pytest.mark.parametrize("path", sorted(SAMPLE_DIR.glob("*/*/*.jsonl")), ids=lambda path: path.parent.name)
def test_original_rows_of_every_style_train_unchanged(
    path: Path, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "--config", "balanced.yaml", *flags, f"--data.train_path={path}", "--trainer.max_steps=1"]
    assert main(arguments) == 0
    (run_dir,) = tmp_path.glob(f"logs/extensions/models/{path.parent.parent.name}/*/snake_reasoning")
    assert store.verify(RunPaths(run_dir).artifacts_dir).data["num_rows"] == len(path.read_text().splitlines())


def test_validation_without_rows_is_a_user_error(
    expect_user_error: Callable[..., str], flags: list[str], adapter_dir: Path
) -> None:
    (path,) = SAMPLE_DIR.glob("*/bfs-2048/*.jsonl")
    arguments = ["validate", "--config", "balanced.yaml", *flags, f"--data.train_path={path}"]
    assert "data.val_path" in expect_user_error(*arguments, "--adapter", str(adapter_dir))


def test_unknown_command_lists_the_commands_and_the_nearest(expect_user_error: Callable[..., str]) -> None:
    line = expect_user_error("fti")
    assert ", ".join([*LIGHTNING_COMMANDS, *LIGHT_COMMANDS]) in line
    assert line.endswith("'fit'?")


def test_unknown_config_lists_the_shipped_ones(expect_user_error: Callable[..., str]) -> None:
    message = expect_user_error("fit", "--config", "balnced.yaml")
    assert all(name in message for name in shipped_configs())
    assert message.endswith("'balanced.yaml'?")


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--model.learning_rte=1", "model.learning_rate"),
        ("--data.trainpath=x.jsonl", "data.train_path"),
        ("--model.lora.rnk=3", "model.lora.rank"),
        ("--trainer.max_step=3", "trainer.max_steps"),
    ],
)
def test_unknown_flag_names_the_nearest(expect_user_error: Callable[..., str], flag: str, nearest: str) -> None:
    assert f"'{nearest}'" in expect_user_error("fit", "--config", "balanced.yaml", flag)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("model: {learning_rte: 1}", "learning_rate"),
        ("modle: {learning_rate: 1}", "model"),
        ("model: {lora: {rank: many}}", "rank"),
        ("model: [", "bad.yaml"),
        ("just text", "bad.yaml"),
    ],
)
def test_error_inside_a_config_is_one_line(
    expect_user_error: Callable[..., str], tmp_path: Path, content: str, part: str
) -> None:
    (tmp_path / "bad.yaml").write_text(content)
    assert part in expect_user_error("fit", "--config", "bad.yaml")


@pytest.mark.parametrize(
    ("flag", "part"),
    [
        ("--data.train_path=nowhere.jsonl", "nowhere.jsonl"),
        ("--model.lora.rank=0", "rank"),
        ("--model.lora.target_modules=[qproj]", "'qproj'"),
        ("--model.adapter_type=lorra", "adapter_type"),
        ("--model.learning_rate=-1", "model.learning_rate"),
        ("--model.base_model=nothing-like-it", "smollm2-135m"),
        ("--data.batch_size=0", "data.batch_size"),
        ("--data.val_fraction=2", "data.val_fraction"),
        ("--data.template=chatty", "data.template"),
        ("--data.max_length=40", "data.max_length"),
        ("--checkpoint.monitor=val/los", "checkpoint.monitor=val/los"),
        ("--ckpt_path=last", "'snake_reasoning'"),
        ("--ckpt_path=nowhere.ckpt", "nowhere.ckpt"),
        ("--adapter=nowhere", "--adapter nowhere"),
        ("--adapter_name=../up", "--adapter_name"),
        ("--trainer.devices=0", "devices"),
        ("--trainer.accelerator=gpu", "accelerator"),
        ("--model.dtype=float8", "float8"),
    ],
)
def test_invalid_value_is_one_line_that_names_it(
    expect_user_error: Callable[..., str], flags: list[str], flag: str, part: str
) -> None:
    assert part in expect_user_error("fit", "--config", "balanced.yaml", *flags, "--trainer.max_steps=1", flag)


def test_all_invalid_rows_are_listed(
    flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\nnot json\n')
    assert main(["fit", "--config", "balanced.yaml", *flags, f"--data.train_path={path}"]) == 2
    errors = capfd.readouterr().err
    assert f"{path}:2: " in errors
    assert f"{path}:3: " in errors
    assert "Traceback" not in errors


def test_adapter_of_another_base_is_refused(
    expect_user_error: Callable[..., str], adapter_dir: Path, flags: list[str], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(tiny_llama_dir, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file({name: w * 2 for name, w in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    message = expect_user_error(
        "validate", "--config", "balanced.yaml", *flags, f"--model.base_model={other}", "--adapter", str(adapter_dir)
    )
    assert str(tiny_llama_dir) in message
    assert str(other) in message


def test_help_fits_the_terminal_and_version_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([]) == 0
    overview = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == overview
    assert all(command in overview for command in (*LIGHTNING_COMMANDS, *LIGHT_COMMANDS))
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["--help"]) == 0
    narrow = capsys.readouterr().out
    assert narrow.split() == overview.split()
    command = "python -m snake_lora_pl fit --config balanced.yaml --config quickstart.yaml"
    assert all(len(line) <= 60 for line in narrow.splitlines() if line != command)
    assert main(["--version"]) == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_run_directory_is_removed_from_the_environment(finished_run: tuple[Path, str]) -> None:
    assert "SNAKE_LORA_PL_RUN_DIR" not in os.environ


def test_removed_working_directory_is_a_user_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "gone"
    directory.mkdir()
    monkeypatch.chdir(directory)
    directory.rmdir()
    for command in ("adapters", "fit"):
        assert main([command, "."]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert "working directory" in line


@pytest.mark.parametrize("seed", ["abc", "-1", "1.5", str(2**32)])
def test_seed_in_the_environment_must_be_a_number(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], seed: str
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", seed)
    assert main(["fit"]) == 2
    assert f"PL_GLOBAL_SEED={seed}" in capfd.readouterr().err


def test_rank_must_be_a_number(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LOCAL_RANK", "first")
    assert main(["fit"]) == 2
    assert "LOCAL_RANK=first" in capfd.readouterr().err
