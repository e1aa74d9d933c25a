from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snake_lora_pl.constants import IGNORE_INDEX
from snake_lora_pl.training.loss import select_targets
from snake_lora_pl.training.packing import pack

PAD = 0

# A row: tokens, and which of them carry a label.
rows_strategy = st.lists(
    st.lists(st.tuples(st.integers(1, 3), st.booleans()), min_size=1, max_size=9), min_size=1, max_size=5
)


def batch_of(rows: list[list[tuple[int, bool]]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows) + 1
    input_ids = torch.full((len(rows), width), PAD)
    labels = torch.full((len(rows), width), IGNORE_INDEX)
    for i, row in enumerate(rows):
        for j, (token, labeled) in enumerate(row):
            input_ids[i, j] = token
            if labeled:
                labels[i, j] = token
    return input_ids, labels


@given(rows_strategy, st.booleans())
@settings(max_examples=300)
def test_each_target_is_predicted_from_exactly_the_tokens_before_it_in_its_row(rows: list, share_prefix: bool) -> None:
    input_ids, labels = batch_of(rows)
    targets = select_targets(labels)
    batch = pack(input_ids, labels, share_prefix=share_prefix)
    if batch is None:
        assert targets.token_ids.numel() == 0
        return
    assert batch.target_ids.tolist() == targets.token_ids.tolist()
    assert share_prefix or batch.prefix_length == 0

    # The context of each packed token, computed the slow way: the prefix, and the tokens of its row before it.
    suffix = list(range(batch.prefix_length, len(batch.token_ids)))
    positions = batch.suffix_index.tolist() if batch.suffix_index.numel() else [p - batch.prefix_length for p in suffix]
    row_of = {packed: position // batch.suffix_length for packed, position in zip(suffix, positions, strict=True)}
    seen = []
    for packed in batch.target_index.tolist():
        own_row = [p for p in suffix if p <= packed and row_of[p] == row_of.get(packed)]
        context = [*range(min(batch.prefix_length, packed + 1)), *own_row]
        assert batch.position_ids[context].tolist() == list(range(len(context)))
        seen.append(batch.token_ids[context].tolist())
    expected = [input_ids[i, : j + 1].tolist() for i, j in zip(targets.rows, targets.positions, strict=True)]
    assert seen == expected


@given(rows_strategy)
@settings(max_examples=100)
def test_unpadding_inverts_padding_of_suffixes(rows: list) -> None:
    batch = pack(*batch_of(rows))
    if batch is None:
        return
    padded = batch.pad_suffixes(batch.token_ids)
    assert padded.shape == (batch.num_rows, batch.suffix_length)
    assert torch.equal(batch.unpad_suffixes(padded), batch.token_ids[batch.prefix_length :])


def test_padding_and_tokens_after_the_last_label_are_not_packed() -> None:
    input_ids, labels = batch_of([[(1, False), (2, False), (3, True)], [(1, False), (1, True), (2, False), (2, False)]])
    batch = pack(input_ids, labels)
    assert batch is not None
    assert batch.prefix_length == 0  # only the first token of the second row is used, and it is its suffix
    assert batch.token_ids.tolist() == [1, 2, 1]


def test_equal_rows_share_all_but_their_last_token() -> None:
    row = [(1, False), (2, False), (3, False), (1, True)]
    batch = pack(*batch_of([row] * 4))
    assert batch is not None
    assert batch.prefix_length == 2
    assert batch.token_ids.tolist() == [1, 2, 3, 3, 3, 3]
