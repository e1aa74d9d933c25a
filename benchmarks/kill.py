"""Kill a run at random moments, let it go on, and compare its end with that of a run that was never killed.

    python -m benchmarks.kill --kills 50

Real processes that run the command ``fit`` die by SIGKILL: a third of them while they start or take up a checkpoint, a
third while they train, validate or play, a third while a file is being written. They are forked from one process that
has imported everything, which saves ten seconds a kill. Each run is killed ten times and then let go to its end, five
runs side by side. The model is a tiny random one, so that the time goes into dying; ``--base_model`` takes another.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import itertools
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.same_run import differences
from snake_lora_pl.paths import RunPaths

SAVE_EVERY_N_STEPS = 5
# Validation and games once an epoch, so that most steps are saved by their number; dropout, and steps of two batches.
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
    "--trainer.val_check_interval=1.0",
    "--trainer.enable_progress_bar=false",
    "--early_stopping.patience=1000",
    "--play.val_games=2",
    "--play.max_steps=3",
    f"--checkpoint.save_every_n_steps={SAVE_EVERY_N_STEPS}",
]
MOMENTS = ("starting", "training", "writing")
KILLS_A_RUN = 10
PROCESSES = multiprocessing.get_context("forkserver")


@dataclasses.dataclass
class Kill:
    """What one kill left behind.

    Attributes:
        moment: What the process was to be killed at, one of ``MOMENTS``.
        half_written: Names of the files and directories that it was writing.
        steps_done: Optimizer steps that the run had done, as ``metrics.csv`` tells.
        steps_saved: Optimizer steps that ``last.ckpt`` holds.
        complaints: What was lost or corrupt.
    """

    moment: str
    half_written: list[str]
    steps_done: int
    steps_saved: int
    complaints: list[str]


@dataclasses.dataclass
class Pace:
    """How long a process took.

    Attributes:
        start_s: Until its first step.
        training_s: From there to the run's end.
    """

    start_s: float
    training_s: float


def fit(arguments: Sequence[str], output_path: Path, environment: dict[str, str]) -> None:
    """Be the process of a run: the command as a user gives it, its output in a file."""
    import torch

    from snake_lora_pl.__main__ import main

    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(output_path, "ab") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    sys.exit(main(list(arguments)))


def warm_up() -> None:
    """Start the process that all others are forked from; it imports what every run does."""
    PROCESSES.set_forkserver_preload(["snake_lora_pl.cli.app", "transformers.models.llama.modeling_llama"])
    process = PROCESSES.Process(target=os.getpid)
    process.start()
    process.join()


class Victim:
    """A run that is killed now and then.

    Args:
        root: Where its directory is made.
        arguments: The command ``fit`` and its options.
    """

    def __init__(self, root: Path, arguments: Sequence[str]) -> None:
        self.root = root
        self.arguments = [*arguments, f"--root={root}", "--ckpt_path=auto"]
        root.mkdir()

    @property
    def run(self) -> RunPaths | None:
        """The run's places, once it has a directory; one that died before its first checkpoint begins in a new one."""
        directories = sorted(self.root.glob("logs/extensions/models/*/*/*"))
        return RunPaths(directories[-1]) if directories else None

    @property
    def output(self) -> str:
        """What its processes have printed."""
        path = self.root / "output.txt"
        return path.read_text() if path.exists() else ""

    def start(self) -> BaseProcess:
        """Begin, or go on where the last process died."""
        arguments = (self.arguments, self.root / "output.txt", dict(os.environ))
        process = PROCESSES.Process(target=fit, args=arguments)
        process.start()
        return process

    def num_steps(self) -> int:
        """Optimizer steps that are logged."""
        if self.run is None or not self.run.metrics_path.is_file():
            return 0
        with open(self.run.metrics_path, newline="") as file:
            return sum(bool(row.get("train/loss")) for row in csv.DictReader(file))

    def half_written(self) -> list[str]:
        """Files and directories on their way to their place."""
        if self.run is None:
            return []
        directories = [self.run.run_dir, self.run.checkpoints_dir, self.run.artifacts_dir.parent]
        return [path.name for directory in directories for path in directory.glob(".*.tmp")]

    def run_to_its_end(self) -> tuple[Path, Pace]:
        """Let it end by itself; its directory, and how long things took."""
        begin = time.monotonic()
        num_steps = self.num_steps()
        process = self.start()
        while self.num_steps() <= num_steps and process.is_alive():
            time.sleep(0.01)
        first_step = time.monotonic()
        process.join()
        if process.exitcode != 0 or self.run is None:
            raise SystemExit(f"exit code {process.exitcode}:\n{self.output[-2000:]}")
        return self.run.run_dir, Pace(first_step - begin, time.monotonic() - first_step)


def kill_once(victim: Victim, moment: str, pace: Pace, draw: random.Random) -> Kill | None:
    """Let a run go on and kill it; None if it came to its end first."""
    first_step = victim.num_steps()
    left_before = victim.half_written()
    process = victim.start()
    if moment == "starting":
        time.sleep(draw.uniform(0, pace.start_s))
    else:
        while victim.num_steps() <= first_step and process.is_alive():
            time.sleep(0.01)
        time.sleep(draw.uniform(0, pace.training_s / KILLS_A_RUN))
    if moment == "writing":
        stop_while_writing(victim, process, draw)
    process.kill()
    process.join()
    if process.exitcode == 0:
        return None
    if process.exitcode != -signal.SIGKILL:
        raise SystemExit(f"the run failed by itself, exit code {process.exitcode}:\n{victim.output[-2000:]}")
    half_written = [name for name in victim.half_written() if name not in left_before]
    return Kill(moment, half_written, *look_at(victim))


def stop_while_writing(victim: Victim, process: BaseProcess, draw: random.Random) -> None:
    """Freeze a process somewhere in the writing of a file, unless it ends before."""
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):
        while process.is_alive():
            time.sleep(0.0005)
            if victim.half_written():
                time.sleep(draw.uniform(0, 0.003))
                os.kill(process.pid, signal.SIGSTOP)
                if victim.half_written():
                    return
                os.kill(process.pid, signal.SIGCONT)


def look_at(victim: Victim) -> tuple[int, int, list[str]]:
    """Read all that a dead process left behind: the steps done, the steps saved, and what cannot be read."""
    import torch
    import yaml

    from snake_lora_pl.adapters import store
    from snake_lora_pl.errors import UserError

    complaints = []
    steps_saved = 0
    run = victim.run
    if run is None:
        return 0, 0, []
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
    if run.last_checkpoint_path.exists() and "model" not in (yaml.safe_load(run.config_path.read_text()) or {}):
        complaints.append("config.yaml has no model")
    return victim.num_steps(), steps_saved, complaints


def kill_a_run(victim: Victim, num_kills: int, pace: Pace, draw: random.Random) -> list[Kill]:
    """Kill a run some times, or as often as it takes it to come to its end."""
    moments = draw.sample(MOMENTS, len(MOMENTS))
    kills: list[Kill] = []
    for moment in itertools.islice(itertools.cycle(moments), num_kills):
        kill = kill_once(victim, moment, pace, draw)
        if kill is None:
            break
        if kills and kill.steps_saved < kills[-1].steps_saved:
            kill.complaints.append(f"last.ckpt went back from step {kills[-1].steps_saved} to {kill.steps_saved}")
        kills.append(kill)
        print(f"{victim.root.name}: {kill}", file=sys.stderr)
    return kills


def kill_runs(
    work_dir: Path, arguments: Sequence[str], num_kills: int, seed: int, at_once: int = 1
) -> tuple[list[Kill], list[list[str]]]:
    """Kill runs until there were enough kills, and compare the end of each with that of one that was left alone.

    Args:
        work_dir: Where the runs' directories are made.
        arguments: The command ``fit`` and its options.
        num_kills: How often.
        seed: Of the moments.
        at_once: Runs that go on side by side.

    Returns:
        The kills, and of each run that was killed every difference between its end and that of the one left alone.
    """
    warm_up()
    straight, pace = Victim(work_dir / "straight", arguments).run_to_its_end()
    kills: list[Kill] = []
    found: list[list[str]] = []

    def kill_and_compare(number: int, share: int) -> tuple[list[Kill], list[str]]:
        victim = Victim(work_dir / f"killed-{number}", arguments)
        of_this = kill_a_run(victim, share, pace, random.Random(f"{seed} {number}"))
        return of_this, differences(straight, victim.run_to_its_end()[0])

    with ThreadPoolExecutor(at_once) as pool:
        while (missing := num_kills - len(kills)) > 0:
            shares = [min(KILLS_A_RUN, missing - begin) for begin in range(0, missing, KILLS_A_RUN)]
            for of_one, differing in pool.map(kill_and_compare, itertools.count(len(found)), shares):
                kills += of_one
                found.append(differing)
    return kills, found


def table(kills: Sequence[Kill]) -> Table:
    """What the kills did, in figures."""
    result = Table(
        "killed while", "kills", "in a half-written file", "lost or corrupt", "steps done twice: mean", "most"
    )
    for moment in (*MOMENTS, "all"):
        of_moment = [kill for kill in kills if moment in (kill.moment, "all")]
        if not of_moment:
            continue
        twice = [kill.steps_done - kill.steps_saved for kill in of_moment]
        result.add_row(
            moment,
            str(len(of_moment)),
            str(sum(bool(kill.half_written) for kill in of_moment)),
            str(sum(len(kill.complaints) for kill in of_moment)),
            f"{sum(twice) / len(twice):.1f}",
            str(max(twice)),
        )
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
    parser.add_argument("--at_once", type=int, default=5, help="runs that go on side by side")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()

    from snake_lora_pl.data.generated_rows import write_dataset

    with tempfile.TemporaryDirectory() as work_dir:
        rows_path = Path(work_dir, "rows.jsonl")
        write_dataset(rows_path, 4, 5, "bfs", "compact", 0)
        base_model = options.base_model
        if base_model is None:
            base_model = os.path.join(work_dir, "tiny")
            write_tiny_model(Path(base_model))
        arguments = ["fit", *SETTINGS, f"--trainer.max_epochs={options.max_epochs}", f"--data.train_path={rows_path}"]
        arguments.append(f"--model.base_model={base_model}")
        kills, found = kill_runs(Path(work_dir), arguments, options.kills, options.seed, options.at_once)
    console = Console(width=110, highlight=False)
    console.print(table(kills))
    same = sum(not differing for differing in found)
    console.print(
        f"{len(found)} runs were killed again and again; {same} of them ended bit for bit as the run left alone. "
        f"checkpoint.save_every_n_steps is {SAVE_EVERY_N_STEPS}."
    )
    complaints = [text for texts in [*(kill.complaints for kill in kills), *found] for text in texts]
    for text in complaints:
        console.print(text)
    twice = max(kill.steps_done - kill.steps_saved for kill in kills)
    sys.exit(bool(complaints or twice > SAVE_EVERY_N_STEPS))


if __name__ == "__main__":
    main()
