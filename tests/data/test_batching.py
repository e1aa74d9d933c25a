from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from snake_lora_pl.constants import IGNORE_INDEX
from snake_lora_pl.data.batching import collate, split_batch
from snake_lora_pl.data.encoding import Example

EOS = 2


def example(num_prompt: int, num_completion: int, source: str = "rows.jsonl:1") -> Example:
    return Example([*range(10, 10 + num_prompt + num_completion - 1), EOS], num_prompt, source)


EXAMPLES = st.lists(st.builds(example, st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=6)


@given(EXAMPLES, st.integers(1, 9))
def test_labels_are_exactly_the_completion_and_its_eos(examples, multiple):
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
def test_batch_is_padded_to_its_longest_example_rounded_up(examples, multiple):
    width = collate(examples, EOS, multiple)["input_ids"].shape[1]
    longest = max(len(one.input_ids) for one in examples)
    assert longest <= width < longest + multiple
    assert width % multiple == 0


def test_batch_holds_int64_tensors_and_the_sources_of_its_rows():
    batch = collate([example(2, 3, "a:1"), example(1, 1, "b:7")], EOS)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["sources"] == ["a:1", "b:7"]
    assert set(batch) == {"input_ids", "labels", "sources"}


def test_no_examples_give_a_blank_batch_without_targets():
    batch = collate([], EOS)
    assert batch["input_ids"].tolist() == [[EOS]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX]]
    assert batch["sources"] == []


@given(EXAMPLES, st.integers(1, 9))
def test_split_batch_is_the_inverse_of_collate(examples, multiple):
    found = split_batch(collate(examples, EOS, multiple))
    assert [one._replace(input_ids=list(one.input_ids)) for one in found] == examples
    assert split_batch(collate([], EOS)) == []
