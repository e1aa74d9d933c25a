"""Options that make a run of the tiny model small enough for a test."""

from __future__ import annotations

from pathlib import Path


def small_run(base_model: Path, rows: Path, *flags: str) -> list[str]:
    """Return options of ``fit``, ``validate``, ``test`` and ``predict``; ``flags`` take precedence."""
    return [
        f"--model.base_model={base_model}",
        f"--data.train_path={rows}",
        "--data.batch_size=4",
        "--model.max_new_tokens=4",
        "--model.dtype=float32",
        "--trainer.accelerator=cpu",
        "--trainer.limit_val_batches=2",
        *flags,
    ]
