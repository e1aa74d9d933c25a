"""``metrics.csv`` that a resumed run goes on with, instead of starting anew."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from typing import Any

from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from snake_lora_pl.durable import open_durably


class MetricsCSVLogger(CSVLogger):
    """Writes every metric to ``DIRECTORY/metrics.csv``, a row a logging step.

    Lightning's own logger deletes the file of an earlier run in the same directory; this one keeps it, and ``rewind``
    drops what will be logged again.

    Args:
        save_dir: The run's directory.
        flush_every_n_steps: Logging steps between two writings of the file.
    """

    def __init__(self, save_dir: str, flush_every_n_steps: int = 10) -> None:
        super().__init__(save_dir=save_dir, name="", version="", flush_logs_every_n_steps=flush_every_n_steps)

    @property
    def log_dir(self) -> str:
        """The run's directory itself."""
        return os.fspath(self._save_dir)

    @property
    @rank_zero_experiment
    def experiment(self) -> _ExperimentWriter:
        """The writer of the file."""
        if self._experiment is None:
            self._experiment = _AppendingWriter(self.log_dir)
        return self._experiment

    @rank_zero_only
    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: ``config.yaml`` beside the file holds the whole config."""

    @rank_zero_only
    def save(self) -> None:
        """Write what was logged since the last writing."""
        self.experiment.save()

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop rows of steps from ``step`` on, which a run resumed there logs again."""
        self.experiment.keep_rows(lambda row: int(float(row["step"])) < step)


class _AppendingWriter(_ExperimentWriter):
    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        if self._fs.isfile(self.metrics_file_path):
            with open(self.metrics_file_path, newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])

    def _check_log_dir_exists(self) -> None:
        """Keep what is there; Lightning's writer deletes it."""

    def keep_rows(self, keep: Callable[[dict[str, str]], bool]) -> None:
        if not self._fs.isfile(self.metrics_file_path):
            return
        with open(self.metrics_file_path, newline="") as file:
            rows = list(csv.DictReader(file))
        with open_durably(self.metrics_file_path, "w", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys, lineterminator="\r\n")
            writer.writeheader()
            # A kill can leave a last line that is only a part.
            writer.writerows(row for row in rows if None not in row.values() and row["step"] and keep(row))
