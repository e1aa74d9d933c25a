"""The way from a file of rows to batches: ``python -m benchmarks.data`` (extra ``bench``).

First: reading, checking and tokenizing rows, prompt and completion apart, beside ``datasets.map`` over batches of rows
with the same tokenizer. The rows are generated games, none of them twice: lines are as often the same as they are in
real files. Every turn begins with empty caches, and all must come to the same number of tokens. Second: opening encoded
rows, split by game; copies of the file stand for more rows. Third: the share of a run's time that its steps wait for
rows.
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
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.contest import Referee, Turn, ratio, run_contest
from snake_lora_pl.paths import CACHE_ENV, cache_dir

OURS = "snake_lora_pl"
MAX_LENGTH = 4096  # nothing is shortened: datasets.map does not
ROWS_A_GAME = 200  # of BFS on 10x10 there are more


def write_rows(path: Path, num_rows: int, style: str) -> None:
    """That many rows of seeded games."""
    from snake_lora_pl.data.generated_rows import write_dataset

    all_path = path.with_name("all.rows")
    write_dataset(all_path, num_rows // ROWS_A_GAME + 1, 10, "bfs", style, 0, num_workers=os.cpu_count() or 1)
    with open(all_path, encoding="utf-8") as games, open(path, "w", encoding="utf-8") as file:
        written = 0
        for line in games:
            if written < num_rows:
                file.write(line)
                written += 1
    all_path.unlink()
    if written < num_rows:
        raise SystemExit(f"only {written} rows were generated")


def run_ours(referee: Referee, base_model: str, rows_path: str, rounds: int) -> None:
    """Encode into an empty cache."""
    from snake_lora_pl.data.encoding import Encoder
    from snake_lora_pl.data.example_cache import open_encoded_rows
    from snake_lora_pl.models import load_tokenizer

    tokenizer = load_tokenizer(base_model)
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as directory:
            os.environ[CACHE_ENV] = directory
            referee.start_turn()
            # A new one: an encoder remembers lines.
            rows = open_encoded_rows([Path(rows_path)], Encoder(tokenizer, max_length=MAX_LENGTH, on_overflow="error"))
            referee.end_turn(int(rows.lengths().sum()), 0.0, 0.0)


def run_map(referee: Referee, base_model: str, rows_path: str, rounds: int, num_proc: int) -> None:
    """Encode with Hugging Face's datasets, in its faster way: many rows a call."""
    import datasets

    from snake_lora_pl.models import load_tokenizer

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(base_model)
    end = tokenizer.eos_token_id

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        prompts = [f"### Instruction:\n{prompt}\n\n### Response:\n" for prompt in rows["prompt"]]
        prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        completion_ids = tokenizer(rows["completion"], add_special_tokens=False)["input_ids"]
        both = list(zip(prompt_ids, completion_ids, strict=True))
        return {
            "input_ids": [[*prompt, *completion, end] for prompt, completion in both],
            "labels": [[-100] * len(prompt) + [*completion, end] for prompt, completion in both],
        }

    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as directory:
            referee.start_turn()
            rows = datasets.load_dataset("json", data_files=rows_path, cache_dir=directory, split="train")
            rows = rows.map(encode, batched=True, num_proc=num_proc, remove_columns=rows.column_names)
            referee.end_turn(_count_tokens(rows), 0.0, 0.0)


def _count_tokens(rows: Any) -> int:
    import pyarrow.compute

    return int(pyarrow.compute.sum(pyarrow.compute.list_value_length(rows.data.column("input_ids"))).as_py())


def time_opening(base_model: str, copies_dir: Path, num_files: int) -> dict[str, float]:
    """Seconds until encoded rows are open and split, in a process of its own, without its imports."""
    command = [sys.executable, "-m", "benchmarks.data", f"--base_model={base_model}", f"--open={copies_dir}"]
    command.append(f"--files={num_files}")
    for _ in range(2):  # the first one encodes, and looks at files that it does not know
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def open_once(base_model: str, copies_dir: str, num_files: int) -> dict[str, float]:
    import torch  # noqa: F401  # what is imported is not measured

    from snake_lora_pl.data.datamodule import SnakeJSONLDataModule

    paths = sorted(map(str, Path(copies_dir).iterdir()))[:num_files]
    data = SnakeJSONLDataModule(base_model, paths, max_length=MAX_LENGTH)
    _ = data.tokenizer
    start = time.perf_counter()
    data.prepare_data()
    data.setup("fit")
    seconds = time.perf_counter() - start
    return {"rows": data.summary()["num_rows"], "seconds": seconds}


def wait_share(base_model: str, rows_path: str, steps: int) -> float:
    """``perf/data_wait_share`` of a short ``fit``, over its last 20 steps."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "snake_lora_pl", "fit", "--config=balanced.yaml", f"--root={directory}"]
        command += [f"--model.base_model={base_model}", f"--data.train_path={rows_path}", "--checkpoint.monitor=null"]
        command += [f"--trainer.max_steps={steps}", "--trainer.limit_val_batches=0"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        (path,) = Path(directory).rglob("metrics.csv")
        with open(path, newline="", encoding="utf-8") as file:
            shares = [row["perf/data_wait_share"] for row in csv.DictReader(file) if row["perf/data_wait_share"]]
    return float(shares[-1])


def print_contest(turns: dict[str, list[Turn]], num_rows: int) -> None:
    print(f"| reading, checking and tokenizing {num_rows:,} rows | rows/s | s | ratio to ours |")
    print("|---|---|---|---|")
    for name, taken in turns.items():
        seconds = statistics.median(turn.seconds for turn in taken)
        median, least, most = ratio(turns[OURS], taken)
        faster = "" if name == OURS else f"ours is {median:.1f} times as fast ({least:.1f} to {most:.1f})"
        print(f"| {name} | {num_rows / seconds:,.0f} | {seconds:.1f} | {faster} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rows_path", type=Path, metavar="FILE", help="rows to read instead of generated ones")
    parser.add_argument("--style", default="bfs-512", help="of the generated rows")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each; 0 leaves the first table out")
    parser.add_argument("--num_proc", type=int, nargs="+", default=[1, os.cpu_count() or 1], help="of datasets.map")
    parser.add_argument("--base_model", default="smollm2-135m", help="whose tokenizer encodes the rows")
    parser.add_argument("--files", type=int, nargs="*", default=[1, 10], help="as many of the file are opened together")
    parser.add_argument("--steps", type=int, default=20, help="of the run whose waiting is measured; 0 leaves it out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--open", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open:
        print(json.dumps(open_once(options.base_model, options.open, options.files[0])))
        return
    models_dir = cache_dir() / "base_models"
    with tempfile.TemporaryDirectory() as directory:
        rows_path = Path(directory) / "rows.jsonl"
        if options.rows_path is not None:
            options.rows = shutil.copyfile(options.rows_path, rows_path).read_bytes().count(b"\n")
        else:
            write_rows(rows_path, options.rows, options.style)
        contenders: dict[str, Any] = {OURS: run_ours}
        for num_proc in dict.fromkeys(options.num_proc):
            contenders[f"datasets.map, {num_proc} processes"] = partial(run_map, num_proc=num_proc)
        turns: dict[str, list[Turn]] = {}
        if options.rounds:
            arguments = {"base_model": options.base_model, "rows_path": str(rows_path)}
            turns = run_contest(contenders, options.rounds, arguments)
            tokens = {turn.tokens for taken in turns.values() for turn in taken}
            if len(tokens) != 1:
                raise SystemExit(f"the contenders do not agree on the number of tokens: {tokens}")
            print_contest(turns, options.rows)
        # What is encoded here is of no use to anyone later; the base model is.
        cache = Path(directory) / "cache"
        cache.mkdir()
        (cache / "base_models").symlink_to(models_dir)
        os.environ[CACHE_ENV] = str(cache)
        copies_dir = Path(directory) / "copies"
        copies_dir.mkdir()
        for index in range(max(options.files, default=0)):
            shutil.copyfile(rows_path, copies_dir / f"{index:05}.jsonl")
        opened = [time_opening(options.base_model, copies_dir, num_files) for num_files in options.files]
        if opened:
            print("\n| encoded rows | opened in s |\n|---|---|")
        for one in opened:
            print(f"| {one['rows']:,} | {one['seconds']:.2f} |")
        share = wait_share(options.base_model, str(rows_path), options.steps) if options.steps else None
        if share is not None:
            print(f"\nwaiting for rows: {share:.2%} of the time of {options.steps} steps")
    if options.json is not None:
        taken = {name: [turn.seconds for turn in turns[name]] for name in turns}
        figures = {"rows": options.rows, "seconds": taken, "opened": opened, "data_wait_share": share}
        options.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
