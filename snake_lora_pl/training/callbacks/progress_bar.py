"""One progress bar for the whole run: loss, tokens/s, play score, time left. Plain lines where there is no terminal."""

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
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.callbacks.progress.progress_bar import ProgressBar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text

_NAME_WIDTH, _GAP = 5, 2  # of "train", and columns to the bar
# Free columns at the end of a bar: the terminal writes ^C there, which would else begin a line that nobody removes.
_MARGIN = 4
# Seen on white as on black, where rich's own colors are not.
_DONE, _TO_DO = "green", "grey50"


@dataclass
class _Stage:
    """What goes on: training, within it a validation, and within that games."""

    name: str
    started: float
    share: float = 0.0
    details: str = ""
    figures: str = ""


class RunProgress(ProgressBar):
    """Shows how far a run is by the limit that ends it first: steps, epochs or ``trainer.max_time``.

    Args:
        line_seconds: Seconds between two lines where output is no terminal (a log file, a batch job).
    """

    def __init__(self, line_seconds: float = 15.0) -> None:
        super().__init__()
        self.line_seconds = line_seconds
        self._enabled = True
        # Only a terminal can be drawn on, whatever FORCE_COLOR asks for. Long lines are the terminal's to wrap: a path
        # that was broken here could not be copied.
        is_interactive = None if sys.stderr.isatty() else False
        self._console = Console(stderr=True, force_interactive=is_interactive, soft_wrap=True, highlight=False)
        self._stages: list[_Stage] = []
        self._live: Live | None = None
        self._note = ""
        self._started = 0.0
        self._first_share = 0.0
        self._last_line = 0.0
        self._score: torch.Tensor | None = None

    def disable(self) -> None:
        """Show nothing; Lightning calls this on every process but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show progress."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        if self._enabled:
            self._console.print(*args, **kwargs)

    def note(self, text: str) -> bool:
        """Show a text below the bar from now on; nothing is written here, so that a signal handler may call it.

        Returns:
            Whether there is a bar.
        """
        self._note = text
        return self._live is not None

    # ------------------------------------------------------------------ training

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar."""
        self._started = time.monotonic()
        self._first_share = self._run_share(trainer)
        self._open("train")
        self._stages[-1].share = self._first_share
        self._last_line = -math.inf  # the first line comes with the first step; other stages may be over soon

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar."""
        share = self._run_share(trainer)
        self._show(share, self._time_left(share), self._figures(trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the bar down and say where training ended."""
        self._close()
        elapsed = time.monotonic() - self._started
        self._print_line("train", self._run_share(trainer), f"took {_clock(elapsed)}", self._figures(trainer))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take the bar down, so that the message is readable."""
        while self._stages:
            self._close()

    def _figures(self, trainer: pl.Trainer) -> str:
        metrics = trainer.callback_metrics
        # At validations without games the score is not among the metrics; the last one is still what there is to know.
        self._score = metrics.get("play/apples_mean", self._score)
        parts = [f"epoch {self._epochs_done(trainer):.2f}", f"step {trainer.global_step}"]
        for name, label, form in (
            ("train/loss", "loss", "{:.3f}"),
            ("val/loss", "val", "{:.3f}"),
            ("perf/tokens_per_second", "tokens/s", "{:,.0f}"),
        ):
            if name in metrics:
                parts.append(f"{label} {form.format(float(metrics[name]))}")
        if self._score is not None:
            parts.append(f"play {float(self._score):.1f}")
        return "  ".join(parts)

    def _time_left(self, share: float) -> str:
        if share <= self._first_share:
            return ""
        elapsed = time.monotonic() - self._started
        return f"left {_clock(elapsed * (1 - share) / (share - self._first_share))}"

    @staticmethod
    def _epochs_done(trainer: pl.Trainer) -> float:
        batches = trainer.num_training_batches
        if not 0 < batches < float("inf"):
            return float(trainer.current_epoch)
        # Lightning counts an epoch that `max_steps` cuts short as a whole one.
        return trainer.fit_loop.epoch_loop.batch_progress.total.ready / batches

    def _run_share(self, trainer: pl.Trainer) -> float:
        """Share of the run that is done, in [0, 1], by the limit that is nearest to its end."""
        shares = [0.0]
        if trainer.max_steps > 0:
            shares.append(trainer.global_step / trainer.max_steps)
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            shares.append(self._epochs_done(trainer) / trainer.max_epochs)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Timer) and callback._duration:
                shares.append(callback.time_elapsed() / callback._duration)
        return min(1.0, max(shares))

    # ------------------------------------------------------------------ the other stages

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the validation's own progress."""
        self._open("val")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Move the bar."""
        self.has_dataloader_changed(dataloader_idx)  # tells the base class which loader the total is of
        self._show_batch(batch_idx, self.total_val_batches_current_dataloader)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the bar back to training and say what came out."""
        self._close()
        prefix = "val/"
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(prefix)}
        if values and trainer.state.fn == "fit" and not trainer.sanity_checking:  # `validate` prints them itself
            names = sorted(values, key=lambda name: (name != "val/loss", name))
            text = "  ".join(f"{name.removeprefix(prefix)} {values[name]:.4g}" for name in names)
            self._print_figures(f"step {trainer.global_step}: val  {text}")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar."""
        self._open("predict")

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Move the bar."""
        self.has_dataloader_changed(dataloader_idx)
        self._show_batch(batch_idx, self.total_predict_batches_current_dataloader)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the bar down."""
        self._close()

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[float, str], None]]:
        """Show something else for a while; what it yields takes the share that is done, and a text."""
        self._open(name)
        try:
            yield self._show
        finally:
            self._close()

    # ------------------------------------------------------------------ drawing

    def _open(self, name: str) -> None:
        if not self._stages:
            self._last_line = time.monotonic()
        self._stages.append(_Stage(name, time.monotonic()))
        if self._live is None and self._enabled and self._console.is_interactive:
            self._live = Live(
                console=self._console,
                get_renderable=self._bars,
                transient=True,
                # What is printed meanwhile comes to stand above; to a file it goes as ever.
                redirect_stdout=sys.stdout.isatty(),
            )
            self._live.start()

    def _close(self) -> None:
        if self._stages:
            self._stages.pop()
        if self._live is not None and not self._stages:
            self._live.stop()
            self._live = None

    def _show(self, share: float, details: str, figures: str = "") -> None:
        if not self._stages:
            return
        stage = self._stages[-1]
        stage.share, stage.details, stage.figures = share, details, figures
        if self._live is None and time.monotonic() - self._last_line >= self.line_seconds:
            self._print_line(stage.name, share, details, figures)

    def _show_batch(self, batch_idx: int, num_batches: float) -> None:
        self._show((batch_idx + 1) / num_batches, f"batch {batch_idx + 1} of {num_batches}")

    def _print_line(self, name: str, share: float, details: str, figures: str) -> None:
        self._last_line = time.monotonic()
        self._print_figures("  ".join(part for part in (f"{name} {share:4.0%}", figures, details) if part))

    def _print_figures(self, text: str) -> None:
        # Unlike a path they may be broken between words.
        self.print(text, soft_wrap=not self._console.is_terminal)

    def _bars(self) -> RenderableType:
        """The outermost stage and below it the one that it waits for, or else its figures, and a note."""
        stages = list(self._stages)
        width = self._console.width
        lines: list[RenderableType] = [_bar(stage, width) for stage in (*stages[:1], *stages[1:][-1:])]
        if len(stages) == 1 and stages[0].figures:
            lines.append(Text(_flowed(stages[0].figures, width), overflow="ellipsis"))
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
    bar = Bar(total=1.0, completed=stage.share, style=_TO_DO, complete_style=_DONE, finished_style=_DONE)
    elapsed = _clock(time.monotonic() - stage.started)
    line.add_row(Text(stage.name, style="bold"), bar, f"{stage.share:4.0%}", elapsed, stage.details)
    return line


def _flowed(figures: str, width: int) -> str:
    """Figures below a bar, on more than one line where they must, but none parted from its name."""
    indent, glue = " " * (_NAME_WIDTH + _GAP), "\N{NO-BREAK SPACE}"
    whole = "  ".join(figure.replace(" ", glue) for figure in figures.split("  "))
    lines = textwrap.fill(whole, max(width - _MARGIN, 20), initial_indent=indent, subsequent_indent=indent)
    return lines.replace(glue, " ")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
