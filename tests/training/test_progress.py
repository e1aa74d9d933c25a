"""What a run shows of itself: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from snake_lora_pl.training.progress import RunProgress


def trainer_at(step: int, **metrics: float) -> Any:
    progress = SimpleNamespace(current=SimpleNamespace(ready=0, completed=0))
    return SimpleNamespace(
        callback_metrics={name.replace("__", "/"): torch.tensor(value) for name, value in metrics.items()},
        current_epoch=0,
        global_step=step,
        max_steps=10,
        max_epochs=None,
        callbacks=[],
        fit_loop=SimpleNamespace(epoch_progress=progress, epoch_loop=SimpleNamespace(batch_progress=progress)),
    )


def shown(progress: RunProgress, *, is_terminal: bool, step_seconds: float, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a run of two steps shows, with games before the second."""
    out = io.StringIO()
    progress._console = Console(file=out, force_terminal=is_terminal, width=120, color_system=None)
    now = [100.0]
    monkeypatch.setattr("snake_lora_pl.training.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    module: Any = None
    progress.on_train_start(trainer_at(0), module)
    losses = {"train__loss": 1.25, "perf__tokens_per_second": 512.0}
    for step, metrics in ((1, losses | {"play__apples_mean": 8.0}), (2, losses)):
        now[0] += step_seconds
        progress.on_train_batch_end(trainer_at(step, **metrics), module, None, None, 0)
    progress.on_train_end(trainer_at(2, **losses), module)
    return out.getvalue()


def test_where_there_is_no_terminal_there_are_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(RunProgress(line_seconds=15), is_terminal=False, step_seconds=20, monkeypatch=monkeypatch)
    # The score of games is kept while the validations after them play none.
    assert text.splitlines() == [
        "train  10%  epoch 0  step 1  loss 1.250  tokens/s 512  play 8.0  left 3:00",
        "train  20%  epoch 0  step 2  loss 1.250  tokens/s 512  play 8.0  left 2:40",
        "train  20%  epoch 0  step 2  loss 1.250  tokens/s 512  play 8.0  left 0:00",
    ]


def test_lines_are_as_rare_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(RunProgress(line_seconds=15), is_terminal=False, step_seconds=1, monkeypatch=monkeypatch)
    assert [line[:10] for line in text.splitlines()] == ["train  10%", "train  20%"]  # the first, and the end


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(RunProgress(), is_terminal=True, step_seconds=1, monkeypatch=monkeypatch)
    assert "\x1b[" in text  # drawn anew in its place
    assert "━" in text
    assert all(words in text for words in ("loss 1.250", "tokens/s 512", "play 8.0", "step 2"))
