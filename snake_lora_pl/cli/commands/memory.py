"""``audit --memory``: the peak memory of a ``fit``, before it runs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast

from snake_lora_pl.cli.app import SnakeCLI, build_and_run
from snake_lora_pl.cli.dry_run import describe_memory
from snake_lora_pl.console import configure_logging, ignore_known_warnings
from snake_lora_pl.data.batching import Batch
from snake_lora_pl.errors import UserError
from snake_lora_pl.training.callbacks.auto_batch_size import AUTO
from snake_lora_pl.training.memory.available import available_bytes
from snake_lora_pl.training.memory.estimate import MemoryEstimate, estimate_memory


def run(arguments: Sequence[str], *, as_json: bool) -> int:
    """Estimate what ``fit`` would take with a config, and say whether this machine has it.

    Args:
        arguments: Files of rows, and options as ``fit`` takes them, in any order.
        as_json: Print JSON.

    Returns:
        The exit code.

    Raises:
        UserError: For whatever is a mistake in ``fit``.
    """
    files, options = _split(arguments)
    if files:
        options.append(f"--data.train_path={files[0] if len(files) == 1 else json.dumps(files)}")
    configure_logging()
    ignore_known_warnings()
    run = cast(_Estimated, build_and_run(["fit", *options, "--dry_run"], _Estimated))
    available = available_bytes(run.trainer.strategy.root_device)
    print(_json(run.estimate, run.batch, available) if as_json else _text(run.estimate, run.batch, available))
    return 0


class _Estimated(SnakeCLI):
    """A ``fit`` that is set up and looked at."""

    estimate: MemoryEstimate
    batch: Batch

    def fit(self, **kwargs: Any) -> None:
        """Take the longest rows for the batch that needs most, and estimate the step on it."""
        data = self.datamodule
        if data.batch_size == AUTO:
            raise UserError("data.batch_size=auto takes what there is. Give a number to estimate, or run fit.")
        data.prepare_data()
        data.setup("fit")
        self.batch = data.longest_batch(data.batch_size)
        self.estimate = estimate_memory(self.model, dict(self.batch), self.trainer.strategy.root_device.type)


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell files from options and their values."""
    files: list[str] = []
    options: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            files.append(argument)
            continue
        options.append(argument)
        if "=" not in argument:
            options.extend(itertools.islice(rest, 1))
    return files, options


def _text(estimate: MemoryEstimate, batch: Batch, available: int) -> str:
    fits = (
        "it fits"
        if estimate.total <= available
        else "it does not fit. `fit` with --data.batch_size=auto finds what does"
    )
    return f"{describe_memory(estimate, batch)}\n  {available / 2**30:.2f} GiB are free on this machine: {fits}."


def _json(estimate: MemoryEstimate, batch: Batch, available: int) -> str:
    rows, tokens = batch["input_ids"].shape
    parts = {name: value for name, value in asdict(estimate).items() if name != "device"}
    return json.dumps(
        {
            "device": estimate.device,
            "rows": rows,
            "tokens_a_row": tokens,
            "total_bytes": estimate.total,
            "available_bytes": available,
            "parts_bytes": parts,
        },
        indent=2,
    )
