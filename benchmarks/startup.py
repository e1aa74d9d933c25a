"""Startup time of the commands, with a warm cache.

    python -m benchmarks.startup

Measures ``--help`` of every command, and ``fit`` from the command line to the end of its first optimizer step. The
commands take turns. A first round is not counted; it fills the cache with help texts, base model and encoded rows.
Times are wall-clock times, so other work on the machine affects them.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from benchmarks.common import PROGRAM, add_json_option, make_parser, write_json
from snake_lora_pl.program import LIGHT_COMMANDS, LIGHTNING_COMMANDS

FIT_OPTIONS = {
    "fit, balanced": ["--config=balanced.yaml"],
    "fit, balanced and quickstart": ["--config=balanced.yaml", "--config=quickstart.yaml", "--play.final_games=0"],
}
HELP_LIMIT_S, FIRST_STEP_LIMIT_S = 2, 20


class FirstStepTimer(pl.Callback):
    """Writes the times at which the first optimizer step starts and ends to a JSON file.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._times: dict[str, float] = {}

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Record the start."""
        self._times["start"] = time.time()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Record the end and write the file."""
        self._times["end"] = time.time()
        self.path.write_text(json.dumps(self._times), encoding="utf-8")


def time_help(arguments: list[str]) -> dict[str, float]:
    """Return the seconds until a help text is printed and the process has ended."""
    start = time.time()
    subprocess.run([*PROGRAM, *arguments], check=True, stdout=subprocess.DEVNULL)
    return {"seconds": time.time() - start}


def time_first_step(arguments: list[str]) -> dict[str, float]:
    """Return the seconds until the first optimizer step of a ``fit`` has ended, and the seconds of that step alone."""
    with tempfile.TemporaryDirectory() as directory:
        times_path = Path(directory) / "times.json"
        command = [
            *PROGRAM,
            "fit",
            *arguments,
            f"--root={directory}",
            "--trainer.max_steps=1",
            "--trainer.limit_val_batches=0",
            "--checkpoint.monitor=null",
            "--trainer.callbacks=benchmarks.startup.FirstStepTimer",
            f"--trainer.callbacks.path={times_path}",
        ]
        start = time.time()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        times = json.loads(times_path.read_text(encoding="utf-8"))
        return {"seconds": times["end"] - start, "step_seconds": times["end"] - times["start"]}


def main() -> None:
    parser = make_parser("startup", __doc__)
    parser.add_argument("--rounds", type=int, default=3, help="counted calls of each command (default: 3)")
    parser.add_argument("--only", choices=["help", "fit"], help="measure only one of the two")
    add_json_option(parser)
    options = parser.parse_args()
    commands: dict[str, Callable[[], dict[str, float]]] = {}
    if options.only != "fit":
        for command in ([], *([name] for name in (*LIGHTNING_COMMANDS, *LIGHT_COMMANDS))):
            commands[" ".join([*command, "--help"])] = partial(time_help, [*command, "--help"])
    if options.only != "help":
        commands |= {name: partial(time_first_step, arguments) for name, arguments in FIT_OPTIONS.items()}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for round_index in range(options.rounds + 1):
        for name, measure in commands.items():
            measured = measure()
            if round_index:
                times[name].append(measured)
    print("| command | median s | maximum s | first step s | limit s |")
    print("|---|---|---|---|---|")
    for name, measured_times in times.items():
        seconds = [measured["seconds"] for measured in measured_times]
        step, limit = "", HELP_LIMIT_S
        if name in FIT_OPTIONS:
            step = f"{statistics.median(measured['step_seconds'] for measured in measured_times):.1f}"
            limit = FIRST_STEP_LIMIT_S
        print(f"| `{name}` | {statistics.median(seconds):.2f} | {max(seconds):.2f} | {step} | {limit} |")
    write_json(options.json, times)


if __name__ == "__main__":
    main()
