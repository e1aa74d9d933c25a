"""``adapters``: a table of the adapters under a directory."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from snake_lora_pl.adapters.store import StoredAdapter, list_adapters
from snake_lora_pl.adapters.vllm import vllm_obstacles
from snake_lora_pl.cli.commands.light_parser import CommandParser
from snake_lora_pl.paths import display_path
from snake_lora_pl.untrusted import printable

_UNKNOWN = "-"


def run(arguments: Sequence[str]) -> int:
    """List adapters.

    Returns:
        The exit code.

    Raises:
        UserError: If the directory does not exist.
    """
    options = build_parser().parse(arguments)
    rows = [_describe(adapter) for adapter in list_adapters(options.root)]
    print(json.dumps(rows, indent=2) if options.json else _table(rows, options.root))
    return 0


def build_parser() -> CommandParser:
    """Return the parser of this command."""
    parser = CommandParser("adapters", epilog="Every adapter is verified; problems are listed below the table.")
    parser.add_argument("root", nargs="?", default=".", metavar="ROOT", help="directory to look under")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _describe(adapter: StoredAdapter) -> dict[str, Any]:
    metadata = adapter.metadata
    row: dict[str, Any] = {"path": display_path(adapter.path), "problem": adapter.problem}
    if metadata is not None:
        row |= {
            "adapter_type": metadata.adapter_type,
            "base_model": metadata.base_model_name,
            "rank": metadata.rank,
            "step": metadata.step,
            "val_loss": metadata.metrics.get("val/loss"),
            "apples_mean": metadata.metrics.get("play/apples_mean"),
            "weights_bytes": adapter.weights_bytes,
            "training_timestamp": metadata.training_timestamp,
            "vllm_obstacles": vllm_obstacles(metadata.peft_config),
        }
    return row


def _table(rows: Sequence[dict[str, Any]], root: str) -> str:
    if not rows:
        return f"no adapters under {root}"
    header = ("type", "base", "rank", "step", "val loss", "apples", "size", "date", "directory")
    cells = [header, *(tuple(map(_escape, _cells(row))) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    # A narrow terminal gets the directories on separate lines.
    does_fit = not sys.stdout.isatty() or sum(widths) + 2 * len(widths) <= shutil.get_terminal_size().columns
    gap = "  " if does_fit else "\n    "
    # Text is left-aligned, numbers are right-aligned; the last column has no fixed width.
    lines = [
        "  ".join(f"{cell:{'<' if i in (0, 1, 7) else '>'}{width}}" for i, (cell, width) in enumerate(pairs[:-1]))
        + f"{gap}{pairs[-1][0]}"
        for pairs in (list(zip(line, widths, strict=True)) for line in cells)
    ]
    problems = [_escape(f"damaged: {row['problem']}") for row in rows if row["problem"]]
    return "\n".join([*lines, *problems])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "adapter_type" not in row:
        return ("damaged", *[_UNKNOWN] * 7, row["path"])
    return (
        "damaged" if row["problem"] else row["adapter_type"],
        row["base_model"],
        _number(row["rank"], "d"),
        _number(row["step"], ",d"),
        _number(row["val_loss"], ".4f"),
        _number(row["apples_mean"], ".1f"),
        f"{row['weights_bytes'] / 1e6:.1f} MB",
        row["training_timestamp"][:16].replace("T", " "),
        row["path"],
    )


def _escape(text: str) -> str:
    """Escape line breaks and control characters, which names of directories may contain."""
    return printable(text).replace("\n", "\\n")


def _number(value: float | None, form: str) -> str:
    return _UNKNOWN if value is None else format(value, form)
