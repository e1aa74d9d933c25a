"""Speed of data loading: encoding of rows, opening of encoded rows, and the time that training waits for batches.

    python -m benchmarks.data

Three measurements on generated rows, which contain no duplicates and as many repeated lines as real files:

1. Reading, checking and tokenizing rows into an empty cache, in turns with a batched ``datasets.map`` with the same
   tokenizer. All contenders must produce the same number of tokens.
2. Opening and splitting encoded rows by game, for one and several copies of the file.
3. The share of the time of a ``fit`` that its steps wait for batches.

Needs the extra ``bench``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.common import (
    PROGRAM,
    add_json_option,
    make_empty_cache,
    make_parser,
    markdown_table,
    run_for_json,
    write_json,
)
from benchmarks.interleaved import Turn, TurnTimer, run_interleaved, speed_ratio
from snake_lora_pl.constants import IGNORE_INDEX
from snake_lora_pl.paths import CACHE_ENV

OURS = "snake_lora_pl"
MAX_LENGTH = 4096  # no row is truncated, because datasets.map does not truncate
ROWS_PER_GAME = 200  # fewer than the mean of BFS on 10x10


@dataclass(frozen=True)
class EncodeSettings:
    """Settings shared by all contenders."""

    base_model: str
    rows_path: str


def write_rows(path: Path, num_rows: int, style: str) -> None:
    """Write rows of seeded games."""
    from snake_lora_pl.data.generated_rows import write_dataset

    all_path = path.with_name("all.rows")
    write_dataset(all_path, num_rows // ROWS_PER_GAME + 1, 10, "bfs", style, 0, num_workers=os.cpu_count() or 1)
    with open(all_path, encoding="utf-8") as file:
        lines = list(islice(file, num_rows))
    all_path.unlink()
    if len(lines) < num_rows:
        raise SystemExit(f"only {len(lines)} of {num_rows} rows were generated; reduce ROWS_PER_GAME")
    path.write_text("".join(lines), encoding="utf-8")


def run_ours(timer: TurnTimer, settings: EncodeSettings, num_turns: int) -> None:
    """Encode with this project's reader into an empty cache."""
    from snake_lora_pl.data.encoding import Encoder
    from snake_lora_pl.data.example_cache import open_examples
    from snake_lora_pl.models import load_tokenizer

    tokenizer = load_tokenizer(settings.base_model)
    for _ in range(num_turns):
        with tempfile.TemporaryDirectory() as directory:
            os.environ[CACHE_ENV] = directory
            timer.start()
            # A new encoder, because encoders cache lines.
            encoder = Encoder(tokenizer, max_length=MAX_LENGTH, on_overflow="error")
            rows = open_examples([Path(settings.rows_path)], encoder)
            timer.stop(int(rows.lengths().sum()), 0.0, 0.0)


def run_map(timer: TurnTimer, settings: EncodeSettings, num_turns: int, *, num_proc: int) -> None:
    """Encode with ``datasets.map`` of Hugging Face, many rows per call."""
    import datasets
    import pyarrow.compute

    from snake_lora_pl.models import load_tokenizer

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(settings.base_model)
    eos = tokenizer.eos_token_id

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        prompts = [f"### Instruction:\n{prompt}\n\n### Response:\n" for prompt in rows["prompt"]]
        prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        completion_ids = tokenizer(rows["completion"], add_special_tokens=False)["input_ids"]
        pairs = list(zip(prompt_ids, completion_ids, strict=True))
        return {
            "input_ids": [[*prompt, *completion, eos] for prompt, completion in pairs],
            "labels": [[IGNORE_INDEX] * len(prompt) + [*completion, eos] for prompt, completion in pairs],
        }

    for _ in range(num_turns):
        with tempfile.TemporaryDirectory() as directory:
            timer.start()
            rows = datasets.load_dataset("json", data_files=settings.rows_path, cache_dir=directory, split="train")
            rows = rows.map(encode, batched=True, num_proc=num_proc, remove_columns=rows.column_names)
            lengths = pyarrow.compute.list_value_length(rows.data.column("input_ids"))
            timer.stop(int(pyarrow.compute.sum(lengths).as_py()), 0.0, 0.0)


def time_opening(base_model: str, copies_dir: Path, num_files: int, environment: dict[str, str]) -> dict[str, Any]:
    """Return the number of encoded rows and the seconds to open and split them in a new process, without imports."""
    command = [sys.executable, "-m", "benchmarks.data", f"--base_model={base_model}", f"--open={copies_dir}"]
    command.append(f"--files={num_files}")
    run_for_json(command, environment)  # encodes the rows
    return run_for_json(command, environment)


def open_once(base_model: str, copies_dir: str, num_files: int) -> dict[str, Any]:
    """Open and split the rows of a directory in this process."""
    import torch  # noqa: F401  # so that imports are not measured

    from snake_lora_pl.data.datamodule import SnakeJSONLDataModule

    paths = sorted(map(str, Path(copies_dir).iterdir()))[:num_files]
    data = SnakeJSONLDataModule(base_model, paths, max_length=MAX_LENGTH)
    _ = data.tokenizer
    start = time.perf_counter()
    data.prepare_data()
    data.setup("fit")
    seconds = time.perf_counter() - start
    return {"rows": data.summary()["num_rows"], "seconds": seconds}


def measure_wait_share(base_model: str, rows_path: Path, num_steps: int, environment: dict[str, str]) -> float:
    """Return the last ``perf/data_wait_share`` of a short ``fit``."""
    with tempfile.TemporaryDirectory() as directory:
        command = [*PROGRAM, "fit", "--config=balanced.yaml", f"--root={directory}"]
        command += [f"--model.base_model={base_model}", f"--data.train_path={rows_path}", "--checkpoint.monitor=null"]
        command += [f"--trainer.max_steps={num_steps}", "--trainer.limit_val_batches=0"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        (path,) = Path(directory).rglob("metrics.csv")
        with open(path, newline="", encoding="utf-8") as file:
            shares = [row["perf/data_wait_share"] for row in csv.DictReader(file) if row["perf/data_wait_share"]]
    return float(shares[-1])


def print_encoding(turns: dict[str, list[Turn]], num_rows: int) -> None:
    """Print the speed of each contender."""
    rows = []
    for name, taken in turns.items():
        seconds = statistics.median(turn.duration_s for turn in taken)
        ratio = speed_ratio(turns[OURS], taken)
        speedup = "" if name == OURS else f"{ratio.median:.1f} ({ratio.min:.1f} to {ratio.max:.1f})"
        rows.append([name, f"{num_rows / seconds:,.0f}", f"{seconds:.1f}", speedup])
    print(markdown_table([f"encoding of {num_rows:,} rows", "rows/s", "s", "our speedup"], rows), flush=True)


def main() -> None:
    parser = make_parser("data", __doc__)
    parser.add_argument("--rows", type=int, default=100_000, help="number of generated rows (default: 100000)")
    parser.add_argument("--rows_path", type=Path, metavar="FILE", help="rows to read instead of generated ones")
    parser.add_argument("--style", default="bfs-512", help="style of the generated rows (default: bfs-512)")
    parser.add_argument("--rounds", type=int, default=3, help="counted turns of each contender; 0 skips the encoding")
    parser.add_argument(
        "--num_proc", type=int, nargs="+", default=[1, os.cpu_count() or 1], help="numbers of processes of datasets.map"
    )
    parser.add_argument("--base_model", default="smollm2-135m", help="base model whose tokenizer encodes the rows")
    parser.add_argument(
        "--files", type=int, nargs="*", default=[1, 10], help="numbers of copies of the file to open (default: 1 10)"
    )
    parser.add_argument("--steps", type=int, default=20, help="steps of the fit; 0 skips it (default: 20)")
    parser.add_argument("--open", help=argparse.SUPPRESS)
    add_json_option(parser)
    options = parser.parse_args()
    if options.open:
        print(json.dumps(open_once(options.base_model, options.open, options.files[0])))
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        rows_path = Path(directory) / "rows.jsonl"
        if options.rows_path is None:
            write_rows(rows_path, options.rows, options.style)
        else:
            shutil.copyfile(options.rows_path, rows_path)
        results["rows"] = rows_path.read_bytes().count(b"\n")
        if options.rounds:
            contenders: dict[str, Any] = {OURS: run_ours}
            for num_proc in dict.fromkeys(options.num_proc):
                contenders[f"datasets.map, {num_proc} processes"] = partial(run_map, num_proc=num_proc)
            turns = run_interleaved(contenders, EncodeSettings(options.base_model, str(rows_path)), options.rounds)
            num_tokens = {turn.num_units for taken in turns.values() for turn in taken}
            if len(num_tokens) != 1:
                raise SystemExit(f"the contenders produced different numbers of tokens: {sorted(num_tokens)}")
            print_encoding(turns, results["rows"])
            results["seconds"] = {name: [turn.duration_s for turn in taken] for name, taken in turns.items()}
        environment = make_empty_cache(Path(directory))
        copies_dir = Path(directory) / "copies"
        copies_dir.mkdir()
        for index in range(max(options.files, default=0)):
            shutil.copyfile(rows_path, copies_dir / f"{index:05}.jsonl")
        if options.files:
            opened = [time_opening(options.base_model, copies_dir, num, environment) for num in options.files]
            rows = [[f"{result['rows']:,}", f"{result['seconds']:.2f}"] for result in opened]
            print("\n" + markdown_table(["encoded rows", "s to open"], rows), flush=True)
            results["opened"] = opened
        if options.steps:
            share = measure_wait_share(options.base_model, rows_path, options.steps, environment)
            print(f"\nTraining waits for batches {share:.2%} of the time of {options.steps} steps.")
            results["data_wait_share"] = share
    write_json(options.json, results)


if __name__ == "__main__":
    main()
