"""Progress bar in an emulated terminal, and progress lines in a file."""

from __future__ import annotations

import io
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pyte
import pytest
import torch

from snake_lora_pl.console import StderrHandler
from snake_lora_pl.training.callbacks.progress_bar import RunProgressBar


def trainer_at(step: int, **metrics: float) -> Any:
    batches = SimpleNamespace(total=SimpleNamespace(ready=step))
    return SimpleNamespace(
        callback_metrics={name.replace("__", "/"): torch.tensor(value) for name, value in metrics.items()},
        current_epoch=0,
        global_step=step,
        max_steps=10,
        max_epochs=None,
        num_training_batches=10,
        callbacks=[],
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=batches)),
    )


MODULE: Any = None
LOSSES = {"train__loss": 1.25, "perf__tokens_per_second": 51234.0}


class Terminal(io.StringIO):
    """A stream that emulates a terminal."""

    def __init__(self, columns: int = 80) -> None:
        super().__init__()
        self.screen = pyte.Screen(columns, 24)
        self.screen.set_mode(pyte.modes.LNM)
        self._stream = pyte.Stream(self.screen)

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._stream.feed(text)
        return super().write(text)

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display if line.strip()]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A fake clock for the progress bar."""
    now = [100.0]
    monkeypatch.setattr("snake_lora_pl.training.callbacks.progress_bar.time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal of 80 columns. The test replaces stderr itself: pytest restores it after the setup."""
    terminal = Terminal()
    for name, value in {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}.items():
        monkeypatch.setenv(name, value)
    return terminal


def train_two_steps(clock: list[float], *, step_seconds: float) -> None:
    """Train two steps; games are logged at the first one."""
    progress_bar = RunProgressBar(line_interval_s=15)
    progress_bar.on_train_start(trainer_at(0), MODULE)
    for step, metrics in ((1, LOSSES | {"play__apples_mean": 8.0}), (2, LOSSES)):
        clock[0] += step_seconds
        progress_bar.on_train_batch_end(trainer_at(step, **metrics), MODULE, None, None, 0)
    progress_bar.on_train_end(trainer_at(2, **LOSSES), MODULE)


def test_output_that_is_not_a_terminal_gets_lines(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    train_two_steps(clock, step_seconds=20)
    # Validations without games keep the last score.
    assert capsys.readouterr().err.splitlines() == [
        "train  10%  epoch 0.10  step 1  loss 1.250  tokens/s 51,234  play 8.0  left 3:00",
        "train  20%  epoch 0.20  step 2  loss 1.250  tokens/s 51,234  play 8.0  left 2:40",
        "train  20%  epoch 0.20  step 2  loss 1.250  tokens/s 51,234  play 8.0  took 0:40",
    ]


def test_lines_keep_their_interval(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    train_two_steps(clock, step_seconds=1)
    # The first step and the end.
    assert [line[:10] for line in capsys.readouterr().err.splitlines()] == ["train  10%", "train  20%"]


def test_short_validations_print_no_line(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    progress_bar = RunProgressBar(line_interval_s=15)
    progress_bar.on_train_start(trainer_at(0), MODULE)
    progress_bar.on_train_batch_end(trainer_at(1), MODULE, None, None, 0)
    for _ in range(3):
        with progress_bar.stage("val") as show:
            clock[0] += 1
            show(1.0, "batch 1 of 1")
    with progress_bar.stage("play") as show:
        clock[0] += 15
        show(0.5, "model: 1 of 2 games over")
    assert [line[:10] for line in capsys.readouterr().err.splitlines()] == [
        "train  10%",
        "play  50%  model: 1 of 2 games over"[:10],
    ]


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_file_gets_no_control_codes_if_color_is_forced(
    name: str, capsys: pytest.CaptureFixture[str], clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    train_two_steps(clock, step_seconds=20)
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 3
    assert not {"\x1b", "\r"} & set(text)


def test_dumb_terminal_gets_lines(terminal: Terminal, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "dumb")
    train_two_steps(clock, step_seconds=20)
    assert len(terminal.getvalue().splitlines()) == 3
    assert "\x1b" not in terminal.getvalue()


def test_bar_leaves_no_traces_in_printed_output(
    terminal: Terminal, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal)
    progress_bar = RunProgressBar()
    path = "a_long_directory/" * 6
    message = logging.LogRecord("snake_lora_pl", logging.INFO, __file__, 1, "written to %s", (path,), None)
    metrics = LOSSES | {"val__loss": 2.0, "play__apples_mean": 8.0}
    progress_bar.on_train_start(trainer_at(0), MODULE)
    clock[0] += 20
    progress_bar.on_train_batch_end(trainer_at(1, **metrics), MODULE, None, None, 0)
    progress_bar._live.refresh()  # type: ignore[union-attr]
    bar, metrics_line = terminal.lines
    assert bar.startswith("train  ━━━━╸━")
    assert bar.endswith("10%  0:20  left 3:00")
    assert metrics_line == "       epoch 0.10  step 1  loss 1.250  val 2.000  tokens/s 51,234  play 8.0"
    assert len(bar) == 80 - len("^C^C")  # which the terminal may print there
    with progress_bar.stage("val") as show:
        show(0.5, "batch 1 of 2")
        with progress_bar.stage("play") as show_games:
            show_games(0.25, "model: 1 of 4 games over")
            StderrHandler().emit(message)
            progress_bar._live.refresh()  # type: ignore[union-attr]
            *above, bar, games = terminal.lines
            # Only the terminal breaks a long path.
            assert (above[0], "".join(above[1:])) == ("written to", path)
            assert bar.endswith("10%  0:20  left 3:00")
            assert games.startswith(" play  ━━━━━")
            assert games.endswith("25%  0:00  model: 1 of 4 games over")
    print("step 1: done", file=sys.stderr)
    assert progress_bar.note("SIGINT: finishing the step.")
    progress_bar._live.refresh()  # type: ignore[union-attr]
    assert terminal.lines[-1] == "SIGINT: finishing the step."
    progress_bar.on_train_end(trainer_at(2, **metrics), MODULE)
    *above, printed, metrics_line, took = terminal.lines
    assert ("".join(above), printed) == (f"written to{path}", "step 1: done")
    assert metrics_line == "train  20%  epoch 0.20  step 2  loss 1.250  val 2.000  tokens/s 51,234  play 8.0"
    assert took == "took 0:20"


def test_metrics_wrap_without_separating_values_from_names(
    terminal: Terminal, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "50")
    progress_bar = RunProgressBar()
    progress_bar.on_train_start(trainer_at(0), MODULE)
    clock[0] += 20
    progress_bar.on_train_batch_end(
        trainer_at(1, **LOSSES, val__loss=2.0, play__apples_mean=8.0), MODULE, None, None, 0
    )
    progress_bar._live.refresh()  # type: ignore[union-attr]
    bar, *metrics_lines = terminal.lines
    assert bar.endswith("10%  0:20  left 3:00")
    assert metrics_lines == ["       epoch 0.10  step 1  loss 1.250", "       val 2.000  tokens/s 51,234  play 8.0"]
    progress_bar.on_exception(trainer_at(1), MODULE, KeyboardInterrupt())
    assert terminal.lines == []
