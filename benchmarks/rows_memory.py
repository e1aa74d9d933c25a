"""Host memory of one of several processes that share a data set, by number of rows.

    python -m benchmarks.rows_memory --rows 10000 100000

Each size is measured in a new process that acts as rank 0 of 8 on the CPU: it opens the encoded rows, splits them by
game and reads batches of an epoch. Private memory (``RssAnon``) is separated from pages of the memory-mapped encoded
files (``RssFile``), which all processes of a machine share and the system can drop. Linux only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.common import make_empty_cache, make_parser, markdown_table, process_memory_bytes, run_for_json

NUM_RANKS = 8
BATCH_SIZE = 8
GAMES_PER_SHARD = 500


def write_shards(directory: Path, num_rows: int) -> str:
    """Write rows of many games and return a glob of the files.

    All shards contain the same games, with different names and prompts.
    """
    from snake_lora_pl.data.generated_rows import write_dataset

    directory.mkdir(parents=True)
    games_path = directory / "games.rows"
    write_dataset(games_path, GAMES_PER_SHARD, 10, "bfs", "compact", 0)
    rows = [json.loads(line) for line in games_path.read_text().splitlines()]
    num_written = 0
    for shard in itertools.count():
        if num_written == num_rows:
            break
        part = rows[: num_rows - num_written]
        with open(directory / f"{shard:05}.jsonl", "w") as file:
            for row in part:
                row = {**row, "prompt": f"{row['prompt']} {shard}", "game": f"{row['game']}-{shard}"}
                file.write(json.dumps(row) + "\n")
        num_written += len(part)
    return str(directory / "*.jsonl")


def resident_mib() -> dict[str, float]:
    """Return this process's private memory, its file pages, and the peak of both together."""
    return {name: process_memory_bytes(name) / 2**20 for name in ("RssAnon", "RssFile", "VmHWM")}


def make_trainer_stub() -> Any:
    """Return the attributes of a Trainer at the start of training on rank 0 that the data module reads."""
    import torch

    batch_progress = SimpleNamespace(total=SimpleNamespace(processed=0))
    return SimpleNamespace(
        distributed_sampler_kwargs={"num_replicas": NUM_RANKS, "rank": 0},
        is_global_zero=False,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        num_training_batches=1,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=batch_progress)),
    )


def measure(train_path: str, base_model: str, num_batches: int) -> dict[str, Any]:
    """Open a data set as one of several processes, read batches, and return the memory after each step."""
    import torch.utils.data

    from snake_lora_pl.data.datamodule import SnakeJSONLDataModule

    data = SnakeJSONLDataModule(base_model, train_path, batch_size=BATCH_SIZE)
    _ = data.tokenizer, torch.utils.data
    data.prepare_data()
    data.trainer = make_trainer_stub()
    result: dict[str, Any] = {"before": resident_mib()}
    data.setup("fit")
    loader = data.train_dataloader()
    result["open"] = resident_mib()
    start = time.perf_counter()
    num_read = sum(1 for _ in itertools.islice(loader, num_batches))
    result["batch_ms"] = 1000 * (time.perf_counter() - start) / num_read
    result["read"] = resident_mib() | {"batches": num_read}
    result["rows"] = data.summary()["num_rows"]
    return result


def main() -> None:
    parser = make_parser("rows_memory", __doc__)
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="sizes of the data set"
    )
    parser.add_argument("--batches", type=int, default=1000, help="batches that the process reads (default: 1000)")
    parser.add_argument("--base_model", default="smollm2-135m", help="base model whose tokenizer encodes the rows")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.base_model, options.batches)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        environment = make_empty_cache(Path(directory))
        for num_rows in options.rows:
            command = [sys.executable, "-m", "benchmarks.rows_memory", f"--base_model={options.base_model}"]
            command += [f"--batches={options.batches}"]
            command += [f"--measure={write_shards(Path(directory) / str(num_rows), num_rows)}"]
            # The first run encodes the rows and is not measured.
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
            result = run_for_json(command, environment)
            before, opened, read = (result[name] for name in ("before", "open", "read"))
            rows.append(
                [
                    f"{result['rows']:,}",
                    f"{opened['RssAnon'] - before['RssAnon']:+.0f} MiB",
                    f"{read['RssAnon'] - before['RssAnon']:+.0f} MiB",
                    f"{read['RssFile'] - before['RssFile']:+.0f} MiB",
                    f"{read['VmHWM']:.0f} MiB",
                    f"{result['batch_ms']:.2f}",
                ]
            )
    header = ["rows", "private, opened", "private, read", "file pages, read", "peak of both", "ms/batch"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
