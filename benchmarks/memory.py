"""What ``memory`` says of a ``fit`` beside what that ``fit`` takes: ``python -m benchmarks.memory``.

Each run is a process of its own on a CPU, and the system tells the peak of its resident set. It trains on the longest
of generated rows alone, so that its batches are the one that the estimate is for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROWS_8, ROWS_2 = "--data.batch_size=8", "--data.batch_size=2"
CHECKPOINTED = "--model.gradient_checkpointing=true"
CASES = {
    "lora, 2 rows": [ROWS_2],
    "lora, 8 rows": [ROWS_8],
    "lora, 8 rows, checkpointed": [ROWS_8, CHECKPOINTED],
    "lora, 2 rows, float32": [ROWS_2, "--model.dtype=float32"],
    "lora, 8 rows, the model's own layers": [ROWS_8, "--model.fused_layers=never"],
    "qlora, 2 rows": [ROWS_2, "--config=qlora.yaml"],
    "qlora, 8 rows": [ROWS_8, "--config=qlora.yaml"],
    "qlora, 8 rows, checkpointed": [ROWS_8, CHECKPOINTED, "--config=qlora.yaml"],
}


def write_longest_rows(path: Path, num_rows: int) -> None:
    """The longest rows of some games, which are then of one game."""
    from snake_lora_pl.data.generated_rows import write_dataset

    all_path = path.with_name("all.rows")
    write_dataset(all_path, 20, 10, "bfs", "bfs-512", 0)
    lines = sorted(all_path.read_text(encoding="utf-8").splitlines(), key=len)[-num_rows:]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def estimated_bytes(options: list[str]) -> dict[str, Any]:
    """What ``memory`` says."""
    command = [sys.executable, "-m", "snake_lora_pl", "memory", "--json", *options]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measured_bytes(options: list[str], steps: int, directory: str) -> int:
    """Peak resident set of a ``fit`` of some steps, without validation and games."""
    command = [sys.executable, "-m", "snake_lora_pl", "fit", *options]
    command += [f"--trainer.max_steps={steps}", f"--root={directory}", "--trainer.enable_progress_bar=false"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with code {process.returncode}; its own message stands above")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of each run")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    print("| run | estimated GiB | measured GiB | off by |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        rows_path = Path(directory) / "longest.jsonl"
        write_longest_rows(rows_path, 8 * options.steps)
        common = [
            "--config=balanced.yaml",
            f"--model.base_model={options.base_model}",
            f"--data.train_path={rows_path}",
            "--data.val_fraction=0",
            "--checkpoint.monitor=null",
            "--trainer.accelerator=cpu",
        ]
        for name in options.cases:
            arguments = [*common, *CASES[name]]
            estimate = estimated_bytes(arguments)
            measured = measured_bytes(arguments, options.steps, directory)
            figures[name] = {**estimate, "measured_bytes": measured}
            off = estimate["total_bytes"] / measured - 1
            print(
                f"| {name} | {estimate['total_bytes'] / 2**30:.2f} | {measured / 2**30:.2f} | {off:+.0%} |", flush=True
            )
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
