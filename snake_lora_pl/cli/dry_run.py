"""A run rehearsed: what it would train on, in how much memory, one step of it, and where its files would go.

Nothing is written but a base model that is not on this machine yet: without it there is no step. Rows lie encoded in a
temporary directory meanwhile.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import lightning.pytorch as pl
from torch.utils.data import DataLoader, Dataset

from snake_lora_pl.data.audit_checks import audit_rows
from snake_lora_pl.data.audit_text import describe
from snake_lora_pl.data.batching import Batch
from snake_lora_pl.data.datamodule import DEFAULT_BATCH_SIZE, SnakeJSONLDataModule
from snake_lora_pl.data.jsonl import count_lines
from snake_lora_pl.paths import RunPaths, cache_dir, display_path, temporary_row_cache
from snake_lora_pl.training.callbacks.throughput import count_tokens, peak_memory_gib
from snake_lora_pl.training.memory.estimate import MemoryEstimate, estimate_memory
from snake_lora_pl.training.module import LoRALightningModule

MAX_ROWS = 5_000
"""Rows that are looked at: some seconds' work, and enough to see what is in them."""

TRAINER_SETTINGS: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "profiler": None,
    "fast_dev_run": False,
    "overfit_batches": 0.0,
    "limit_train_batches": None,
    "limit_val_batches": 0,
    "accumulate_grad_batches": 1,
}
"""What makes a trainer take one step and leave nothing behind; all else stays as the run would have it."""


class Section(NamedTuple):
    """One part of the report.

    Attributes:
        title: What it is about.
        text: Lines to show.
    """

    title: str
    text: str


def rehearse(
    trainer: pl.Trainer,
    module: LoRALightningModule,
    data: SnakeJSONLDataModule,
    paths: RunPaths,
    accumulate_grad_batches: int,
) -> Iterator[Section]:
    """Go through the parts of a run, each told as soon as it is known.

    Args:
        trainer: Made with ``TRAINER_SETTINGS``.
        module: What would be trained.
        data: What it would be trained on.
        paths: Where the run would lie.
        accumulate_grad_batches: Micro-batches in an optimizer step of the run.

    Raises:
        UserError: For whatever would end the run before its first step is over.
    """
    with temporary_row_cache() as row_cache:
        num_games = data.generated_games
        data.limit_rows(MAX_ROWS)
        num_rows = data.batch_size if isinstance(data.batch_size, int) else DEFAULT_BATCH_SIZE
        found_later = "" if data.batch_size == num_rows else "\n  data.batch_size=auto is found when training begins"
        data.batch_size = num_rows
        data.trainer = trainer
        data.prepare_data()
        data.setup("fit")
        row_paths = data.train_paths()
        audit = audit_rows([str(path) for path in row_paths], data.encoder, max(1, MAX_ROWS // len(row_paths)))
        num_read = audit.num_rows + sum(audit.bad_rows.values())
        share = num_read / count_lines(row_paths)
        if data.train_path is None:
            share *= data.generated_games / num_games
        first = f"  the first {num_read:,} rows, {share:.1%} of all\n" if share < 1 else ""
        yield Section("data", first + describe(audit).replace(str(row_cache), str(cache_dir())))

        batch = data.longest_batch(num_rows)
        estimate = estimate_memory(module, dict(batch), trainer.strategy.root_device.type)
        yield Section("memory", describe_memory(estimate, batch) + found_later)

        num_batches = math.ceil(len(data.train_dataloader()) / share)
        steps_per_epoch = math.ceil(num_batches / accumulate_grad_batches)
        step = _take_step(trainer, module, batch, num_batches)
        each = f" of {accumulate_grad_batches} such batches" if accumulate_grad_batches > 1 else ""
        yield Section("one step", f"{step}\n  an epoch has {steps_per_epoch:,} steps{each}")
    yield Section("files", _describe_files(paths))


def _take_step(trainer: pl.Trainer, module: LoRALightningModule, batch: Batch, num_batches: int) -> str:
    clock = _OneStep()
    trainer.callbacks.append(clock)  # type: ignore[attr-defined]
    # As many batches as an epoch of the run has: schedules are laid out over all of its steps.
    loader = DataLoader(_Repeated(batch, num_batches), batch_size=None, collate_fn=_as_it_is)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no `val_dataloader`.*")
        trainer.fit(module, loader)
    tokens, targets = count_tokens(batch["labels"])
    loss, norm = (float(trainer.callback_metrics[f"train/{name}"]) for name in ("loss", "gradient_norm"))
    trained, total = module.peft_model.get_nb_trainable_parameters()
    lines = [
        f"  {trained:,} of {total:,} parameters trained ({trained / total:.2%})",
        f"  loss {loss:.4f} on {targets:,} target tokens, gradient norm {norm:.3g}",
        f"  {clock.seconds:.1f} s, {tokens / clock.seconds:,.0f} tokens/s; the first step is the slowest",
        f"  peak memory of this process so far {peak_memory_gib(module.device):.2f} GiB",
    ]
    return "\n".join(lines)


class _OneStep(pl.Callback):
    """Ends training after its first batch, and says how long that took."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.seconds = -time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds += time.perf_counter()
        trainer.should_stop = True


class _Repeated(Dataset):
    def __init__(self, batch: Batch, num_batches: int) -> None:
        self._batch = batch
        self._num_batches = num_batches

    def __len__(self) -> int:
        return self._num_batches

    def __getitem__(self, index: int) -> Batch:
        return self._batch


def _as_it_is(batch: Any) -> Any:
    return batch


def describe_memory(estimate: MemoryEstimate, batch: Batch) -> str:
    """Lines that say what an estimate for a batch comes to, and of what it is made up."""
    rows, length = batch["input_ids"].shape
    parts = [(name, size) for name, size in asdict(estimate).items() if not isinstance(size, str) and size]
    return "\n".join(
        [
            f"  {estimate.total / 2**30:.2f} GiB at the peak, estimated for {estimate.device}",
            f"  for the {rows} longest rows as a batch, {length:,} tokens each, padding included",
            *(f"    {name:<12} {size / 2**30:6.2f} GiB" for name, size in parts),
        ]
    )


def _describe_files(paths: RunPaths) -> str:
    places = {
        "run": paths.run_dir,
        "resolved config": paths.config_path,
        "metrics": paths.metrics_path,
        "checkpoints": paths.checkpoints_dir,
        "adapter": paths.artifacts_dir,
        "games": paths.games.games_dir,
        "cache": cache_dir(),
    }
    return "\n".join(f"  {name:<16} {display_path(path)}" for name, path in places.items())
