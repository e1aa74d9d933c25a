"""One progress bar for the whole run: loss, tokens/s, play score, time left. Plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.callbacks.progress.progress_bar import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class RunProgress(ProgressBar):
    """Shows how far a run is by the limit that ends it first: steps, epochs or ``trainer.max_time``.

    Args:
        line_seconds: Seconds between two lines where output is no terminal (a log file, a batch job).
    """

    def __init__(self, line_seconds: float = 15.0) -> None:
        super().__init__()
        self.line_seconds = line_seconds
        self._enabled = True
        self._console = Console(file=sys.stderr)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._started = 0.0
        self._first_share = 0.0
        self._last_line = 0.0
        self._stage = ""
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

    # ------------------------------------------------------------------ training

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar."""
        self._started = time.monotonic()
        self._first_share = self._run_share(trainer)
        self._open("train")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar."""
        share = self._run_share(trainer)
        self._show(share, self._train_text(trainer, share))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the bar down."""
        self._show(self._run_share(trainer), self._train_text(trainer, 1.0), force=True)
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take the bar down, so that the message is readable."""
        self._close()

    def _train_text(self, trainer: pl.Trainer, share: float) -> str:
        metrics = trainer.callback_metrics
        # At validations without games the score is not among the metrics; the last one is still what there is to know.
        self._score = metrics.get("play/apples_mean", self._score)
        parts = [f"epoch {trainer.current_epoch}", f"step {trainer.global_step}"]
        for name, label, form in (
            ("train/loss", "loss", "{:.3f}"),
            ("val/loss", "val", "{:.3f}"),
            ("perf/tokens_per_second", "tokens/s", "{:.0f}"),
        ):
            if name in metrics:
                parts.append(f"{label} {form.format(float(metrics[name]))}")
        if self._score is not None:
            parts.append(f"play {float(self._score):.1f}")
        if share > self._first_share:
            elapsed = time.monotonic() - self._started
            parts.append(f"left {_clock(elapsed * (1 - share) / (share - self._first_share))}")
        return "  ".join(parts)

    @staticmethod
    def _run_share(trainer: pl.Trainer) -> float:
        """Share of the run that is done, in [0, 1], by the limit that is nearest to its end."""
        shares = [0.0]
        if trainer.max_steps > 0:
            shares.append(trainer.global_step / trainer.max_steps)
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            batches = trainer.num_training_batches
            done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            in_epoch = done / batches if 0 < batches < float("inf") else 0.0
            shares.append((trainer.fit_loop.epoch_progress.current.completed + in_epoch) / trainer.max_epochs)
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
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if values and not trainer.sanity_checking:
            text = "  ".join(f"{name} {value:.4g}" for name, value in sorted(values.items()))
            # Outside of `fit` no step was made: those that the adapter has behind it are not the trainer's.
            begin = f"step {trainer.global_step}: " if trainer.state.fn == "fit" else ""
            self.print(f"{begin}{text}", highlight=False, soft_wrap=True)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._open("train")
        else:
            self._close()

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
        before, was_open = self._stage, self._progress is not None
        self._open(name)
        try:
            yield self._show
        finally:
            self._close()
            self._stage = before
            if was_open:
                self._open(before)

    # ------------------------------------------------------------------ drawing

    def _open(self, stage: str) -> None:
        self._close()
        self._stage = stage
        self._last_line = 0.0
        if self._enabled and self._console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.fields[stage]:>5}"),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[text]}"),
                console=self._console,
            )
            self._task = self._progress.add_task("", total=1.0, stage=stage, text="")
            self._progress.start()

    def _show(self, share: float, text: str, force: bool = False) -> None:
        if not self._enabled:
            return
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=share, text=text)
        elif force or time.monotonic() - self._last_line >= self.line_seconds:
            self._last_line = time.monotonic()
            self.print(f"{self._stage} {share:4.0%}  {text}", highlight=False, soft_wrap=True)

    def _show_batch(self, batch_idx: int, num_batches: float) -> None:
        self._show((batch_idx + 1) / num_batches, f"batch {batch_idx + 1} of {num_batches}")

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress, self._task = None, None


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
