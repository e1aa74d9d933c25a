"""How long a command takes to answer: ``python -m benchmarks.startup``.

Every verb's ``--help``, and ``fit`` from the command to the end of its first optimizer step, with everything cached
that an earlier run leaves: base model, rows and encoded rows. The commands take turns, and a first round that warms up
is not counted. Other work on the machine counts: the times are of the clock, not of the processor.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from snake_lora_pl.program import LIGHT_COMMANDS, LIGHTNING_COMMANDS

PROGRAM = [sys.executable, "-m", "snake_lora_pl"]
RUNS = {
    "fit, balanced": ["--config=balanced.yaml"],
    "fit, balanced and quickstart": ["--config=balanced.yaml", "--config=quickstart.yaml", "--play.final_games=0"],
}
HELP_LIMIT_S, FIRST_STEP_LIMIT_S = 2, 20


class Clock(pl.Callback):
    """Writes down when the first step begins and when it is over.

    Args:
        path: Where to.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._times: dict[str, float] = {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The model is loaded and the first batch is there."""
        self._times["begins"] = time.time()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The first optimizer step is over; more are not taken."""
        self._times["ends"] = time.time()
        self.path.write_text(json.dumps(self._times), encoding="utf-8")


def time_help(arguments: list[str]) -> dict[str, float]:
    """Seconds until a help text is printed and the process gone."""
    start = time.time()
    subprocess.run([*PROGRAM, *arguments], check=True, stdout=subprocess.DEVNULL)
    return {"seconds": time.time() - start}


def time_first_step(arguments: list[str]) -> dict[str, float]:
    """Seconds until the first optimizer step of a ``fit`` is over, and how long that step alone took."""
    with tempfile.TemporaryDirectory() as directory:
        times_path = Path(directory) / "times.json"
        command = [*PROGRAM, "fit", *arguments, f"--root={directory}", "--trainer.max_steps=1"]
        command += ["--trainer.limit_val_batches=0", "--checkpoint.monitor=null"]
        command += ["--trainer.callbacks=benchmarks.startup.Clock", f"--trainer.callbacks.path={times_path}"]
        start = time.time()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        times = json.loads(times_path.read_text(encoding="utf-8"))
    return {"seconds": times["ends"] - start, "step_seconds": times["ends"] - times["begins"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["help", "fit"], help="one of the two tables")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    commands: dict[str, Callable[[], dict[str, float]]] = {}
    if options.only != "fit":
        for verb in ("", *LIGHTNING_COMMANDS, *LIGHT_COMMANDS):
            arguments = [*([verb] if verb else []), "--help"]
            commands[" ".join(arguments)] = lambda arguments=arguments: time_help(arguments)
    if options.only != "help":
        for name, arguments in RUNS.items():
            commands[name] = lambda arguments=arguments: time_first_step(arguments)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for round_index in range(options.rounds + 1):
        for name, measure in commands.items():
            measured = measure()
            if round_index:
                times[name].append(measured)
    print("| command | median s | slowest s | of it the step | allowed s |")
    print("|---|---|---|---|---|")
    for name, measured in times.items():
        seconds = [one["seconds"] for one in measured]
        step = f"{statistics.median(one['step_seconds'] for one in measured):.1f}" if name in RUNS else ""
        limit = FIRST_STEP_LIMIT_S if name in RUNS else HELP_LIMIT_S
        print(f"| `{name}` | {statistics.median(seconds):.2f} | {max(seconds):.2f} | {step} | {limit} |")
    if options.json is not None:
        options.json.write_text(json.dumps(times, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
