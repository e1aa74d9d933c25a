"""Runs of several ranks in processes that are forked from one process that has imported everything.

A new Python per rank would import torch, Lightning and transformers for seconds each. The ranks find each other as
those of an external launcher do; ``tests/e2e/test_processes.py`` also lets Lightning and torchrun start new processes.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.kill import PROCESSES, warm_up

COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "barrier", "broadcast",
    "broadcast_object_list", "gather_object", "reduce_scatter_tensor",
)  # fmt: skip

# Seconds after which a deadlock ends.
HANGS_S = 300

Prepare = Callable[[int], None]


def output_path(root: Path, rank: int) -> Path:
    """Return the file that receives the output of a rank."""
    return root / f"output-{rank}.txt"


def run_rank(
    rank: int, port: int, arguments: Sequence[str], root: Path, environment: dict[str, str], prepare: Prepare | None
) -> None:
    """Run a command as one of several ranks, and exit."""
    import torch

    from snake_lora_pl.__main__ import main

    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.chdir(root)
    torch.set_num_threads(1)
    with open(output_path(root, rank), "wb") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    if prepare is not None:
        prepare(rank)
    code = main(list(arguments))
    save_coverage()
    sys.exit(code)


def record_collectives(rank: int, directory: Path) -> None:
    """Make this process append each collective, with the shapes of its tensors, to the file ``directory / rank``."""
    import torch.distributed
    from torch.distributed import distributed_c10d

    def recorded(name: str) -> Callable[..., Any]:
        function = getattr(distributed_c10d, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            shapes = [tuple(value.shape) for value in args if hasattr(value, "shape")]
            with open(directory / str(rank), "a") as file:
                print(name, shapes, file=file)
            return function(*args, **kwargs)

        return run

    for name in COLLECTIVES:
        replacement = recorded(name)
        setattr(distributed_c10d, name, replacement)
        setattr(torch.distributed, name, replacement)


def save_coverage() -> None:
    """Save what this process measured: multiprocessing ends a process without the exit handlers of Python."""
    coverage = sys.modules.get("coverage")
    if coverage is not None and (current := coverage.Coverage.current()) is not None:
        current.save()


@contextlib.contextmanager
def started_ranks(
    root: Path, arguments: Sequence[str], num_ranks: int = 2, prepare: Prepare | None = None
) -> Iterator[list[BaseProcess]]:
    """Start a command on several ranks in a directory, and kill at the end those that are still running.

    Args:
        root: Working directory, with the files of ``output_path``.
        arguments: The command and its options, such as ``--trainer.devices=2``.
        num_ranks: Number of ranks.
        prepare: Function of this or a test's module that is called with the rank before the command.
    """
    root.mkdir(parents=True, exist_ok=True)
    warm_up()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ranks: list[BaseProcess] = [
        PROCESSES.Process(target=run_rank, args=(rank, port, arguments, root, dict(os.environ), prepare))
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.join()


def wait_for_ranks(ranks: Sequence[BaseProcess], root: Path, code: int = 0) -> str:
    """Wait until every rank has ended with an exit code; return the output of rank 0."""
    for process in ranks:
        process.join(HANGS_S)
    written = [output_path(root, rank).read_text() for rank in range(len(ranks))]
    assert [process.exitcode for process in ranks] == [code] * len(ranks), "\n".join(written)
    return written[0]


def run_ranks(
    root: Path, arguments: Sequence[str], num_ranks: int = 2, prepare: Prepare | None = None, code: int = 0
) -> str:
    """Run a command on a number of ranks in a directory until they have ended; return the output of rank 0."""
    with started_ranks(root, arguments, num_ranks, prepare) as ranks:
        return wait_for_ranks(ranks, root, code)
