"""Memory of one process of several that share a data set, by the number of rows: ``python -m benchmarks.rows_memory``.

Each size is measured in a process of its own, which plays rank 0 of 8: it opens the encoded rows, splits them by game,
and takes its batches of an epoch. What it allocates itself (``RssAnon``) is told apart from pages of the encoded files
that the system has mapped for it (``RssFile``), which all processes of a machine share and the system may drop at will.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from snake_lora_pl.paths import CACHE_ENV, cache_dir

NUM_RANKS = 8
BATCH_SIZE = 8
GAMES_PER_SHARD = 500


def write_shards(directory: Path, num_rows: int) -> str:
    """Rows of many games, the same ones in every shard but for the game's name and the prompt; a glob of the shards."""
    from snake_lora_pl.data.generated_rows import write_dataset

    directory.mkdir(parents=True)
    seed_path = directory / "seed.rows"
    write_dataset(seed_path, GAMES_PER_SHARD, 10, "bfs", "compact", 0)
    rows = [json.loads(line) for line in seed_path.read_text().splitlines()]
    written = 0
    for shard in itertools.count():
        if written == num_rows:
            return str(directory / "*.jsonl")
        part = rows[: num_rows - written]
        with open(directory / f"{shard:05}.jsonl", "w") as file:
            for row in part:
                row = {**row, "prompt": f"{row['prompt']} {shard}", "game": f"{row['game']}-{shard}"}
                file.write(json.dumps(row) + "\n")
        written += len(part)


def resident_mib() -> dict[str, float]:
    """This process's own memory, pages of files, and the most that both were together so far."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(status[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile", "VmHWM")}


def measure(train_path: str, base_model: str, num_batches: int) -> dict[str, Any]:
    """Open a data set as one of several processes and read batches; memory after each."""
    import torch.utils.data

    from snake_lora_pl.data.datamodule import SnakeJSONLDataModule

    data = SnakeJSONLDataModule(base_model, train_path, batch_size=BATCH_SIZE)
    _ = data.tokenizer, torch.utils.data
    data.prepare_data()
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        distributed_sampler_kwargs={"num_replicas": NUM_RANKS, "rank": 0},
        is_global_zero=False,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    result: dict[str, Any] = {"before": resident_mib()}
    data.setup("fit")
    loader = data._loader(data._require(data._train), shuffle=True)
    result["open"] = resident_mib()
    start = time.perf_counter()
    num_read = sum(1 for _ in itertools.islice(loader, num_batches))
    result["batch_ms"] = 1000 * (time.perf_counter() - start) / num_read
    result["read"] = resident_mib() | {"batches": num_read}
    result["rows"] = data.summary()["num_rows"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--batches", type=int, default=1000, help="batches that the process reads")
    parser.add_argument("--base_model", default="smollm2-135m", help="whose tokenizer encodes the rows")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.base_model, options.batches)))
        return
    print("| rows | own, opened | own, read | file pages, read | peak of both | ms a batch |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        # What is encoded here is of no use to anyone later; the base model is.
        cache = Path(directory) / "cache"
        cache.mkdir()
        (cache / "base_models").symlink_to(cache_dir() / "base_models")
        environment = {**os.environ, CACHE_ENV: str(cache)}
        for num_rows in options.rows:
            command = [sys.executable, "-m", "benchmarks.rows_memory", f"--base_model={options.base_model}"]
            command += [f"--batches={options.batches}"]
            command += [f"--measure={write_shards(Path(directory) / str(num_rows), num_rows)}"]
            # The first one encodes; what that takes is not measured.
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
            done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            before, opened, read = (found[name] for name in ("before", "open", "read"))
            print(
                f"| {found['rows']:,} | {opened['RssAnon'] - before['RssAnon']:+.0f} MiB "
                f"| {read['RssAnon'] - before['RssAnon']:+.0f} MiB | {read['RssFile'] - before['RssFile']:+.0f} MiB "
                f"| {read['VmHWM']:.0f} MiB | {found['batch_ms']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
