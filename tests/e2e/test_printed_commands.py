"""Every command that a run prints can be pasted, in a directory whose name has a space and an umlaut."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest

from snake_lora_pl.__main__ import main
from snake_lora_pl.data.generated_rows import write_dataset
from snake_lora_pl.paths import RunPaths
from snake_lora_pl.reporting.html_report import render_report
from snake_lora_pl.training.module import LoRALightningModule
from tests.reporting.test_html_report import ParsedReport
from tests.small_run import small_run

pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = ["--trainer.accelerator=cpu", "--model.max_new_tokens=2", "--play.max_steps=2", "--model.dtype=float32"]


@pytest.fixture
def directory(tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a base model and rows."""
    directory = tmp_path / "große Läufe"
    directory.mkdir()
    shutil.copytree(tiny_llama_dir, directory / "a base")
    write_dataset(directory / "some rows.jsonl", 4, 5, "bfs", "compact", 0)
    monkeypatch.chdir(directory)
    return directory


@pytest.fixture
def fit_flags(directory: Path) -> list[str]:
    few = ["--trainer.max_steps=2", "--trainer.val_check_interval=1", "--trainer.limit_train_batches=3"]
    few += ["--num_sample_rows=0", "--play.final_games=1", "--play.max_steps=2", "--root", "my runs"]
    return ["--config=balanced.yaml", *small_run(Path("a base"), Path("some rows.jsonl"), *few)]


def find_run(directory: Path) -> RunPaths:
    (run_dir,) = (directory / "my runs").glob("logs/extensions/models/grid-size-5/*/snake_reasoning")
    return RunPaths(run_dir)


def printed_command(output: str, after: str) -> list[str]:
    """Return the words of the command that follows some text on its line."""
    (found,) = re.findall(rf"{re.escape(after)}\s*(.+)", output)
    return shlex.split(found)


def test_printed_commands_of_a_run_run(
    directory: Path, fit_flags: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *fit_flags, "--config=tensorboard.yaml"]) == 0
    output = capfd.readouterr().out
    run = find_run(directory)
    python, _, package, *arguments = printed_command(output, "Next:")
    assert (python, package, arguments[0]) == ("python", "snake_lora_pl", "test")
    assert main([*arguments, *SMALL, "--games=1"]) == 0, capfd.readouterr().err
    (log_dir,) = printed_command(output, "tensorboard --logdir")
    assert Path(log_dir).is_dir()
    for _, command in ParsedReport(render_report(run)).data["commands"]:
        name, *rest = shlex.split(command)[3:]
        more = [*SMALL, "--games=1"] if name == "test" else []
        assert main([name, *rest, *more]) == 0, capfd.readouterr().err
        merged = capfd.readouterr().out if name == "merge" else ""
        if merged:
            *_, model_dir = printed_command(merged, "vllm serve")
            assert (directory / model_dir / "config.json").is_file()


def test_resume_command_of_an_interrupted_run_runs(
    directory: Path, fit_flags: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    training_step = LoRALightningModule.training_step

    def interrupt(self: LoRALightningModule, *args: object) -> object:
        signal.raise_signal(signal.SIGTERM)
        return training_step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(LoRALightningModule, "training_step", interrupt)
        assert main(["fit", *fit_flags]) == 128 + signal.SIGTERM
    arguments = printed_command(capfd.readouterr().err, "python -m snake_lora_pl")
    assert main(arguments) == 0
    assert find_run(directory).report_path.is_file()


def test_missing_last_checkpoint_is_reported_with_a_flag_that_resumes_from_the_newest(
    directory: Path, fit_flags: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *fit_flags]) == 0
    run = find_run(directory)
    run.last_checkpoint_path.unlink()
    for given in ("last", "auto", str(run.last_checkpoint_path)):
        capfd.readouterr()
        assert main(["fit", *fit_flags, "--ckpt_path", given]) == 2
        message = " ".join(capfd.readouterr().err.split())
        option, path = printed_command(message, "directory is epoch=0-step=2.ckpt: set")
        assert (option, Path(path).name) == ("--ckpt_path", "epoch=0-step=2.ckpt")
    assert main(["fit", *fit_flags, option, path, "--trainer.max_steps=3"]) == 0
    assert run.last_checkpoint_path.is_file()
