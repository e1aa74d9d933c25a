"""``memory``: the peak memory of a ``fit`` with the same options, without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from snake_lora_pl.cli.app import SnakeCLI, build_parsers
from snake_lora_pl.cli.dry_run import describe_memory
from snake_lora_pl.cli.run import run as run_training_command
from snake_lora_pl.data.batching import Batch
from snake_lora_pl.errors import UserError
from snake_lora_pl.program import LIGHTNING_COMMANDS, PROG
from snake_lora_pl.training.callbacks.auto_batch_size import AUTO
from snake_lora_pl.training.memory.available import available_bytes
from snake_lora_pl.training.memory.estimate import MemoryEstimate, estimate_memory


def run(arguments: Sequence[str]) -> int:
    """Estimate the peak memory of ``fit``, and compare it with the free memory of this machine.

    Args:
        arguments: Options of ``fit``, and ``--json``.

    Returns:
        The exit code.

    Raises:
        UserError: For every user error of ``fit``.
    """
    return run_training_command(["fit", *arguments], MemoryCLI)


def training_parsers() -> dict[str, LightningArgumentParser]:
    """Return the parsers of the commands that take the options of the model, the data and the trainer."""
    return build_parsers() | {"memory": build_parsers(MemoryCLI)["fit"]}


class MemoryCLI(SnakeCLI):
    """A ``fit`` that prints an estimate of its memory instead of training."""

    commands = ("fit",)

    @override
    def parser_settings(self) -> dict[str, Any]:
        settings = super().parser_settings()
        settings["fit"] |= {"description": LIGHTNING_COMMANDS["memory"], "usage": f"{PROG} memory [options]"}
        return settings

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--json", action="store_true", help="Print JSON.")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        self.config["fit"].dry_run = True  # claims no run directory

    @override
    def fit(self, **kwargs: Any) -> None:
        """Estimate the step on the batch of the longest rows."""
        data = self.datamodule
        if data.batch_size == AUTO:
            raise UserError("data.batch_size=auto depends on the free memory. Give a number to estimate, or run fit.")
        data.prepare_data()
        data.setup("fit")
        batch = data.longest_batch(data.batch_size)
        device = self.trainer.strategy.root_device
        estimate = estimate_memory(self.model, dict(batch), device.type)
        describe = _json if self.options.json else _text
        print(describe(estimate, batch, available_bytes(device)))


def _text(estimate: MemoryEstimate, batch: Batch, available: int) -> str:
    fits = (
        "the step fits"
        if estimate.total <= available
        else "the step does not fit. fit with --data.batch_size=auto finds a batch size that does"
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
