"""Waits of the host for the device, and collectives, of a step, counted on the CPU."""

from __future__ import annotations

import collections
import signal
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from snake_lora_pl.training.callbacks.adapter_norms import AdapterNorms
from snake_lora_pl.training.callbacks.interruption import Interruption
from snake_lora_pl.training.callbacks.progress_bar import RunProgressBar
from snake_lora_pl.training.callbacks.token_throughput import TokenThroughput
from snake_lora_pl.training.callbacks.untrained_layers import UntrainedLayers
from snake_lora_pl.training.metrics_csv import MetricsCSVLogger
from snake_lora_pl.training.step_exchange import StepExchange
from tests.training.conftest import make_loader, make_rows, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")

MAX_READS = 2
NUM_COUNTED = 10
"""Steps over which reads are counted: as many as there are between two measurements of the adapter's norms."""

DATA_DEPENDENT = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::item", "aten::equal"}
READS = {Tensor.tolist: "tolist", Tensor.numpy: "numpy", Tensor.cpu: "cpu", Tensor.__array__: "numpy"}


class DeviceReads(TorchDispatchMode):
    """Counts where the host would wait for a device that holds some tensors, and all tensors computed from them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()
        self._storages: set[int] = set()
        self.functions = _ReadFunctions(self)

    def place(self, tensors: Any) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._storages:
                    self._storages.add(storage._cdata)
                    weakref.finalize(storage, self._storages.discard, storage._cdata).atexit = False

    def is_placed(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.untyped_storage()._cdata in self._storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if self.is_placed(leaf)]
        if inputs:
            name = func.name().split(".")[0]
            by_mask = name in ("aten::index", "aten::index_put_") and any(
                isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
            )
            if name in DATA_DEPENDENT or by_mask:
                self.counts[name] += 1
        out = func(*args, **(kwargs or {}))
        if inputs:
            self.place(out)
        return out


class _ReadFunctions(TorchFunctionMode):
    """Counts the reads that torch does not dispatch for tensors on the CPU."""

    def __init__(self, reads: DeviceReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS and self._reads.is_placed(args[0]):
            self._reads.counts[READS[func]] += 1
            if func is Tensor.cpu:
                with torch.utils._python_dispatch._disable_current_modes():
                    return args[0].clone()
        return func(*args, **(kwargs or {}))


class CountedSteps(pl.Callback):
    """Counts reads of the host between two steps of a run."""

    def __init__(self, reads: DeviceReads, first: int) -> None:
        self._reads = reads
        self._first = first
        self.per_step: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._reads.place([*pl_module.parameters(), *pl_module.buffers()])

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self._first:
            self._reads.counts.clear()
        if trainer.global_step == self._first + NUM_COUNTED:
            self.per_step = {name: count / NUM_COUNTED for name, count in self._reads.counts.items()}


@pytest.mark.parametrize("fused_layers", ["always", "never"])
def test_host_waits_for_the_device_at_most_twice_a_step(make_module, tmp_path: Path, fused_layers: str) -> None:
    module = make_module(fused_layers=fused_layers)
    reads = DeviceReads()
    transfer = module.transfer_batch_to_device

    def place_batch(batch: Any, *args: Any) -> Any:
        batch = {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}
        reads.place(batch)
        return transfer(batch, *args)

    module.transfer_batch_to_device = place_batch
    counted = CountedSteps(reads, first=13)
    callbacks = [TokenThroughput(), AdapterNorms(), UntrainedLayers(), Interruption(), RunProgressBar(), counted]
    trainer = make_trainer(
        tmp_path,
        callbacks=callbacks,
        logger=MetricsCSVLogger(str(tmp_path)),
        log_every_n_steps=1,
        max_steps=25,
        val_check_interval=12,
        gradient_clip_val=1.0,
        enable_progress_bar=True,
    )
    with reads, reads.functions:
        trainer.fit(module, make_loader(make_rows(50), 2), make_loader(make_rows(2), 2))
    assert 0 < sum(counted.per_step.values()) <= MAX_READS, counted.per_step


def test_reads_of_values_computed_from_the_device_are_counted() -> None:
    reads = DeviceReads()
    placed, other = torch.ones(3), torch.ones(3)
    reads.place(placed)
    with reads, reads.functions:
        computed = placed.double() + 1
        assert other.tolist() == [1.0] * 3
        assert not reads.counts
        assert computed.tolist() == [2.0] * 3
        assert float(computed[0]) == 2.0
        assert computed[computed > 1].numel() == 3
        computed.cpu().tolist()
    assert reads.counts == {"tolist": 1, "aten::_local_scalar_dense": 1, "aten::index": 1, "cpu": 1}


class TwoRankDDP(DDPStrategy):
    """DDP that does not wait for the gradients of the other rank."""

    def configure_ddp(self) -> None:
        super().configure_ddp()
        self.model.register_comm_hook(None, keep_gradients)  # type: ignore[union-attr]


def keep_gradients(state: Any, bucket: Any) -> Any:
    future: Any = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


# torch compares the annotations themselves, which are strings in this module.
keep_gradients.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}


@pytest.fixture
def two_ranks() -> Iterator[pl.strategies.Strategy]:
    """Rank 0 of two, whose collectives do nothing."""

    class TwoRanks(LightningEnvironment):
        creates_processes_externally = True

        def world_size(self) -> int:
            return 2

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        yield TwoRankDDP(cluster_environment=TwoRanks(), process_group_backend="fake")
    finally:
        dist.destroy_process_group()


@pytest.fixture
def collectives(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    counts: collections.Counter[str] = collections.Counter()

    def count(name: str) -> Callable[..., Any]:
        function = getattr(dist, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return counted

    for name in ("all_reduce", "all_gather", "all_gather_object", "barrier", "broadcast", "broadcast_object_list"):
        monkeypatch.setattr(dist, name, count(name))
    return counts


def test_two_ranks_run_one_collective_a_step_besides_that_of_the_gradients(
    make_module, tmp_path: Path, two_ranks: Any, collectives: collections.Counter[str]
) -> None:
    class Between(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step in (2, 6) and trainer.fit_loop.epoch_loop.batch_progress.current.completed % 2 == 0:
                seen.append(dict(collectives))

    seen: list[dict[str, int]] = []
    trainer = make_trainer(
        tmp_path,
        callbacks=[Between(), TokenThroughput(), AdapterNorms(), Interruption()],
        strategy=two_ranks,
        devices=2,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        max_steps=7,
        max_time="00:01:00:00",
        use_distributed_sampler=False,
    )
    assert trainer.world_size == 2
    trainer.fit(make_module(), make_loader(make_rows(28), 2))
    before, after = seen
    assert {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name)} == {
        "all_reduce": 4
    }


def exchange(own: StepExchange, rank: int, others: list[Any], elapsed_s: float) -> list[float]:
    timer = Timer(timedelta(seconds=60))
    timer.time_elapsed = lambda stage=None: elapsed_s  # type: ignore[method-assign]
    trainer: Any = SimpleNamespace(world_size=2, global_rank=rank, callbacks=[timer])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", lambda tensor: tensor.add_(torch.tensor(others, dtype=tensor.dtype)))
        totals = own.sum_over_ranks(trainer, torch.tensor(6.0).double(), 2).tolist()
    own.read(totals[2:])
    return totals[:2]


def test_ranks_share_loss_targets_signal_and_the_clock_of_rank_0() -> None:
    first, second = StepExchange(), StepExchange()
    second.own_signum = signal.SIGTERM
    assert exchange(first, 0, [3.0, 5.0, 0.0, 0.0, 0.0, signal.SIGTERM], elapsed_s=15.0) == [9.0, 7.0]
    assert exchange(second, 1, [3.0, 5.0, 0.25, first.clock_s, 0.0, 0.0], elapsed_s=20.0) == [9.0, 7.0]
    for own in (first, second):
        assert (own.signum, own.elapsed_fraction, own.clock_s) == (signal.SIGTERM, 0.25, first.clock_s)
