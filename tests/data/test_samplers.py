from __future__ import annotations

import hashlib
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


WEIGHTED = st.lists(st.tuples(st.integers(1, 500), st.floats(0.01, 100)), min_size=1, max_size=200)


def weighted_sampler(rows: list[tuple[int, float]], batch_size: int, **settings) -> LengthGroupedSampler:
    lengths, weights = (np.array(column) for column in zip(*rows, strict=True))
    return LengthGroupedSampler(lengths, batch_size, probabilities=weights / weights.sum(), **settings)


@given(WEIGHTED, st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_each_row_is_drawn_as_often_as_its_probability_demands(rows, batch_size, epoch, group_by_length):
    sampler = weighted_sampler(rows, batch_size, group_by_length=group_by_length)
    batches = epoch_of(sampler, epoch)
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(sampler) - 1)
    drawn = np.bincount(list(itertools.chain(*batches)), minlength=len(rows))
    assert drawn.sum() == len(rows)
    expected = np.array([weight for _, weight in rows])
    expected *= len(rows) / expected.sum()
    assert (abs(drawn - expected) < 1 + 1e-6).all()


def test_rare_rows_are_drawn_in_some_epochs_at_the_expected_rate():
    sampler = weighted_sampler([(10, 1.0)] * 50 + [(10, 0.1)] * 50, 10)
    epochs = [str(sorted(itertools.chain(*epoch_of(sampler, epoch)))) for epoch in range(3)]
    assert len(set(epochs)) == 3
    drawn = [row for epoch in range(300) for batch in epoch_of(sampler, epoch) for row in batch]
    counts = np.bincount(drawn, minlength=100) / 300
    assert counts[:50] == pytest.approx(100 / 55, abs=0.15)
    assert counts[50:] == pytest.approx(10 / 55, abs=0.1)


@given(WEIGHTED, st.integers(1, 4), st.integers(2, 4), st.integers(0, 3), st.booleans())
def test_ranks_draw_disjoint_positions_of_one_global_draw(rows, batch_size, num_replicas, epoch, group_by_length):
    whole = epoch_of(weighted_sampler(rows, batch_size * num_replicas, group_by_length=group_by_length), epoch)
    settings = {"num_replicas": num_replicas, "group_by_length": group_by_length}
    ranks = [epoch_of(weighted_sampler(rows, batch_size, rank=rank, **settings), epoch) for rank in range(num_replicas)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert [batch[rank::num_replicas] for rank in range(num_replicas)] == parts


@given(WEIGHTED, st.integers(1, 9), st.integers(0, 3), st.integers(0, 40))
def test_weighted_pass_after_seek_is_the_remainder_of_the_epoch(rows, batch_size, epoch, start):
    whole = epoch_of(weighted_sampler(rows, batch_size), epoch)
    sampler = weighted_sampler(rows, batch_size)
    sampler.seek(epoch, start)
    assert list(sampler) == whole[start:]


def test_equal_probabilities_draw_every_row_once():
    batches = epoch_of(LengthGroupedSampler(np.ones(40), 8, probabilities=np.full(40, 1 / 40)))
    assert sorted(itertools.chain(*batches)) == list(range(40))


def test_rows_are_not_sorted_without_grouping():
    lengths = np.random.default_rng(0).integers(100, 500, 4000)
    spreads = [
        np.mean([np.std(lengths[batch]) for batch in epoch_of(LengthGroupedSampler(lengths, 8, group_by_length=group))])
        for group in (True, False)
    ]
    assert spreads[0] < 10 < 80 < spreads[1]


def test_defaults_give_the_order_of_version_0_1():
    lengths = np.random.default_rng(3).integers(1, 100, 1000)
    batches = epoch_of(LengthGroupedSampler(lengths, 8, seed=5), 2)
    assert (
        hashlib.sha256(str(batches).encode()).hexdigest()
        == "5b3a7058625c4c6648180c3bc9362d8d047195d43c93bc6beb1b0bd0162ab124"
    )
