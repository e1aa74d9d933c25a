from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from snake_lora_pl.data.samplers import InOrderSampler, LengthGroupedSampler

LENGTHS = st.lists(st.integers(1, 500), max_size=300).map(lambda lengths: np.array(lengths, np.int32))


def epoch_of(sampler: LengthGroupedSampler, epoch: int = 0) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


@given(LENGTHS, st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_epoch_has_every_row_once_and_only_the_last_batch_is_partial(lengths, batch_size, epoch, shuffle):
    sampler = LengthGroupedSampler(lengths, batch_size, shuffle=shuffle)
    batches = epoch_of(sampler, epoch)
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    assert len(batches) == len(sampler)
    assert all(len(batch) == batch_size for batch in batches[:-1])


@given(LENGTHS, st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_ranks_share_the_batches_of_one_rank_with_the_global_batch_size(lengths, batch_size, num_replicas, epoch):
    whole = epoch_of(LengthGroupedSampler(lengths, batch_size * num_replicas), epoch)
    ranks = [
        epoch_of(LengthGroupedSampler(lengths, batch_size, rank=rank, num_replicas=num_replicas), epoch)
        for rank in range(num_replicas)
    ]
    assert [sorted(itertools.chain(*batches)) for batches in zip(*ranks, strict=True)] == [sorted(b) for b in whole]
    assert {len(batches) for batches in ranks} == {len(whole)}
    assert all(len(batch) <= batch_size for batches in ranks for batch in batches)


@given(LENGTHS, st.integers(1, 9), st.integers(0, 3), st.integers(0, 40))
def test_pass_after_seek_is_the_remainder_of_the_epoch(lengths, batch_size, epoch, start):
    whole = epoch_of(LengthGroupedSampler(lengths, batch_size), epoch)
    sampler = LengthGroupedSampler(lengths, batch_size)
    sampler.seek(epoch, start)
    sampler.set_epoch(epoch)
    assert len(sampler) == len(whole)
    assert list(sampler) == whole[start:]
    assert list(sampler) == whole


def test_seek_does_not_affect_another_epoch():
    sampler = LengthGroupedSampler(np.arange(100), 10)
    sampler.seek(0, 4)
    assert len(epoch_of(sampler, 1)) == 10


def test_order_is_a_function_of_seed_and_epoch():
    lengths = np.arange(1000) % 37

    def order(seed: int, epoch: int) -> list[list[int]]:
        return epoch_of(LengthGroupedSampler(lengths, 8, seed=seed), epoch)

    assert order(1, 2) == order(1, 2)
    assert len({str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_order_does_not_change_the_global_random_state():
    lengths = np.arange(100)
    np_state, torch_state = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    epoch_of(LengthGroupedSampler(lengths, 8))
    assert np.random.get_state()[1].tolist() == np_state
    assert torch.get_rng_state().tolist() == torch_state


def test_unshuffled_epochs_are_equal_and_their_first_batches_a_fair_sample():
    lengths = np.sort(np.random.default_rng(0).integers(100, 500, 4000))
    sampler = LengthGroupedSampler(lengths, 8, shuffle=False)
    first = epoch_of(sampler, 0)
    assert epoch_of(sampler, 5) == first
    sample = np.array(list(itertools.chain(*first[:100])))
    assert abs(lengths[sample].mean() - lengths.mean()) < 25


def test_grouping_by_length_reduces_padding_below_two_percent():
    lengths = np.random.default_rng(0).integers(100, 500, 20_000)

    def padding(batches: list[list[int]]) -> float:
        padded = sum(len(batch) * max(lengths[batch]) for batch in batches)
        return 1 - lengths.sum() / padded

    assert padding(epoch_of(LengthGroupedSampler(lengths, 8))) < 0.02
    assert padding(np.random.default_rng(1).permutation(20_000).reshape(-1, 8).tolist()) > 0.25


def test_rank_may_get_an_empty_share_of_the_last_global_batch():
    ranks = [list(LengthGroupedSampler(np.ones(9), 2, rank=rank, num_replicas=2)) for rank in range(2)]
    assert [len(batch) for batch in ranks[0]] == [2, 2, 1]
    assert [len(batch) for batch in ranks[1]] == [2, 2, 0]


@pytest.mark.parametrize("sampler", [LengthGroupedSampler(np.ones(9), 2), InOrderSampler(9, 2)])
def test_samplers_are_distributed_so_that_lightning_does_not_replace_them(sampler):
    assert isinstance(sampler, DistributedSampler)


@given(st.integers(0, 50), st.integers(1, 9), st.integers(1, 4))
def test_in_order_sampler_keeps_the_order_and_repeats_no_row(num_rows, batch_size, num_replicas):
    samplers = [InOrderSampler(num_rows, batch_size, rank=r, num_replicas=num_replicas) for r in range(num_replicas)]
    ranks = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(batches) for batches in ranks]
    interleaved = itertools.chain(*itertools.zip_longest(*ranks, fillvalue=[]))
    assert list(itertools.chain(*interleaved)) == list(range(num_rows))
