"""Dry run of ``fit``: its data, its memory, one step, and the paths of its files.

It writes nothing but a base model that is not on this machine yet, which the step needs. Encoded rows go to a temporary
directory.
"""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, cast

import lightning.pytorch as pl
from torch.utils.data import DataLoader, Dataset

from snake_lora_pl.data.audit_checks import audit_rows
from snake_lora_pl.data.audit_text import format_audit
from snake_lora_pl.data.batching import Batch
from snake_lora_pl.data.datamodule import DEFAULT_BATCH_SIZE, SnakeJSONLDataModule
from snake_lora_pl.data.encoding import Example
from snake_lora_pl.data.jsonl import count_lines
from snake_lora_pl.paths import RunPaths, cache_dir, display_path, temporary_row_cache
from snake_lora_pl.training.callbacks.token_throughput import peak_memory_gib
from snake_lora_pl.training.loss import select_targets
from snake_lora_pl.training.memory.estimate import MemoryEstimate, estimate_memory
from snake_lora_pl.training.module import LoRALightningModule

MAX_ROWS = 5_000
"""Rows that are read: enough to describe a data set, in seconds."""

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
"""Trainer arguments for one step that writes nothing; the others are those of the run."""


def print_dry_run(
    config_text: str,
    trainer: pl.Trainer,
    module: LoRALightningModule,
    data: SnakeJSONLDataModule,
    paths: RunPaths,
    accumulate_grad_batches: int,
) -> None:
    """Print the sections of a dry run one by one.

    Args:
        config_text: The resolved config.
        trainer: A trainer with ``TRAINER_SETTINGS``.
        module: The module that would be trained.
        data: Its data.
        paths: The files that the run would write.
        accumulate_grad_batches: Micro-batches per optimizer step of the run.

    Raises:
        UserError: For every error that would end the run before its first step is complete.
    """
    sections = _sections(trainer, module, data, paths, accumulate_grad_batches)
    for title, text in itertools.chain([("config", config_text.rstrip())], sections):
        if trainer.is_global_zero:
            print(f"{title}\n{text}\n", flush=True)
    if trainer.is_global_zero:
        print("Nothing was written. Without --dry_run this trains.")


def _sections(
    trainer: pl.Trainer,
    module: LoRALightningModule,
    data: SnakeJSONLDataModule,
    paths: RunPaths,
    accumulate_grad_batches: int,
) -> Iterator[tuple[str, str]]:
    """Yield the title and the text of each section."""
    with temporary_row_cache() as row_cache:
        num_games = data.generated_games
        data.limit_rows(MAX_ROWS)
        num_rows = data.batch_size if isinstance(data.batch_size, int) else DEFAULT_BATCH_SIZE
        auto_note = "" if data.batch_size == num_rows else "\n  data.batch_size=auto is resolved when training starts"
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
        scope = f"  the first {num_read:,} rows, {share:.1%} of all\n" if share < 1 else ""
        yield ("data", scope + format_audit(audit).replace(str(row_cache), str(cache_dir())))

        batch = data.longest_batch(num_rows)
        estimate = estimate_memory(module, dict(batch), trainer.strategy.root_device.type)
        yield ("memory", describe_memory(estimate, batch) + auto_note)

        num_batches = math.ceil(len(data.train_dataloader()) / share)
        steps_per_epoch = math.ceil(num_batches / accumulate_grad_batches)
        step = _take_step(trainer, module, data, batch, num_batches)
        per_step = f" of {accumulate_grad_batches} such batches" if accumulate_grad_batches > 1 else ""
        yield ("one step", f"{step}\n  an epoch has {steps_per_epoch:,} steps{per_step}")
    yield ("files", _describe_files(paths))


def _take_step(
    trainer: pl.Trainer, module: LoRALightningModule, data: SnakeJSONLDataModule, batch: Batch, num_batches: int
) -> str:
    timer = _OneStep(data.extreme_rows())
    trainer.callbacks.append(timer)  # type: ignore[attr-defined]
    # As many batches as an epoch of the run, because schedules span all of its steps.
    loader = DataLoader(_Repeated(batch, num_batches), batch_size=None, collate_fn=_identity)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no `val_dataloader`.*")
        trainer.fit(module, loader)
    targets = select_targets(batch["labels"])
    loss, norm = (float(trainer.callback_metrics[f"train/{name}"]) for name in ("loss", "gradient_norm"))
    speed = f"{targets.num_tokens / timer.duration_s:,.0f} tokens/s"
    trained, total = module.peft_model.get_nb_trainable_parameters()
    lines = [
        f"  {trained:,} of {total:,} parameters trained ({trained / total:.2%})",
        f"  loss {loss:.4f} on {len(targets.token_ids):,} target tokens, gradient norm {norm:.3g}",
        f"  {timer.duration_s:.1f} s, {speed}; the first step is the slowest",
        f"  peak memory of this process so far {peak_memory_gib(module.device):.2f} GiB",
    ]
    return "\n".join(lines)


class _OneStep(pl.Callback):
    """Checks the rows, stops training after the first batch and measures its duration."""

    def __init__(self, rows: list[Example]) -> None:
        self.duration_s = 0.0
        self._rows = rows

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        cast(LoRALightningModule, pl_module).check_rows(self._rows)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.duration_s = -time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.duration_s += time.perf_counter()
        trainer.should_stop = True


class _Repeated(Dataset[Batch]):
    """One batch, repeated."""

    def __init__(self, batch: Batch, num_batches: int) -> None:
        self._batch = batch
        self._num_batches = num_batches

    def __len__(self) -> int:
        return self._num_batches

    def __getitem__(self, index: int) -> Batch:
        return self._batch


def _identity(batch: Any) -> Any:
    return batch


def describe_memory(estimate: MemoryEstimate, batch: Batch) -> str:
    """Return lines with the total and the parts of an estimate for a batch."""
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
    files = {
        "run": paths.run_dir,
        "resolved config": paths.config_path,
        "metrics": paths.metrics_path,
        "checkpoints": paths.checkpoints_dir,
        "adapter": paths.artifacts_dir,
        "games": paths.games.games_dir,
        "cache": cache_dir(),
    }
    return "\n".join(f"  {name:<16} {display_path(path)}" for name, path in files.items())
