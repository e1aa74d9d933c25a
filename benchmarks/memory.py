"""Estimated peak memory of ``fit`` (command ``memory``), compared with the measured peak.

    python -m benchmarks.memory

Each run is a new process on the CPU, and its peak resident set is read from the operating system. It trains only on the
longest of generated rows, so that its batches are those of the estimate.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import PROGRAM, add_json_option, make_parser, write_json

ROWS_8, ROWS_2 = "--data.batch_size=8", "--data.batch_size=2"
CHECKPOINTING = "--model.gradient_checkpointing=true"
CASES = {
    "lora, 2 rows": [ROWS_2],
    "lora, 8 rows": [ROWS_8],
    "lora, 8 rows, checkpointing": [ROWS_8, CHECKPOINTING],
    "lora, 2 rows, float32": [ROWS_2, "--model.dtype=float32"],
    "lora, 8 rows, no fused layers": [ROWS_8, "--model.fused_layers=never"],
    "qlora, 2 rows": [ROWS_2, "--config=qlora.yaml"],
    "qlora, 8 rows": [ROWS_8, "--config=qlora.yaml"],
    "qlora, 8 rows, checkpointing": [ROWS_8, CHECKPOINTING, "--config=qlora.yaml"],
}


def write_longest_rows(path: Path, num_rows: int) -> None:
    """Write the longest rows of 20 generated games, without game ids."""
    from snake_lora_pl.data.generated_rows import write_dataset

    all_path = path.with_name("all.rows")
    write_dataset(all_path, 20, 10, "bfs", "bfs-512", 0)
    lines = sorted(all_path.read_text(encoding="utf-8").splitlines(), key=len)[-num_rows:]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def estimate(options: list[str]) -> dict[str, Any]:
    """Return the estimate of the command ``memory``."""
    done = subprocess.run([*PROGRAM, "memory", "--json", *options], check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure_peak_bytes(options: list[str], num_steps: int, directory: str) -> int:
    """Return the peak resident set of a ``fit`` of some steps."""
    command = [*PROGRAM, "fit", *options]
    command += [f"--trainer.max_steps={num_steps}", f"--root={directory}", "--trainer.enable_progress_bar=false"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}; see its output above")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = make_parser("memory", __doc__)
    parser.add_argument("--base_model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of each run (default: 3)")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    add_json_option(parser)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    print("| run | estimated GiB | measured GiB | error |")
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
            estimated = estimate(arguments)
            measured_bytes = measure_peak_bytes(arguments, options.steps, directory)
            results[name] = {**estimated, "measured_bytes": measured_bytes}
            error = estimated["total_bytes"] / measured_bytes - 1
            gib = [f"{num_bytes / 2**30:.2f}" for num_bytes in (estimated["total_bytes"], measured_bytes)]
            print(f"| {name} | {gib[0]} | {gib[1]} | {error:+.0%} |", flush=True)
    write_json(options.json, results)


if __name__ == "__main__":
    main()
