"""Crash safety: runs that are killed at random moments and resumed, compared with a run that is not killed.

    python -m benchmarks.kill --kills 50

Processes that run the command ``fit`` are killed with SIGKILL: a third of them while they start or load a checkpoint, a
third while they train, validate or play, and a third while they write a file. Each run is killed ten times, then runs
to its end and must equal the uninterrupted run bit for bit. Processes are forked from one process that has imported
everything, which saves ten seconds per kill. The model is a tiny random one on the CPU, unless ``--base_model`` is set.
Exits with code 1 if anything is lost, corrupt or different.
"""

from __future__ import annotations

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

from benchmarks.common import make_parser
from benchmarks.run_comparison import differences
from snake_lora_pl.paths import RunPaths

SAVE_EVERY_N_STEPS = 5
# Validation and games run once per epoch, so that most checkpoints are written by the number of steps. Dropout and
# accumulated batches make the runs sensitive to the restored state.
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
KILLS_PER_RUN = 10
PROCESSES = multiprocessing.get_context("forkserver")


@dataclasses.dataclass
class Kill:
    """State of a run after a kill.

    Attributes:
        moment: The moment at which the process was to be killed, one of ``MOMENTS``.
        partial_files: Names of the files and directories that were being written.
        steps_done: Optimizer steps that the run had done, according to ``metrics.csv``.
        steps_saved: Optimizer steps in ``last.ckpt``.
        problems: What was lost or corrupt.
    """

    moment: str
    partial_files: list[str]
    steps_done: int
    steps_saved: int
    problems: list[str]

    @property
    def steps_lost(self) -> int:
        """Optimizer steps that the resumed run must repeat."""
        return self.steps_done - self.steps_saved


@dataclasses.dataclass
class Pace:
    """Durations of an uninterrupted process.

    Attributes:
        start_s: Seconds until its first step.
        training_s: Seconds from there to its end.
    """

    start_s: float
    training_s: float


def fit(arguments: Sequence[str], output_path: Path, environment: dict[str, str]) -> None:
    """Run a command line in this process, with its output in a file, and exit."""
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
    """Start the process that all others are forked from and import everything in it."""
    PROCESSES.set_forkserver_preload(["snake_lora_pl.cli.app", "transformers.models.llama.modeling_llama"])
    process = PROCESSES.Process(target=os.getpid)
    process.start()
    process.join()


class KilledRun:
    """A run that is killed and resumed.

    Args:
        root: Directory to create for the run.
        arguments: The command ``fit`` and its options.
    """

    def __init__(self, root: Path, arguments: Sequence[str]) -> None:
        self.root = root
        self.arguments = [*arguments, f"--root={root}", "--ckpt_path=auto"]
        root.mkdir()

    @property
    def paths(self) -> RunPaths | None:
        """The paths of the newest run directory, if there is one.

        A run that was killed before its first checkpoint starts again in a new directory.
        """
        directories = sorted(self.root.glob("logs/extensions/models/*/*/*"))
        return RunPaths(directories[-1]) if directories else None

    @property
    def output(self) -> str:
        """The output of all its processes."""
        path = self.root / "output.txt"
        return path.read_text() if path.exists() else ""

    def start(self) -> BaseProcess:
        """Start or resume the run."""
        arguments = (self.arguments, self.root / "output.txt", dict(os.environ))
        process = PROCESSES.Process(target=fit, args=arguments)
        process.start()
        return process

    def num_steps(self) -> int:
        """Return the number of optimizer steps in ``metrics.csv``."""
        if self.paths is None or not self.paths.metrics_path.is_file():
            return 0
        with open(self.paths.metrics_path, newline="") as file:
            return sum(bool(row.get("train/loss")) for row in csv.DictReader(file))

    def partial_files(self) -> list[str]:
        """Return the names of temporary files and directories, which are being written."""
        if self.paths is None:
            return []
        directories = [self.paths.run_dir, self.paths.checkpoints_dir, self.paths.artifacts_dir.parent]
        return [path.name for directory in directories for path in directory.glob(".*.tmp")]

    def wait_for_step(self, process: BaseProcess, num_steps: int) -> None:
        """Wait until more than ``num_steps`` steps are logged or the process has ended."""
        while self.num_steps() <= num_steps and process.is_alive():
            time.sleep(0.01)

    def finish(self) -> tuple[Path, Pace]:
        """Run to the end without a kill; return the run directory and the durations."""
        start = time.monotonic()
        num_steps = self.num_steps()
        process = self.start()
        self.wait_for_step(process, num_steps)
        first_step = time.monotonic()
        process.join()
        if process.exitcode != 0 or self.paths is None:
            raise SystemExit(f"the run failed with exit code {process.exitcode}:\n{self.output[-2000:]}")
        return self.paths.run_dir, Pace(first_step - start, time.monotonic() - first_step)


def kill_once(run: KilledRun, moment: str, pace: Pace, rng: random.Random) -> Kill | None:
    """Resume a run and kill it; return None if it ended before."""
    num_steps = run.num_steps()
    previous_partial_files = run.partial_files()
    process = run.start()
    if moment == "starting":
        time.sleep(rng.uniform(0, pace.start_s))
    else:
        run.wait_for_step(process, num_steps)
        time.sleep(rng.uniform(0, pace.training_s / KILLS_PER_RUN))
    if moment == "writing":
        stop_while_writing(run, process, rng)
    process.kill()
    process.join()
    if process.exitcode == 0:
        return None
    if process.exitcode != -signal.SIGKILL:
        raise SystemExit(f"the run failed with exit code {process.exitcode}:\n{run.output[-2000:]}")
    partial_files = [name for name in run.partial_files() if name not in previous_partial_files]
    return Kill(moment, partial_files, *inspect_files(run))


def stop_while_writing(run: KilledRun, process: BaseProcess, rng: random.Random) -> None:
    """Stop a process with SIGSTOP while it writes a file; return without a stop if it ends first."""
    if process.pid is None:
        raise ValueError("the process has not been started")
    with contextlib.suppress(ProcessLookupError):
        while process.is_alive():
            time.sleep(0.0005)
            if run.partial_files():
                time.sleep(rng.uniform(0, 0.003))
                os.kill(process.pid, signal.SIGSTOP)
                if run.partial_files():
                    return
                os.kill(process.pid, signal.SIGCONT)


def inspect_files(run: KilledRun) -> tuple[int, int, list[str]]:
    """Read the files of a killed run; return the steps done, the steps saved, and the problems."""
    import torch
    import yaml

    from snake_lora_pl.adapters import store
    from snake_lora_pl.errors import UserError

    problems = []
    steps_saved = 0
    paths = run.paths
    if paths is None:
        return 0, 0, []
    for path in paths.checkpoints_dir.glob("*.ckpt"):
        try:
            step = torch.load(path, weights_only=True)["global_step"]
        except Exception as error:
            problems.append(f"{path.name}: {error}")
            continue
        steps_saved = step if path == paths.last_checkpoint_path else steps_saved
    if paths.artifacts_dir.exists():
        try:
            store.verify(paths.artifacts_dir)
        except UserError as error:
            problems.append(str(error))
    if paths.last_checkpoint_path.exists() and "model" not in (yaml.safe_load(paths.config_path.read_text()) or {}):
        problems.append("config.yaml has no key 'model'")
    return run.num_steps(), steps_saved, problems


def kill_repeatedly(run: KilledRun, num_kills: int, pace: Pace, rng: random.Random) -> list[Kill]:
    """Kill a run a number of times, or until it ends."""
    moments = rng.sample(MOMENTS, len(MOMENTS))
    kills: list[Kill] = []
    for moment in itertools.islice(itertools.cycle(moments), num_kills):
        kill = kill_once(run, moment, pace, rng)
        if kill is None:
            break
        if kills and kill.steps_saved < kills[-1].steps_saved:
            kill.problems.append(f"last.ckpt went back from step {kills[-1].steps_saved} to {kill.steps_saved}")
        kills.append(kill)
        print(f"{run.root.name}: {kill}", file=sys.stderr)
    return kills


def kill_runs(
    work_dir: Path, arguments: Sequence[str], num_kills: int, seed: int, num_parallel: int = 1
) -> tuple[list[Kill], list[list[str]]]:
    """Kill runs until there are enough kills, and compare the end of each with an uninterrupted run.

    Args:
        work_dir: Directory in which the runs' directories are created.
        arguments: The command ``fit`` and its options.
        num_kills: Number of kills.
        seed: Seed of the moments of the kills.
        num_parallel: Number of concurrent runs.

    Returns:
        The kills, and the differences of each killed run from the uninterrupted one.
    """
    warm_up()
    reference_dir, pace = KilledRun(work_dir / "reference", arguments).finish()
    kills: list[Kill] = []
    differences_by_run: list[list[str]] = []

    def kill_and_compare(number: int, num_kills_of_run: int) -> tuple[list[Kill], list[str]]:
        run = KilledRun(work_dir / f"killed-{number}", arguments)
        kills_of_run = kill_repeatedly(run, num_kills_of_run, pace, random.Random(f"{seed} {number}"))
        return kills_of_run, differences(reference_dir, run.finish()[0])

    with ThreadPoolExecutor(num_parallel) as pool:
        while (missing := num_kills - len(kills)) > 0:
            shares = [min(KILLS_PER_RUN, missing - begin) for begin in range(0, missing, KILLS_PER_RUN)]
            results = pool.map(kill_and_compare, itertools.count(len(differences_by_run)), shares)
            for kills_of_run, differences_of_run in results:
                kills += kills_of_run
                differences_by_run.append(differences_of_run)
    return kills, differences_by_run


def table(kills: Sequence[Kill]) -> Table:
    """Return a table of the kills by moment."""
    result = Table("killed while", "kills", "with partial files", "problems", "steps lost, mean", "maximum")
    for moment in (*MOMENTS, "all"):
        selected = [kill for kill in kills if moment in (kill.moment, "all")]
        if not selected:
            continue
        steps_lost = [kill.steps_lost for kill in selected]
        result.add_row(
            moment,
            str(len(selected)),
            str(sum(bool(kill.partial_files) for kill in selected)),
            str(sum(len(kill.problems) for kill in selected)),
            f"{sum(steps_lost) / len(steps_lost):.1f}",
            str(max(steps_lost)),
        )
    return result


def write_tiny_model(directory: Path) -> None:
    """Write a random Llama with two layers and SmolLM2's tokenizer."""
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
    parser = make_parser("kill", __doc__)
    parser.add_argument("--kills", type=int, default=50, help="number of kills (default: 50)")
    parser.add_argument("--base_model", help="directory, hub id or short name; a tiny random model if not set")
    parser.add_argument("--max_epochs", type=int, default=12, help="epochs of each run (default: 12)")
    parser.add_argument("--at_once", type=int, default=5, help="number of concurrent runs (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills (default: 0)")
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
        kills, differences_by_run = kill_runs(Path(work_dir), arguments, options.kills, options.seed, options.at_once)
    console = Console(width=110, highlight=False)
    console.print(table(kills))
    num_equal = sum(not found for found in differences_by_run)
    console.print(
        f"{num_equal} of {len(differences_by_run)} killed runs ended bit for bit like the uninterrupted run "
        f"(checkpoint.save_every_n_steps={SAVE_EVERY_N_STEPS})."
    )
    problems = [text for texts in [*(kill.problems for kill in kills), *differences_by_run] for text in texts]
    for text in problems:
        console.print(text)
    max_steps_lost = max(kill.steps_lost for kill in kills)
    sys.exit(bool(problems or max_steps_lost > SAVE_EVERY_N_STEPS))


if __name__ == "__main__":
    main()
