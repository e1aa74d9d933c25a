"""Helpers shared by the benchmarks: command lines, subprocesses, caches, tables and JSON files."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from snake_lora_pl.paths import CACHE_ENV, cache_dir

PROGRAM = [sys.executable, "-m", "snake_lora_pl"]
UPSTREAM_ROWS = "tests/data/heuristics_v0.04/grid-size-10/bfs-512/BFS-512_dataset.jsonl"


def make_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of a benchmark's command line, described by the docstring of its module."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--json``."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this JSON file")


def write_json(path: Path | None, results: Mapping[str, Any]) -> None:
    """Write results to the file of the option ``--json``, if it is set."""
    if path is not None:
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def settings_of(options: argparse.Namespace) -> dict[str, str]:
    """Return the options of a command line for a JSON file."""
    return {name: str(value) for name, value in vars(options).items()}


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def run_for_json(command: Sequence[str], env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run a command and return the JSON object on the last line of its standard output."""
    done = subprocess.run(command, check=True, env=env, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def make_empty_cache(directory: Path) -> dict[str, str]:
    """Create a cache directory that contains only the user's base models.

    Returns:
        The environment of a process that uses this cache, and so encodes all rows again.
    """
    cache = directory / "cache"
    cache.mkdir()
    (cache / "base_models").symlink_to(cache_dir() / "base_models")
    return {**os.environ, CACHE_ENV: str(cache)}


def process_memory_bytes(name: str) -> int:
    """Return an entry of ``/proc/self/status``: VmHWM is the peak resident set, RssAnon its private part, and so on."""
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return 1024 * int(value.split()[0])
    raise KeyError(name)
