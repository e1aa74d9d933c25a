"""The logger that writes ``metrics.csv``: a resumed run appends to it, and a killed process cannot corrupt it."""

from __future__ import annotations

import contextlib
import csv
import errno
import os
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning_utilities.core.rank_zero import rank_zero_only
from typing_extensions import override

from snake_lora_pl.durable import explain_failed_writes, open_durably
from snake_lora_pl.errors import UserError
from snake_lora_pl.paths import RunPaths


class MetricsCSVLogger(CSVLogger):
    """Writes every metric to ``SAVE_DIR/metrics.csv``, one row per logging step.

    Lightning's logger deletes the file of an earlier run in the same directory. And for every new metric it rewrites
    the file in place, so that a process killed in that moment loses it. This one does neither. ``rewind`` drops the
    rows that a resumed run will log again.

    Args:
        save_dir: Run directory.

    Raises:
        UserError: If the file cannot be written.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__(save_dir=save_dir, name="", version="")
        self._writer: _MetricsFile | None = None

    @property
    @override
    def log_dir(self) -> str:
        return os.fspath(self.save_dir)

    @property
    @rank_zero_experiment
    def experiment(self) -> _MetricsFile:
        """The writer of the file, opened at the first use."""
        if self._writer is None:
            path = RunPaths(Path(self.log_dir)).metrics_path
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = _MetricsFile(path)
        return self._writer

    @override
    @rank_zero_only
    def log_hyperparams(self, params: Any = None) -> None:
        """Log nothing: ``config.yaml`` in the same directory holds the config."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.experiment.add({name: float(value) for name, value in metrics.items()}, step)

    @override
    @rank_zero_only
    def save(self) -> None:
        self.experiment.save()

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._writer is None:
            return
        # A run that failed already reports an error, perhaps of the same disk; a second one must not hide it.
        with contextlib.suppress(*([] if status == "success" else [UserError])):
            self.save()

    @rank_zero_only
    def flush(self) -> None:
        """Write the rows logged so far and sync them to the disk."""
        self.experiment.save(sync=True)

    @property
    def num_rows(self) -> int:
        """Rows in the file; 0 on all ranks but rank 0, which writes it."""
        return self._writer.num_rows if self._writer is not None else 0

    @rank_zero_only
    def rewind(self, num_rows: int) -> None:
        """Keep the first ``num_rows`` rows; a run resumed there logs the others again."""
        self.experiment.keep(num_rows)


class _MetricsFile:
    """CSV file that grows by rows and occasionally by a column."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names, rows = _read(path)
        self.num_rows = len(rows)
        self._new_rows: list[dict[str, Any]] = []

    def add(self, values: dict[str, Any], step: int | None) -> None:
        self._new_rows.append({**values, "step": self.num_rows + len(self._new_rows) if step is None else step})

    def save(self, *, sync: bool = False) -> None:
        """Append the new rows, or rewrite the file if they have a new column."""
        names = sorted(set(self._names).union(*self._new_rows))
        with explain_failed_writes(self.path, "the metrics"):
            if names != self._names or ((self._new_rows or sync) and not self.path.is_file()):
                self._write([*_read(self.path)[1], *self._new_rows], names)
            elif self._new_rows or sync:
                with open(self.path, "a", newline="", encoding="utf-8") as file:
                    csv.DictWriter(file, names).writerows(self._new_rows)
                    file.flush()
                    if sync:
                        os.fsync(file.fileno())
        self.num_rows += len(self._new_rows)
        self._new_rows.clear()

    def keep(self, num_rows: int) -> None:
        """Drop all rows after the first ``num_rows``, including a last line that a killed process wrote in part."""
        rows = _read(self.path)[1][:num_rows]
        if self._names:
            with explain_failed_writes(self.path, "the metrics"):
                self._write(rows, self._names)
        self.num_rows = len(rows)

    def _write(self, rows: list[dict[str, Any]], names: list[str]) -> None:
        if not self.path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))
        with open_durably(self.path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
        self._names = names


def _read(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the column names and rows of a file, both empty if it does not exist."""
    if not path.is_file():
        return [], []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        return list(reader.fieldnames or []), list(reader)
