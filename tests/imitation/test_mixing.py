"""Mixing of rows into batches: share, weights, and the same rows for any number of ranks."""

from __future__ import annotations

from collections import Counter

import pytest

from snake_lora_pl.data.encoding import Example
from snake_lora_pl.imitation.mixing import RowMixer


def examples(name: str, count: int) -> list[Example]:
    return [Example([1, 2], 1, f"{name}:{i}") for i in range(count)]


def mixer(share: float, weights: list[float], seed: int = 0) -> RowMixer:
    result = RowMixer(share, seed)
    result.add(examples("round", len(weights)), weights)
    return result


def new_sources(batch: list[Example]) -> list[str]:
    return [example.source for example in batch if example.source.startswith("round")]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.33, 1.0])
def test_share_of_the_rows_is_replaced(share: float) -> None:
    batches = [mixer(share, [1.0] * 5).mix(examples("old", 8), n, batch_size=8) for n in range(300)]
    assert all(len(batch) == 8 for batch in batches)
    replaced = [len(new_sources(batch)) for batch in batches]
    assert max(replaced) - min(replaced) <= 1
    assert sum(replaced) / (300 * 8) == pytest.approx(share, abs=0.01)


def test_rows_are_drawn_by_weight() -> None:
    weighted = mixer(1.0, [1.0, 3.0, 10.0])
    drawn = Counter(s for n in range(500) for s in new_sources(weighted.mix(examples("old", 8), n, batch_size=8)))
    for index, weight in enumerate((1, 3, 10)):
        assert drawn[f"round:{index}"] / 4000 == pytest.approx(weight / 14, abs=0.03)


def test_rows_of_later_rounds_are_drawn_too() -> None:
    both = mixer(1.0, [2.0])
    both.add(examples("round2", 1), [2.0])
    drawn = Counter(s for n in range(200) for s in new_sources(both.mix(examples("old", 8), n, batch_size=8)))
    assert drawn["round2:0"] / 1600 == pytest.approx(0.5, abs=0.05)


def test_batch_is_a_function_of_seed_and_number() -> None:
    def mix(seed: int, number: int) -> list[Example]:
        return mixer(0.5, [1.0] * 50, seed).mix(examples("old", 8), number, batch_size=8)

    assert mix(0, 3) == mix(0, 3)
    assert mix(0, 3) != mix(0, 4)
    assert mix(0, 3) != mix(1, 3)


def test_nothing_is_replaced_without_rows() -> None:
    old = examples("old", 8)
    empty = RowMixer(1.0, 0)
    empty.add([], [])
    assert empty.mix(old, 0, batch_size=8) == old


@pytest.mark.parametrize("num_rows", [8, 7, 5, 1])
def test_ranks_train_on_the_rows_of_one_rank(num_rows: int) -> None:
    old = examples("old", num_rows)
    for number in range(50):
        whole = mixer(0.4, [1.0, 2.0] * 9).mix(old, number, batch_size=8)
        parts = [
            mixer(0.4, [1.0, 2.0] * 9).mix(old[rank::2], number, batch_size=4, rank=rank, num_replicas=2)
            for rank in range(2)
        ]
        assert Counter(e.source for part in parts for e in part) == Counter(e.source for e in whole)
