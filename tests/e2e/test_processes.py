"""Runs of several ranks through the command line: same results as one process, and no deadlock."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from snake_lora_pl.adapters import store
from snake_lora_pl.game import STYLES, Board
from snake_lora_pl.paths import RunPaths

# On a busy machine the imports alone may take minutes; HANGS_S ends a deadlock.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]

RUN_PATTERN = "logs/extensions/models/grid-size-5/llm_finetune_v0.03_*/snake_reasoning"
HANGS_S = 300
DDP = ("--config", "ddp.yaml", "--trainer.devices=2", "--data.batch_size=2")
FSDP = ("--config", "fsdp.yaml", "--trainer.devices=2", "--data.batch_size=2")
IN_4_BITS = ("--config=qlora.yaml", "--trainer.max_steps=6", "--play.final_games=0", "--play.val_games=0")

# File in the run directory with what the command wrote to stderr.
STDERR = "stderr.txt"

# Runs the command line and records every collective of this rank.
RECORDER = """
import os, sys
import torch.distributed as dist
from torch.distributed import distributed_c10d

def record(name):
    function = getattr(distributed_c10d, name)
    def recorded(*args, **kwargs):
        shapes = [tuple(a.shape) for a in args if hasattr(a, "shape")]
        with open(os.path.join({directory!r}, os.environ.get("LOCAL_RANK", "0")), "a") as file:
            print(name, shapes, file=file)
        return function(*args, **kwargs)
    setattr(distributed_c10d, name, recorded)
    setattr(dist, name, recorded)

for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "barrier", "broadcast",
             "broadcast_object_list", "gather_object", "reduce_scatter_tensor"):
    record(name)

from snake_lora_pl.__main__ import main
sys.exit(main())
"""

# Runs the command line; rank 1 is killed during its first attempt.
CRASHING = """
import os, signal, sys
from snake_lora_pl.__main__ import main
from snake_lora_pl.training.callbacks.token_throughput import TokenThroughput

hook = TokenThroughput.on_train_batch_end
def crash(self, trainer, *args):
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and trainer.global_step == 5:
        open({marker!r}, "x").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return hook(self, trainer, *args)
TokenThroughput.on_train_batch_end = crash
sys.exit(main())
"""


def write_rows(path: Path, num_rows: int, seed: int) -> Path:
    """Write rows of a 5x5 grid with completions of very unequal length, so that a mean of means is not the mean."""
    style = STYLES["compact"]
    cells = [(x, y) for x in range(5) for y in range(5)]
    with open(path, "w") as file:
        for i, (head, apple) in enumerate(random.Random(seed).sample(list(permutations(cells, 2)), num_rows)):
            board = Board(5, (head,), apple)
            row = {"prompt": style.write_prompt(board), "completion": "UP " * (1 + 9 * i % 31) + "UP", "game": i}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def flags(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return flags of a run in which rank 1 has no row in the last batch of training and of validation."""
    directory = tmp_path_factory.mktemp("rows")
    lines = write_rows(directory / "train.jsonl", 25, seed=0).read_text().splitlines(keepends=True)
    for shard in range(3):
        (directory / f"train-{shard}.jsonl").write_text("".join(lines[shard::3]))
    return [
        "fit",
        "--config=balanced.yaml",
        f"--model.base_model={tiny_llama_dir}",
        f"--data.train_path={directory / 'train-*.jsonl'}",
        f"--data.val_path={write_rows(directory / 'val.jsonl', 5, seed=3)}",
        "--model.dtype=float32",
        "--model.lora.dropout=0",
        "--model.warmup_steps=0",
        # A constant learning rate is the same for a run that stops earlier.
        "--model.final_learning_rate_fraction=1",
        "--data.batch_size=4",
        "--trainer.accelerator=cpu",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.max_epochs=9",
        "--checkpoint.save_every_n_steps=1",
        # No improvement is large enough, so early stopping ends the run after 5 of its 9 epochs.
        "--trainer.val_check_interval=1.0",
        "--early_stopping.min_delta=100",
        "--early_stopping.patience=4",
        # Fewer games than ranks in validation, and an odd number at the end.
        "--play.style=compact",
        "--play.reading=score",
        "--play.max_steps=4",
        "--play.val_games=1",
        "--play.final_games=3",
    ]


@pytest.fixture(scope="module")
def run_cli(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunPaths]:
    """Return a function that runs a command in new processes and returns the only run in its root."""
    cache = tmp_path_factory.mktemp("cache")

    def run(*arguments: str, root: Path, launcher: tuple[str, ...] = ("-m", "snake_lora_pl"), **env: str) -> RunPaths:
        command = [sys.executable, *launcher, *flags, f"--root={root}", *arguments]
        environment = {**os.environ, "SNAKE_LORA_PL_CACHE": str(cache), "OMP_NUM_THREADS": "1", **env}
        done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_S, env=environment, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        (run_dir,) = root.glob(RUN_PATTERN)
        (run_dir / STDERR).write_text(done.stderr)
        return RunPaths(run_dir)

    return run


@pytest.fixture(scope="module")
def single(run_cli: Callable[..., RunPaths], tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """The run of one process with the global batch size of two."""
    return run_cli(root=tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module", params=[DDP, FSDP], ids=["ddp", "fsdp"])
def pair(
    request: pytest.FixtureRequest, run_cli: Callable[..., RunPaths], tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunPaths, list[str]]:
    """The run of two ranks, and the collectives of each."""
    root, directory = tmp_path_factory.mktemp("pair"), tmp_path_factory.mktemp("collectives")
    script = directory / "record.py"
    script.write_text(RECORDER.format(directory=str(directory)))
    run = run_cli(*request.param, root=root, launcher=(str(script),))
    return run, [(directory / str(rank)).read_text() for rank in range(2)]


def read_metrics(run: RunPaths) -> list[dict[str, float]]:
    """Return the logged rows without metrics that depend on speed."""
    with open(run.metrics_path, newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v and "per_second" not in k} for row in csv.DictReader(file)]
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows if len(row) > 2]


def assert_same_adapter(run: RunPaths, expected: RunPaths) -> None:
    store.verify(run.artifacts_dir)
    weights, others = (load_file(paths.artifacts_dir / store.WEIGHTS_FILE) for paths in (run, expected))
    assert weights.keys() == others.keys()
    for name, values in weights.items():
        torch.testing.assert_close(values, others[name], rtol=0, atol=1e-5)
    # B starts at zero, so the compared weights have been trained.
    assert any(values.abs().max() > 1e-3 for name, values in weights.items() if "lora_B" in name)


def test_two_ranks_train_the_adapter_of_one_process(pair: tuple[RunPaths, list[str]], single: RunPaths):
    assert_same_adapter(pair[0], single)


def test_metrics_of_two_ranks_equal_those_of_one_process(pair: tuple[RunPaths, list[str]], single: RunPaths) -> None:
    rows, expected = read_metrics(pair[0]), read_metrics(single)
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)
    steps = [row["step"] for row in rows if "train/loss" in row]
    assert steps == list(range(len(steps)))
    # 25 rows are 7 batches of 4, which are 4 steps of 2 batches; early stopping ended the run, not its 9 epochs.
    assert len(steps) == 5 * 4
    assert sum("val/loss" in row for row in rows) == 5
    assert sum("play/apples_mean" in row for row in rows) == 5


def test_only_rank_0_logs(pair: tuple[RunPaths, list[str]]) -> None:
    lines = (pair[0].run_dir / STDERR).read_text().splitlines()
    assert sum(bool(re.search(r"adapter: [\d,]+ of [\d,]+", line)) for line in lines) == 1
    assert len({line for line in lines if line.startswith("step ")}) == sum(line.startswith("step ") for line in lines)


def test_ranks_run_the_same_collectives(pair: tuple[RunPaths, list[str]]) -> None:
    first, second = pair[1]
    assert len(first.splitlines()) > 100
    assert first == second


def test_final_games_of_two_ranks_equal_those_of_one_process(
    pair: tuple[RunPaths, list[str]], single: RunPaths
) -> None:
    tables = [json.loads(run.games.table_path.read_text())["players"] for run in (pair[0], single)]
    assert tables[0].keys() == {"adapter", "base", "bfs", "random_legal"}
    assert tables[0] == tables[1]


@pytest.mark.parametrize(("before", "after"), [(DDP, FSDP), (FSDP, DDP)], ids=["ddp-fsdp", "fsdp-ddp"])
def test_run_resumes_under_the_other_strategy(
    before: tuple[str, ...], after: tuple[str, ...], run_cli: Callable[..., RunPaths], single: RunPaths, tmp_path: Path
) -> None:
    # Stopping adds a validation, so early stopping would end this run earlier than the uninterrupted one.
    settings = ("--early_stopping.patience=9", "--play.final_games=0")
    run_cli(*before, *settings, "--trainer.max_steps=6", root=tmp_path)
    run = run_cli(*after, *settings, "--trainer.max_steps=20", "--ckpt_path=auto", root=tmp_path)
    steps = [row["step"] for row in read_metrics(run) if "train/loss" in row]
    assert steps == list(range(20))
    last, expected = (
        torch.load(paths.last_checkpoint_path, weights_only=True, map_location="cpu") for paths in (run, single)
    )
    for name, values in last["state_dict"].items():
        torch.testing.assert_close(values, expected["state_dict"][name], rtol=0, atol=1e-5)
    moments, others = (state["optimizer_states"][0]["state"] for state in (last, expected))
    assert moments.keys() == others.keys()
    for index, values in moments.items():
        torch.testing.assert_close(values, others[index], rtol=1e-3, atol=1e-7)


@pytest.fixture(scope="module")
def single_4_bit(run_cli: Callable[..., RunPaths], tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    return run_cli(*IN_4_BITS, root=tmp_path_factory.mktemp("single_4_bit"))


@pytest.mark.parametrize(
    "settings",
    [DDP, FSDP, (*FSDP, "--model.lora.quantization.storage_dtype=float32")],
    ids=["ddp", "fsdp", "fsdp-float-storage"],
)
def test_two_ranks_with_a_4_bit_base_train_the_adapter_of_one_process(
    settings: tuple[str, ...], run_cli: Callable[..., RunPaths], single_4_bit: RunPaths, tmp_path: Path
) -> None:
    assert_same_adapter(run_cli(*settings, *IN_4_BITS, root=tmp_path), single_4_bit)


def read_completions(root: Path) -> list[dict[str, str]]:
    (path,) = root.glob("*.predictions.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp.yaml"])
@pytest.mark.parametrize("num_prompts", [1, 7])
def test_predict_writes_each_prompt_once_in_order(
    config: str, num_prompts: int, flags: list[str], tmp_path: Path
) -> None:
    prompts_path = write_rows(tmp_path / "prompts.jsonl", num_prompts, seed=5)
    command = [sys.executable, "-m", "snake_lora_pl", "predict", "--config=balanced.yaml", f"--config={config}"]
    command += [flag for flag in flags if flag.startswith(("--model.base_model", "--model.dtype"))]
    command += [f"--data.predict_path={prompts_path}", "--data.batch_size=2", "--model.max_new_tokens=6"]
    command += ["--trainer.accelerator=cpu", "--trainer.devices=2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANGS_S, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"\b{num_prompts} completions\b", done.stdout)
    rows = [json.loads(line) for line in prompts_path.read_text().splitlines()]
    assert [row["prompt"] for row in read_completions(tmp_path)] == [row["prompt"] for row in rows]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


TORCHRUN = ("-m", "torch.distributed.run")

# torchrun uses one store for all attempts, so a restarted rank may read the addresses of the previous attempt
# (pytorch/pytorch#135712). With this variable each attempt has a new store.
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

STORE_PROBE = """
import os, sys
from torch.distributed import rendezvous
store, _, _ = next(rendezvous("env://"))
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    store.set("address", "port 1")
    sys.exit("restart")
sys.exit("the store holds the address of the first attempt" if store.check(["address"]) else 0)
"""


def test_ranks_of_torchrun_write_into_one_run_directory(
    run_cli: Callable[..., RunPaths], single: RunPaths, tmp_path: Path
) -> None:
    launcher = (*TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", "snake_lora_pl")
    assert_same_adapter(run_cli(*DDP, root=tmp_path, launcher=launcher), single)


def test_restarted_ranks_resume_from_last(run_cli: Callable[..., RunPaths], single: RunPaths, tmp_path: Path) -> None:
    script = tmp_path / "crashing.py"
    script.write_text(CRASHING.format(marker=str(tmp_path / "crashed")))
    launcher = (*TORCHRUN, "--standalone", "--nproc-per-node=2", "--max-restarts=1", str(script))
    run = run_cli(*DDP, "--ckpt_path=auto", root=tmp_path / "root", launcher=launcher, **OWN_STORE)
    assert (tmp_path / "crashed").exists()
    assert_same_adapter(run, single)


@pytest.mark.parametrize(
    "environment",
    [
        OWN_STORE,
        # When torchrun clears its store itself, docs and this test no longer need the variable.
        pytest.param({}, marks=pytest.mark.xfail(strict=True, reason="pytorch/pytorch#135712")),
    ],
    ids=["own-store", "shared-store"],
)
def test_ranks_restarted_by_torchrun_find_an_empty_store(environment: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "store_probe.py"
    script.write_text(STORE_PROBE)
    command = [sys.executable, *TORCHRUN, "--standalone", "--nproc-per-node=1", "--max-restarts=1", str(script)]
    done = subprocess.run(command, env={**os.environ, **environment}, timeout=HANGS_S, capture_output=True, check=False)
    assert done.returncode == 0


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[list[tuple[list[str], str, str]]]:
    """Yield two connected network namespaces: for each its command prefix, address and network interface."""
    names = [f"snake{os.getpid()}{side}" for side in "ab"]
    interfaces = [name[-8:] for name in names]
    addresses = ["10.213.77.1", "10.213.77.2"]
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("network namespaces need ip(8) and root")
        _ip("link", "add", interfaces[0], "type", "veth", "peer", "name", interfaces[1])
        for name, interface, address in zip(names, interfaces, addresses, strict=True):
            _ip("link", "set", interface, "netns", name)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            _ip("-n", name, "link", "set", interface, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield [
            (["ip", "netns", "exec", name], address, interface)
            for name, address, interface in zip(names, addresses, interfaces, strict=True)
        ]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def run_nodes(flags: list[str], root: Path, hosts: list[tuple[list[str], str, str]]) -> RunPaths:
    """Run one torchrun with one rank on each host and wait for both."""
    agents = []
    for rank, (before, address, interface) in enumerate(hosts):
        command = [*before, sys.executable, *TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
        command += [f"--rdzv-endpoint={hosts[0][1]}:29417", "--rdzv-id=test", f"--local-addr={address}"]
        # By hostname both would consider themselves the host of the rendezvous.
        command += [f"--rdzv-conf=is_host={int(rank == 0)}"]
        command += ["-m", "snake_lora_pl", *flags, *DDP, "--trainer.devices=1", "--trainer.num_nodes=2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface}
        command.append(f"--root={root}")
        agents.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        )
    try:
        for agent in agents:
            output, _ = agent.communicate(timeout=HANGS_S)
            assert agent.returncode == 0, output
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    (run_dir,) = root.glob(RUN_PATTERN)
    return RunPaths(run_dir)


def test_two_nodes_in_network_namespaces_train_the_adapter_of_one_process(
    flags: list[str], single: RunPaths, tmp_path: Path, two_hosts: list[tuple[list[str], str, str]]
) -> None:
    assert_same_adapter(run_nodes(flags, tmp_path, two_hosts), single)


def test_two_nodes_on_loopback_train_the_adapter_of_one_process(
    flags: list[str], single: RunPaths, tmp_path: Path
) -> None:
    assert_same_adapter(run_nodes(flags, tmp_path, [([], "127.0.0.1", "lo")] * 2), single)


def test_port_in_use_is_a_one_line_error(flags: list[str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "snake_lora_pl", *flags, *DDP, f"--root={tmp_path}"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS_S, check=False)
    assert result.returncode == 2
    assert f"127.0.0.1:{port} (MASTER_ADDR:MASTER_PORT)" in result.stderr
    assert "Traceback" not in result.stderr
