"""What two runs ended as, compared to the last bit."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from snake_lora_pl.paths import RunPaths

# What tells the time, not the run.
_TIMINGS = ("perf/", "_per_second", "time_elapsed", "training_timestamp")
# What Lightning leaves for a SLURM job that is requeued.
_REQUEUED_STATE = "hpc_ckpt"


def differences(one: Path, other: Path) -> list[str]:
    """Where two finished runs differ: their files, checkpoints, metrics, adapter and its metadata; timings aside.

    Args:
        one: A run's directory.
        other: Another one's.
    """
    found = []
    ends = dict(_end(one)), dict(_end(other))
    for name in sorted(ends[0].keys() | ends[1].keys()):
        values = [end.get(name, "nothing") for end in ends]
        if not _equal(*values):
            found.append(f"{name}: {_shown(values[0])} | {_shown(values[1])}")
    return found


def _end(run_dir: Path) -> Iterator[tuple[str, Any]]:
    import json

    import torch
    from safetensors.torch import load_file

    run = RunPaths(run_dir)
    artifacts = run.artifacts_dir
    with open(run.metrics_path, newline="") as file:
        content: dict[str, Any] = {"metrics.csv": list(csv.DictReader(file))}
    files = [path for path in run_dir.rglob("*") if path.is_file() and not path.name.startswith(_REQUEUED_STATE)]
    content["files"] = {str(path.relative_to(run_dir)): "there" for path in files}
    content["metadata"] = json.loads((artifacts / "adapter_metadata.json").read_text())
    content["adapter"] = load_file(artifacts / "adapter_model.safetensors")
    for path in sorted(run.checkpoints_dir.glob("*.ckpt")):
        content[path.name] = torch.load(path, weights_only=True)
    for name, value in _leaves(content):
        if not any(timing in name for timing in _TIMINGS):
            yield _without_place(name), _without_place(value) if isinstance(value, str) else value


def _without_place(text: str) -> str:
    return re.sub(r"/\S*(?=/checkpoints\b)", "", text)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if name.endswith("target_modules"):  # a set that PEFT writes as a list, in whatever order
        yield name, sorted(value)
    elif isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, f"{name} > {key}" if name else key)
    else:
        yield name, value


def _equal(one: Any, other: Any) -> bool:
    import torch

    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and one == other


def _shown(value: Any) -> str:
    return " ".join(str(value).split())[:60]
