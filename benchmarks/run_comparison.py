"""Bitwise comparison of two finished runs, for tests of resuming and for ``benchmarks.kill``."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from snake_lora_pl.paths import RunPaths

# Names of values that depend on the time of a run.
_TIMINGS = ("perf/", "_per_second", "time_elapsed", "training_timestamp")
# Checkpoints that Lightning writes for a requeued SLURM job.
_REQUEUE_CHECKPOINT = "hpc_ckpt"


def differences(run_dir: Path, other_dir: Path) -> list[str]:
    """Return the differences of two runs in files, checkpoints, metrics, adapter and metadata, except for timings."""
    values, other_values = dict(_read_run(run_dir)), dict(_read_run(other_dir))
    found = []
    for name in sorted(values.keys() | other_values.keys()):
        value, other = values.get(name, "missing"), other_values.get(name, "missing")
        if not _is_equal(value, other):
            found.append(f"{name}: {_shorten(value)} | {_shorten(other)}")
    return found


def _read_run(run_dir: Path) -> Iterator[tuple[str, Any]]:
    """Yield the values of a run by name; run directories in names and values are removed."""
    import torch
    from safetensors.torch import load_file

    run = RunPaths(run_dir)
    with open(run.metrics_path, newline="") as file:
        content: dict[str, Any] = {"metrics.csv": list(csv.DictReader(file))}
    files = [path for path in run_dir.rglob("*") if path.is_file() and not path.name.startswith(_REQUEUE_CHECKPOINT)]
    content["files"] = {str(path.relative_to(run_dir)): "present" for path in files}
    content["metadata"] = json.loads((run.artifacts_dir / "adapter_metadata.json").read_text())
    content["adapter"] = load_file(run.artifacts_dir / "adapter_model.safetensors")
    for path in sorted(run.checkpoints_dir.glob("*.ckpt")):
        content[path.name] = torch.load(path, weights_only=True)
    for name, value in _leaves(content):
        if not any(timing in name for timing in _TIMINGS):
            yield _without_run_dir(name), _without_run_dir(value) if isinstance(value, str) else value


def _without_run_dir(text: str) -> str:
    return re.sub(r"/\S*(?=/checkpoints\b)", "", text)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if name.endswith("target_modules"):  # PEFT writes a set as a list, in arbitrary order
        yield name, sorted(value)
    elif isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, f"{name} > {key}" if name else key)
    else:
        yield name, value


def _is_equal(value: Any, other: Any) -> bool:
    import torch

    if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(value, other)
    return type(value) is type(other) and value == other


def _shorten(value: Any) -> str:
    return " ".join(str(value).split())[:60]
