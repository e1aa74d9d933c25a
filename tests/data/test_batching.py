from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from snake_lora_pl.constants import IGNORE_INDEX
from snake_lora_pl.data.batching import InOrderSampler, LengthGroupedSampler, collate
from snake_lora_pl.data.encoding import Example

EOS = 2


def example(num_prompt: int, num_completion: int, source: str = "rows.jsonl:1") -> Example:
    return Example([*range(10, 10 + num_prompt + num_completion - 1), EOS], num_prompt, source)


EXAMPLES = st.lists(st.builds(example, st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=6)


# Collation


@given(EXAMPLES, st.integers(1, 9))
def test_labels_are_the_completion_and_its_eos_and_nothing_else(examples, multiple):
    batch = collate(examples, EOS, multiple)
    for one, ids, labels in zip(examples, batch["input_ids"], batch["labels"], strict=True):
        num_tokens = len(one.input_ids)
        assert ids[:num_tokens].tolist() == one.input_ids
        assert ids[num_tokens:].eq(EOS).all()
        assert labels[: one.num_prompt].eq(IGNORE_INDEX).all()
        assert labels[one.num_prompt : num_tokens].tolist() == one.input_ids[one.num_prompt :]
        assert labels[num_tokens:].eq(IGNORE_INDEX).all()
        assert labels[num_tokens - 1] == EOS


@given(EXAMPLES, st.integers(1, 9))
def test_padding_goes_to_the_longest_rounded_up_and_no_further(examples, multiple):
    width = collate(examples, EOS, multiple)["input_ids"].shape[1]
    longest = max(len(one.input_ids) for one in examples)
    assert longest <= width < longest + multiple
    assert width % multiple == 0


def test_a_batch_is_int64_and_knows_where_its_rows_stand():
    batch = collate([example(2, 3, "a:1"), example(1, 1, "b:7")], EOS)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["sources"] == ["a:1", "b:7"]
    assert set(batch) == {"input_ids", "labels", "sources"}


def test_no_examples_make_a_blank_batch_with_nothing_to_learn():
    batch = collate([], EOS)
    assert batch["input_ids"].tolist() == [[EOS]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX]]
    assert batch["sources"] == []


# The order of training

LENGTHS = st.lists(st.integers(1, 500), max_size=300).map(lambda lengths: np.array(lengths, np.int32))


def epoch_of(sampler: LengthGroupedSampler, epoch: int = 0) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


@given(LENGTHS, st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_an_epoch_has_every_row_once_in_full_batches_but_the_last(lengths, batch_size, epoch, shuffle):
    sampler = LengthGroupedSampler(lengths, batch_size, shuffle=shuffle)
    batches = epoch_of(sampler, epoch)
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    assert len(batches) == len(sampler)
    assert all(len(batch) == batch_size for batch in batches[:-1])


@given(LENGTHS, st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_ranks_together_see_what_one_rank_with_their_batch_sizes_sum_sees(lengths, batch_size, num_replicas, epoch):
    whole = epoch_of(LengthGroupedSampler(lengths, batch_size * num_replicas), epoch)
    ranks = [
        epoch_of(LengthGroupedSampler(lengths, batch_size, rank=rank, num_replicas=num_replicas), epoch)
        for rank in range(num_replicas)
    ]
    assert [sorted(itertools.chain(*batches)) for batches in zip(*ranks, strict=True)] == [sorted(b) for b in whole]
    assert {len(batches) for batches in ranks} == {len(whole)}
    assert all(len(batch) <= batch_size for batches in ranks for batch in batches)


@given(LENGTHS, st.integers(1, 9), st.integers(0, 3), st.integers(0, 40))
def test_a_pass_that_begins_in_the_middle_is_the_rest_of_the_whole_one(lengths, batch_size, epoch, start):
    whole = epoch_of(LengthGroupedSampler(lengths, batch_size), epoch)
    sampler = LengthGroupedSampler(lengths, batch_size)
    sampler.seek(epoch, start)
    sampler.set_epoch(epoch)
    assert len(sampler) == len(whole)
    assert list(sampler) == whole[start:]
    assert list(sampler) == whole


def test_the_start_does_not_carry_over_to_another_epoch():
    sampler = LengthGroupedSampler(np.arange(100), 10)
    sampler.seek(0, 4)
    assert len(epoch_of(sampler, 1)) == 10


def test_the_order_is_a_function_of_seed_and_epoch():
    lengths = np.arange(1000) % 37

    def order(seed: int, epoch: int) -> list[list[int]]:
        return epoch_of(LengthGroupedSampler(lengths, 8, seed=seed), epoch)

    assert order(1, 2) == order(1, 2)
    assert len({str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_the_order_neither_reads_nor_moves_the_global_generators():
    lengths = np.arange(100)
    np_state, torch_state = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    epoch_of(LengthGroupedSampler(lengths, 8))
    assert np.random.get_state()[1].tolist() == np_state
    assert torch.get_rng_state().tolist() == torch_state


def test_without_shuffling_all_epochs_are_alike_and_the_first_batches_a_fair_sample():
    lengths = np.sort(np.random.default_rng(0).integers(100, 500, 4000))
    sampler = LengthGroupedSampler(lengths, 8, shuffle=False)
    first = epoch_of(sampler, 0)
    assert epoch_of(sampler, 5) == first
    sample = np.array(list(itertools.chain(*first[:100])))
    assert abs(lengths[sample].mean() - lengths.mean()) < 25


def test_grouping_by_length_leaves_little_padding():
    lengths = np.random.default_rng(0).integers(100, 500, 20_000)

    def padding(batches: list[list[int]]) -> float:
        padded = sum(len(batch) * max(lengths[batch]) for batch in batches)
        return 1 - lengths.sum() / padded

    assert padding(epoch_of(LengthGroupedSampler(lengths, 8))) < 0.02
    assert padding(np.random.default_rng(1).permutation(20_000).reshape(-1, 8).tolist()) > 0.25


def test_only_the_last_global_batch_is_not_full_and_a_rank_may_get_none_of_it():
    ranks = [list(LengthGroupedSampler(np.ones(9), 2, rank=rank, num_replicas=2)) for rank in range(2)]
    assert [len(batch) for batch in ranks[0]] == [2, 2, 1]
    assert [len(batch) for batch in ranks[1]] == [2, 2, 0]


@pytest.mark.parametrize("sampler", [LengthGroupedSampler(np.ones(9), 2), InOrderSampler(9, 2)])
def test_lightning_puts_no_sampler_of_its_own_around_a_distributed_one(sampler):
    assert isinstance(sampler, DistributedSampler)


# In order


@given(st.integers(0, 50), st.integers(1, 9), st.integers(1, 4))
def test_prompts_keep_their_order_and_none_comes_twice(num_rows, batch_size, num_replicas):
    samplers = [InOrderSampler(num_rows, batch_size, rank=r, num_replicas=num_replicas) for r in range(num_replicas)]
    ranks = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(batches) for batches in ranks]
    interleaved = itertools.chain(*itertools.zip_longest(*ranks, fillvalue=[]))
    assert list(itertools.chain(*interleaved)) == list(range(num_rows))
