"""``adapters``: a table of the adapters under a directory."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from snake_lora_pl.adapters.store import StoredAdapter, list_adapters
from snake_lora_pl.adapters.vllm import adapter_rank, vllm_obstacles
from snake_lora_pl.cli.commands.parser import Parser
from snake_lora_pl.paths import display_path
from snake_lora_pl.untrusted import printable

_NOT_KNOWN = "-"


def run(arguments: list[str]) -> int:
    """List adapters.

    Returns:
        The exit code.

    Raises:
        UserError: If there is no such directory.
    """
    options = build_parser().parse(arguments)
    rows = [_describe(adapter) for adapter in list_adapters(options.root)]
    print(json.dumps(rows, indent=2) if options.json else _table(rows, options.root))
    return 0


def build_parser() -> Parser:
    """The arguments of this verb."""
    parser = Parser("adapters", epilog="Every adapter is verified; below the table stands what is wrong with one.")
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
            "rank": adapter_rank(metadata.peft_config),
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
        return f"no adapter of snake_lora_pl under {root}"
    header = ("kind", "base", "rank", "step", "val loss", "apples", "size", "date", "directory")
    cells = [header, *(tuple(map(_on_one_line, _cells(row))) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    # A directory that the terminal would break has a line of its own. Elsewhere there is no width to keep to.
    does_fit = not sys.stdout.isatty() or sum(widths) + 2 * len(widths) <= shutil.get_terminal_size().columns
    gap = "  " if does_fit else "\n    "
    # Words to the left, numbers to the right; the last column is as long as it likes.
    lines = [
        "  ".join(f"{cell:{'<' if i in (0, 1, 7) else '>'}{width}}" for i, (cell, width) in enumerate(pairs[:-1]))
        + f"{gap}{pairs[-1][0]}"
        for pairs in (list(zip(line, widths, strict=True)) for line in cells)
    ]
    problems = [_on_one_line(f"damaged: {row['problem']}") for row in rows if row["problem"]]
    return "\n".join([*lines, *problems])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "adapter_type" not in row:
        return ("damaged", *[_NOT_KNOWN] * 7, row["path"])
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


def _on_one_line(text: str) -> str:
    """Names of strangers' directories must not break a line, nor steer a terminal."""
    return printable(text).replace("\n", "\\n")


def _number(value: float | None, form: str) -> str:
    return _NOT_KNOWN if value is None else format(value, form)
