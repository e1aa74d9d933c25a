"""Progress bar of a whole run in a terminal, and progress lines in other output."""

from __future__ import annotations

import math
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks.progress.progress_bar import ProgressBar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from snake_lora_pl.training.optimizer import elapsed_fraction, find_timer

_NAME_WIDTH, _GAP = 5, 2  # width of "train", and columns between it and the bar
# Free columns at the end of a bar, where the terminal prints ^C. Otherwise ^C would start a line that remains.
_MARGIN = 4
# Visible on light and dark backgrounds, unlike rich's default colors.
_DONE_STYLE, _REMAINING_STYLE = "green", "grey50"


@dataclass
class _Stage:
    """A running stage: training, a validation within it, or games within that.

    Attributes:
        name: Label of the bar.
        started: Start time, in seconds of ``time.monotonic``.
        fraction: Completed fraction, in [0, 1].
        details: Text after the bar.
        metrics: Text below the bar.
    """

    name: str
    started: float
    fraction: float = 0.0
    details: str = ""
    metrics: str = ""


class RunProgressBar(ProgressBar):
    """Shows the progress of a run towards its nearest limit: steps, epochs or ``trainer.max_time``.

    Args:
        line_interval_s: Seconds between two progress lines if the output is not a terminal.
    """

    def __init__(self, line_interval_s: float = 15.0) -> None:
        super().__init__()
        self.line_interval_s = line_interval_s
        self._enabled = True
        # FORCE_COLOR must not enable drawing in a file. The terminal wraps long lines, so that paths can be copied.
        is_interactive = None if sys.stderr.isatty() else False
        self._console = Console(stderr=True, force_interactive=is_interactive, soft_wrap=True, highlight=False)
        self._stages: list[_Stage] = []
        self._live: Live | None = None
        self._note = ""
        self._started = 0.0
        self._initial_fraction = 0.0
        self._last_line = 0.0
        self._score: torch.Tensor | None = None

    @override
    def disable(self) -> None:
        self._enabled = False

    @override
    def enable(self) -> None:
        self._enabled = True

    @override
    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        if self._enabled:
            self._console.print(*args, **kwargs)

    def note(self, text: str) -> bool:
        """Show a text below the bar at its next refresh. Writes nothing itself: safe in a signal handler.

        Returns:
            Whether a bar is displayed.
        """
        self._note = text
        return self._live is not None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.monotonic()
        self._initial_fraction = self._completed_fraction(trainer)
        self._open("train")
        self._stages[-1].fraction = self._initial_fraction
        self._last_line = -math.inf  # print the first line at the first step

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        fraction = self._completed_fraction(trainer)
        self._show(fraction, self._time_left(fraction), self._metrics_text(trainer))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()
        elapsed = time.monotonic() - self._started
        self._print_line(
            "train", self._completed_fraction(trainer), f"took {_format_duration(elapsed)}", self._metrics_text(trainer)
        )

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        while self._stages:
            self._close()

    def _metrics_text(self, trainer: pl.Trainer) -> str:
        metrics = trainer.callback_metrics
        # Validations without games do not log the score: keep showing the last one.
        self._score = metrics.get("play/apples_mean", self._score)
        parts = [f"epoch {self._epochs_done(trainer):.2f}", f"step {trainer.global_step}"]
        for name, label, template in (
            ("train/loss", "loss", "{:.3f}"),
            ("val/loss", "val", "{:.3f}"),
            ("perf/tokens_per_second", "tokens/s", "{:,.0f}"),
        ):
            if name in metrics:
                parts.append(f"{label} {template.format(float(metrics[name]))}")
        if self._score is not None:
            parts.append(f"play {float(self._score):.1f}")
        return "  ".join(parts)

    def _time_left(self, fraction: float) -> str:
        if fraction <= self._initial_fraction:
            return ""
        elapsed = time.monotonic() - self._started
        return f"left {_format_duration(elapsed * (1 - fraction) / (fraction - self._initial_fraction))}"

    @staticmethod
    def _epochs_done(trainer: pl.Trainer) -> float:
        batches = trainer.num_training_batches
        if not 0 < batches < float("inf"):
            return float(trainer.current_epoch)
        # Lightning's `current_epoch` counts an epoch cut short by `max_steps` as a whole one.
        return trainer.fit_loop.epoch_loop.batch_progress.total.ready / batches

    def _completed_fraction(self, trainer: pl.Trainer) -> float:
        """Return the completed fraction of the run, in [0, 1], towards the nearest limit."""
        fractions = [0.0]
        if trainer.max_steps > 0:
            fractions.append(trainer.global_step / trainer.max_steps)
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            fractions.append(self._epochs_done(trainer) / trainer.max_epochs)
        return min(1.0, max(*fractions, elapsed_fraction(find_timer(trainer))))

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._open("val")

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.has_dataloader_changed(dataloader_idx)  # lets the base class select the total
        self._show_batch(batch_idx, self.total_val_batches_current_dataloader)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the metrics of the validation."""
        self._close()
        prefix = "val/"
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(prefix)}
        if values and trainer.state.fn == "fit" and not trainer.sanity_checking:  # `validate` prints a table
            names = sorted(values, key=lambda name: (name != "val/loss", name))
            text = "  ".join(f"{name.removeprefix(prefix)} {values[name]:.4g}" for name in names)
            self._print_wrapped(f"step {trainer.global_step}: val  {text}")

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._open("predict")

    @override
    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.has_dataloader_changed(dataloader_idx)
        self._show_batch(batch_idx, self.total_predict_batches_current_dataloader)

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[float, str], None]]:
        """Show another stage. The yielded function updates its completed fraction and its text."""
        self._open(name)
        try:
            yield self._show
        finally:
            self._close()

    def _open(self, name: str) -> None:
        if not self._stages:
            self._last_line = time.monotonic()
        self._stages.append(_Stage(name, time.monotonic()))
        if self._live is None and self._enabled and self._console.is_interactive:
            self._live = Live(
                console=self._console,
                get_renderable=self._bars,
                transient=True,
                # Print above the bar in a terminal; do not redirect a file.
                redirect_stdout=sys.stdout.isatty(),
            )
            self._live.start()

    def _close(self) -> None:
        if self._stages:
            self._stages.pop()
        if self._live is not None and not self._stages:
            self._live.stop()
            self._live = None

    def _show(self, fraction: float, details: str, metrics: str = "") -> None:
        if not self._stages:
            return
        stage = self._stages[-1]
        stage.fraction, stage.details, stage.metrics = fraction, details, metrics
        if self._live is None and time.monotonic() - self._last_line >= self.line_interval_s:
            self._print_line(stage.name, fraction, details, metrics)

    def _show_batch(self, batch_idx: int, num_batches: float) -> None:
        self._show((batch_idx + 1) / num_batches, f"batch {batch_idx + 1} of {num_batches}")

    def _print_line(self, name: str, fraction: float, details: str, metrics: str) -> None:
        self._last_line = time.monotonic()
        self._print_wrapped("  ".join(part for part in (f"{name} {fraction:4.0%}", metrics, details) if part))

    def _print_wrapped(self, text: str) -> None:
        # Metrics may be wrapped between words, unlike paths.
        self.print(text, soft_wrap=not self._console.is_terminal)

    def _bars(self) -> RenderableType:
        """Return the outermost stage, below it the innermost one or else the metrics, and the note."""
        stages = list(self._stages)
        width = self._console.width
        lines: list[RenderableType] = [_bar(stage, width) for stage in (*stages[:1], *stages[1:][-1:])]
        if len(stages) == 1 and stages[0].metrics:
            lines.append(Text(_wrap(stages[0].metrics, width), overflow="ellipsis"))
        if self._note:
            lines.append(Text(self._note))
        return Group(*lines)


def _bar(stage: _Stage, width: int) -> RenderableType:
    line = Table.grid(padding=(0, _GAP, 0, 0))
    line.width = max(width - _MARGIN, 1)
    line.add_column(justify="right", min_width=_NAME_WIDTH, no_wrap=True)
    line.add_column(ratio=1)
    for _ in range(3):
        line.add_column(no_wrap=True)
    bar = Bar(
        total=1.0,
        completed=stage.fraction,
        style=_REMAINING_STYLE,
        complete_style=_DONE_STYLE,
        finished_style=_DONE_STYLE,
    )
    elapsed = _format_duration(time.monotonic() - stage.started)
    line.add_row(Text(stage.name, style="bold"), bar, f"{stage.fraction:4.0%}", elapsed, stage.details)
    return line


def _wrap(metrics: str, width: int) -> str:
    """Wrap metrics to a width without separating a value from its name."""
    indent, no_break = " " * (_NAME_WIDTH + _GAP), "\N{NO-BREAK SPACE}"
    text = "  ".join(metric.replace(" ", no_break) for metric in metrics.split("  "))
    lines = textwrap.fill(text, max(width - _MARGIN, 20), initial_indent=indent, subsequent_indent=indent)
    return lines.replace(no_break, " ")


def _format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
