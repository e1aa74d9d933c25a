"""Two ranks process the rows that one process would."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

from snake_lora_pl.data.datamodule import SnakeJSONLDataModule
from tests.data.conftest import games_of_steps
from tests.data.lightning_runs import fit


def _fit_on_rank(rank: int, port: int, rows_path: Path, tokenizer_dir: Path, queue: Any) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", NODE_RANK="0", LOCAL_RANK=str(rank)
    )
    datamodule = SnakeJSONLDataModule(str(tokenizer_dir), str(rows_path), batch_size=4)
    module = fit(datamodule, max_epochs=1, devices=2, strategy="ddp")
    queue.put((rank, module.seen, module.validated))


def test_two_ranks_share_the_global_batches_of_one_process(tmp_path: Path, tiny_llama_dir: Path) -> None:
    rows_path = tmp_path / "rows.jsonl"
    rows_path.write_text("".join(json.dumps(row) + "\n" for row in games_of_steps(6, 5, 7, 6, 5, 6, 6)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    processes = [
        spawn.Process(target=_fit_on_rank, args=(rank, port, rows_path, tiny_llama_dir, queue)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    ranks = sorted(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    one = fit(SnakeJSONLDataModule(str(tiny_llama_dir), str(rows_path), batch_size=8), max_epochs=1)
    for i, batches in ((1, one.seen), (2, one.validated)):
        steps = zip(ranks[0][i], ranks[1][i], strict=True)
        assert [sorted(first + second) for first, second in steps] == [sorted(batch) for batch in batches]
