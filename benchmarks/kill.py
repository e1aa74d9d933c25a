"""Kill a run at random moments, let it go on, and compare its end with that of a run that was never killed.

    python -m benchmarks.kill --kills 50

Real processes die by SIGKILL, half of them while a checkpoint, an adapter or ``metrics.csv`` is being written, the
others at any moment from the first step on. A run that has come to its end makes room for the next. The model is a tiny
random one, so that the time goes into dying; ``--base_model`` takes another.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.same_run import differences
from snake_lora_pl.paths import RunPaths

SAVE_EVERY_N_STEPS = 5
# Some 20 batches an epoch, validations in the middle of it, dropout, and steps of two batches.
SETTINGS = [
    "--config=balanced.yaml",
    "--data.batch_size=8",
    "--data.val_fraction=0.2",
    "--model.lora.dropout=0.1",
    "--model.warmup_steps=5",
    "--model.max_new_tokens=2",
    "--trainer.accelerator=cpu",
    "--trainer.accumulate_grad_batches=2",
    "--trainer.limit_val_batches=2",
    "--trainer.enable_progress_bar=false",
    "--early_stopping.patience=1000",
    f"--checkpoint.save_every_n_steps={SAVE_EVERY_N_STEPS}",
]


@dataclasses.dataclass
class Kill:
    """What one kill left behind.

    Attributes:
        while_writing: Whether a file or directory was half written.
        steps_done: Optimiser steps the process had done, as ``metrics.csv`` tells.
        steps_saved: Optimiser steps that ``last.ckpt`` holds.
        complaints: What was lost or corrupt.
    """

    while_writing: bool
    steps_done: int
    steps_saved: int
    complaints: list[str]


class Victim:
    """A run that is killed now and then.

    Args:
        root: Its directory.
        arguments: The command ``fit`` and its options.
    """

    def __init__(self, root: Path, arguments: Sequence[str]) -> None:
        self.root = root
        self.arguments = list(arguments)
        root.mkdir()

    @property
    def run(self) -> RunPaths | None:
        """The run's places, once it has claimed a directory."""
        directories = list(self.root.glob("logs/extensions/models/*/*/*"))
        return RunPaths(directories[0]) if directories else None

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is something to go on from."""
        return self.run is not None and self.run.last_checkpoint_path.is_file()

    def start(self) -> subprocess.Popen[bytes]:
        """Begin, or go on where the last process died."""
        command = [sys.executable, "-m", "snake_lora_pl", *self.arguments, f"--root={self.root}", "--ckpt_path=auto"]
        if not self.has_checkpoint and self.run is not None:  # it died before the first: nothing to go on from
            for path in sorted(self.run.run_dir.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            self.run.remove_if_empty()
        with open(self.root / "output.txt", "ab") as output:
            return subprocess.Popen(command, stdout=output, stderr=output)

    def num_steps(self) -> int:
        """Optimiser steps that are logged."""
        if self.run is None or not self.run.metrics_path.is_file():
            return 0
        with open(self.run.metrics_path, newline="") as file:
            return sum(bool(row.get("train/loss")) for row in csv.DictReader(file))

    def half_written(self) -> list[Path]:
        """Files and directories on their way to their place."""
        run = self.run
        if run is None:
            return []
        return [
            *run.run_dir.glob(".*.tmp"),
            *run.checkpoints_dir.glob(".*.tmp"),
            *run.artifacts_dir.parent.glob(".*.tmp"),
        ]


def kill_once(victim: Victim, draw: random.Random) -> Kill | None:
    """Let a run go on and kill it; None if it came to its end first."""
    first_step = victim.num_steps()
    process = victim.start()
    while victim.num_steps() <= first_step and process.poll() is None:
        time.sleep(0.01)
    time.sleep(draw.uniform(0.0, 0.7))
    if draw.random() < 0.5:
        while not victim.half_written() and process.poll() is None:
            pass
        time.sleep(draw.uniform(0.0, 0.003))
    process.send_signal(signal.SIGKILL)
    code = process.wait()
    if code == 0:
        return None
    if code != -signal.SIGKILL:
        output = (victim.root / "output.txt").read_text()
        raise SystemExit(f"the run failed by itself, exit code {code}:\n{output[-2000:]}")
    return look_at(victim)


def look_at(victim: Victim) -> Kill:
    """Read all that a dead process left behind."""
    import torch

    from snake_lora_pl.adapters import store
    from snake_lora_pl.errors import UserError

    complaints = []
    steps_saved = 0
    run = victim.run
    if run is not None and run.checkpoints_dir.is_dir():
        for path in run.checkpoints_dir.glob("*.ckpt"):
            try:
                step = torch.load(path, weights_only=True)["global_step"]
            except Exception as error:
                complaints.append(f"{path.name}: {error}")
                continue
            steps_saved = step if path == run.last_checkpoint_path else steps_saved
        if run.artifacts_dir.exists():
            try:
                store.verify(run.artifacts_dir)
            except UserError as error:
                complaints.append(str(error))
    return Kill(bool(victim.half_written()), victim.num_steps(), steps_saved, complaints)


def run_to_its_end(victim: Victim) -> Path:
    """Let a run end by itself; its directory."""
    if victim.start().wait() != 0:
        raise SystemExit((victim.root / "output.txt").read_text()[-2000:])
    assert victim.run is not None
    return victim.run.run_dir


def kill_runs(
    work_dir: Path, arguments: Sequence[str], num_kills: int, seed: int, kills_a_run: int = 10
) -> tuple[list[Kill], list[str]]:
    """Kill runs until there were enough kills, and compare the end of each with that of one that was left alone.

    Args:
        work_dir: Where the runs' directories are made.
        arguments: The command ``fit`` and its options.
        num_kills: How often.
        seed: Of the moments.
        kills_a_run: Kills after which a run is let go to its end.

    Returns:
        The kills, and every difference between the runs' ends.
    """
    draw = random.Random(seed)
    straight = run_to_its_end(Victim(work_dir / "straight", arguments))
    kills: list[Kill] = []
    found: list[str] = []
    for number in itertools.count():
        victim = Victim(work_dir / f"killed-{number}", arguments)
        saved = 0
        for _ in range(min(kills_a_run, num_kills - len(kills))):
            kill = kill_once(victim, draw)
            if kill is None:
                break
            if kill.steps_saved < saved:
                kill.complaints.append(f"last.ckpt went back from step {saved} to {kill.steps_saved}")
            saved = kill.steps_saved
            kills.append(kill)
            print(f"kill {len(kills)}: {kill}", file=sys.stderr)
        found += differences(straight, run_to_its_end(victim))
        if len(kills) >= num_kills:
            return kills, found
    raise AssertionError("unreachable")


def table(kills: Sequence[Kill], found: Sequence[str]) -> Table:
    twice = [kill.steps_done - kill.steps_saved for kill in kills]
    figures = {
        "kills": len(kills),
        "of them while something was half written": sum(kill.while_writing for kill in kills),
        "files lost or corrupt": sum(len(kill.complaints) for kill in kills),
        "steps done twice, mean": f"{sum(twice) / len(twice):.1f}",
        f"steps done twice, most (save_every_n_steps={SAVE_EVERY_N_STEPS})": max(twice),
        "differences to the run never killed": len(found),
    }
    result = Table(show_header=False)
    for name, value in figures.items():
        result.add_row(name, str(value))
    return result


def write_tiny_model(directory: Path) -> None:
    """A random Llama of two layers with SmolLM2's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from snake_lora_pl.models import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m")
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how often")
    parser.add_argument("--base_model", help="directory, hub id or short name; by default a tiny random model")
    parser.add_argument("--max_epochs", type=int, default=12, help="epochs of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()

    from snake_lora_pl.data.generate import write_dataset

    with tempfile.TemporaryDirectory() as work_dir:
        rows_path = Path(work_dir, "rows.jsonl")
        write_dataset(rows_path, 4, 5, "bfs", "compact", 0)
        base_model = options.base_model
        if base_model is None:
            base_model = os.path.join(work_dir, "tiny")
            write_tiny_model(Path(base_model))
        arguments = ["fit", *SETTINGS, f"--trainer.max_epochs={options.max_epochs}", f"--data.train_path={rows_path}"]
        arguments.append(f"--model.base_model={base_model}")
        kills, found = kill_runs(Path(work_dir), arguments, options.kills, options.seed)
    console = Console()
    console.print(table(kills, found))
    for text in [*(complaint for kill in kills for complaint in kill.complaints), *found]:
        console.print(text, highlight=False)
    twice = max(kill.steps_done - kill.steps_saved for kill in kills)
    sys.exit(bool(found or any(kill.complaints for kill in kills) or twice > SAVE_EVERY_N_STEPS))


if __name__ == "__main__":
    main()
